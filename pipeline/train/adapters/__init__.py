"""IP-Adapters: the variants, the attention that they add to a UNet, and their files."""

from schemas.errors import ConfigError

NAMES = ("ip-adapter", "plus", "plus-face", "full-face", "faceid", "faceid-portrait", "faceid-plus", "faceid-plusv2")
"""Those of `variants.VARIANTS`, for whoever need not import torch."""


def require_known(name: str) -> None:
    if not name:
        raise ConfigError(f"Say what to train, with --resume too, by --variant and one of: {', '.join(NAMES)}.")
    if name not in NAMES:
        raise ConfigError(f"The variant {name!r} is not known; choose one of: {', '.join(NAMES)}.")
