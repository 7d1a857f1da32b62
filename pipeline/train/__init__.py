"""Training: from finished shards to an adapter that others can load."""

import os

# Before any module of this package imports diffusers, transformers or albumentations: nothing is sent anywhere.
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", NO_ALBUMENTATIONS_UPDATE="1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
