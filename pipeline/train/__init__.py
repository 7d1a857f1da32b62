"""Training: from finished shards to an adapter that others can load."""

import os

from pipeline.shared.process import NO_TELEMETRY

# Before any module of this package imports diffusers, transformers or albumentations: nothing is sent anywhere, but by
# a hook of the user's own.
os.environ.update({name: value for name, value in NO_TELEMETRY.items() if name != "WANDB_MODE"})
os.environ.setdefault("HF_HUB_OFFLINE", "1")
