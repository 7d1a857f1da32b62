"""By what an image file says that a model made it: texts that generators leave in its metadata. No pixel is decoded.

A file that says nothing proves nothing; and a C2PA manifest alone does not count, since cameras sign photos by it too.
"""

import re

from stages.pixels import jpeg
from stages.pixels.headers import chunks

_MARKS = re.compile(
    rb"(?P<trainedAlgorithmicMedia>digitalsourcetype/trainedAlgorithmicMedia)"
    rb"|(?P<stable_diffusion>Steps: \d+, Sampler: |Stable ?Diffusion)"
    rb"|(?P<comfyui>ComfyUI|\"class_type\": ?\")"
    rb"|(?P<invokeai>InvokeAI|invokeai_metadata|sd-metadata)"
    rb"|(?P<novelai>NovelAI)|(?P<midjourney>Midjourney)|(?P<firefly>Adobe Firefly)|(?P<dall_e>DALL.{1,2}E\b)"
    rb"|(?P<google_ai>Made with Google AI)"
)
"""IPTC's digital source type, in XMP or in a C2PA manifest, and the names and settings that generators write."""
_MOST = 4_000_000
"""Bytes of metadata that are searched."""
_CARRIERS: dict[str, frozenset[bytes | int]] = {
    "JPEG": frozenset({*range(0xE1, 0xF0), 0xFE}),
    "PNG": frozenset({b"tEXt", b"iTXt", b"eXIf", b"caBX"}),
    "WEBP": frozenset({b"EXIF", b"XMP ", b"C2PA"}),
}
"""Segments and chunks that hold metadata."""


def ai_mark(format: str, data: bytes) -> str:
    """The name of the first mark in a whole file (a group of _MARKS), empty without one; of JPEG, PNG and WebP only."""
    names, texts = _CARRIERS.get(format, frozenset()), bytearray()
    walk = jpeg.segments(data) if format == "JPEG" else chunks(format, data) if names else ()
    for name, start, end in walk:
        if name in names:
            texts += data[start : min(end, start + _MOST - len(texts))]
    match = _MARKS.search(texts.replace(b"\0", b""))  # UserComment may be UTF-16
    return match.lastgroup or "" if match else ""
