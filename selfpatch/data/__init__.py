"""Images as a data set: sources, readers, augmentations and the loader."""
