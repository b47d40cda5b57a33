"""Pictures of features, videos and training curves."""
