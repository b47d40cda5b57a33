"""The method of the paper: backbone, heads, losses, optimiser and the state of a run."""
