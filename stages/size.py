"""Size: what the image file is, whether it is whole, whether its picture is large enough. Pixels are not decoded."""

from collections.abc import Mapping
from typing import Any

from schemas.drops import Dropped, DropReason
from stages.base import RowStage
from stages.pixels import jpeg
from stages.pixels.headers import UNDECODABLE, check_whole, read_header
from stages.pixels.marks import ai_mark


class Size(RowStage):
    """Measures format, width and height from the header, and drops what later stages could not use.

    Also how strongly a JPEG was compressed, and whether a file says that a model made it: `filter` judges both.
    """

    name = "size"
    reads = ("image",)
    writes = ("format", "width", "height", "jpeg_quality", "ai_mark")
    drops = (
        DropReason.NOT_AN_IMAGE,
        DropReason.UNSUPPORTED_FORMAT,
        *UNDECODABLE,
        DropReason.TOO_MANY_PIXELS,
        DropReason.SMALL_IMAGE,
    )

    def row(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Measure one image; a small one is called small even when it is truncated too."""
        data = record["image"]  # once: each reading of it copies the file
        header = read_header(data)
        measured = header._asdict()
        limits = self.settings.filter
        if min(header.width, header.height) < limits.min_image_px:
            raise Dropped(DropReason.SMALL_IMAGE, **measured)
        if header.width * header.height > limits.max_pixels:
            raise Dropped(DropReason.TOO_MANY_PIXELS, **measured)
        try:
            check_whole(data, header)
        except Dropped as dropped:
            raise Dropped(dropped.reason, **measured) from dropped
        quality = jpeg.quality(data) if header.format == "JPEG" else 100
        return {**measured, "jpeg_quality": quality, "ai_mark": ai_mark(header.format, data)}
