"""By what an image file says that a model made it: texts that generators leave in its metadata. No pixel is decoded.

A file that says nothing proves nothing; and a C2PA manifest alone does not count, since cameras sign photos by it too.
"""

import re

from stages.pixels import jpeg
from stages.pixels.headers import chunks

_MARKS = {
    re.compile(pattern): name
    for name, patterns in {
        "trainedAlgorithmicMedia": (rb"digitalsourcetype/trainedAlgorithmicMedia",),
        "stable_diffusion": (rb"Steps: \d+, Sampler: ", rb"Stable ?Diffusion"),
        "comfyui": (rb"ComfyUI", rb"\"class_type\": ?\""),
        "invokeai": (rb"InvokeAI", rb"invokeai_metadata", rb"sd-metadata"),
        "novelai": (rb"NovelAI",),
        "midjourney": (rb"Midjourney",),
        "firefly": (rb"Adobe Firefly",),
        "dall_e": (rb"DALL.{1,2}E\b",),
        "google_ai": (rb"Made with Google AI",),
    }.items()
    for pattern in patterns  # each by itself: Python looks for how one begins 20 times as fast as for alternatives
}
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
    """The name of the first mark in a whole file (of _MARKS), empty without one; of JPEG, PNG and WebP only."""
    names, texts = _CARRIERS.get(format, frozenset()), bytearray()
    walk = jpeg.segments(data) if format == "JPEG" else chunks(format, data) if names else ()
    for name, start, end in walk:
        if name in names:
            texts += data[start : min(end, start + _MOST - len(texts))]
    text = texts.replace(b"\0", b"")  # UserComment may be UTF-16
    matches = ((match.start(), name) for pattern, name in _MARKS.items() if (match := pattern.search(text)))
    return min(matches, default=(0, ""))[1]
