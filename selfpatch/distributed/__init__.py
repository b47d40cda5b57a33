"""Several processes: starting and ending together, collectives, and telling which rank the others wait for."""
