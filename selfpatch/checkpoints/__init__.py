"""Checkpoints of every kind: recognising, reading, writing and converting them."""
