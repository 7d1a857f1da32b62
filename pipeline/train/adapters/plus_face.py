"""`plus-face`: the network of `plus`; the condition is the aligned face, the target the photo around it."""

from pipeline.train.adapters.base import Kind
from pipeline.train.adapters.plus import Plus


class PlusFace(Plus):
    """See `Plus`."""

    name = "plus-face"

    @staticmethod
    def released_name(kind: Kind) -> str:
        """See Variant."""
        return "ip-adapter-plus-face_sd15" if kind == "sd15" else "ip-adapter-plus-face_sdxl_vit-h"
