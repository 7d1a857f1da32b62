"""Imported before diffusers and transformers: nothing is sent anywhere."""

import os

os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1", NO_ALBUMENTATIONS_UPDATE="1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
