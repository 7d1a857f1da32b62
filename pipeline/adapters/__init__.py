"""The IP-Adapter variants: one small file each, one line each here."""

import pkgutil

from pipeline.adapters.base import Variant
from schemas.errors import ConfigError
from schemas.torchvision_cpu import install

install()  # before any module of this package imports diffusers

VARIANTS: dict[str, str] = {
    "ip-adapter": "pipeline.adapters.ip_adapter:IpAdapter",
    "plus": "pipeline.adapters.plus:Plus",
    "plus-face": "pipeline.adapters.plus_face:PlusFace",
    "full-face": "pipeline.adapters.full_face:FullFace",
    "faceid": "pipeline.adapters.faceid:FaceId",
    "faceid-portrait": "pipeline.adapters.faceid_portrait:FaceIdPortrait",
    "faceid-plus": "pipeline.adapters.faceid_plus:FaceIdPlus",
    "faceid-plusv2": "pipeline.adapters.faceid_plusv2:FaceIdPlusV2",
}
"""Name -> class, resolved lazily with pkgutil.resolve_name."""


def variant(name: str) -> type[Variant]:
    """The variant of that name.

    Raises:
        ConfigError: when there is none; lists the known ones.
    """
    if not name:
        raise ConfigError(f"Say what to train, by --variant and one of: {', '.join(VARIANTS)}.")
    if name not in VARIANTS:
        raise ConfigError(f"The variant {name!r} is not known; choose one of: {', '.join(VARIANTS)}.")
    cls: type[Variant] = pkgutil.resolve_name(VARIANTS[name])
    return cls
