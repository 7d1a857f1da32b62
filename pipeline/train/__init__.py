"""What `pipeline.train` is made of: settings, bases, the objective, checkpoints, validation."""

import pipeline.shared.quiet  # noqa: F401  # before any module of this package imports diffusers or transformers
