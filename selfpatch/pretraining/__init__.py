"""The pretraining job: options, steps, epochs, resuming and logs."""
