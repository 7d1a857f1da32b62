"""What `pipeline.train` is made of: settings, bases, the objective, checkpoints, validation."""
