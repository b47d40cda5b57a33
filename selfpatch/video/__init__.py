"""DAVIS 2017: label propagation through videos and its scores."""
