"""The IP-Adapter variants: one small file each, one line each here."""

import pkgutil

from pipeline.train.adapters.base import Variant
from schemas.errors import ConfigError

VARIANTS: dict[str, str] = {
    "ip-adapter": "pipeline.train.adapters.ip_adapter:IpAdapter",
    "plus": "pipeline.train.adapters.plus:Plus",
    "plus-face": "pipeline.train.adapters.plus_face:PlusFace",
    "full-face": "pipeline.train.adapters.full_face:FullFace",
    "faceid": "pipeline.train.adapters.faceid:FaceId",
    "faceid-portrait": "pipeline.train.adapters.faceid_portrait:FaceIdPortrait",
    "faceid-plus": "pipeline.train.adapters.faceid_plus:FaceIdPlus",
    "faceid-plusv2": "pipeline.train.adapters.faceid_plusv2:FaceIdPlusV2",
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
