"""Prompts that programs write into, or beside, the images that they make: A1111 and its kin, ComfyUI."""

import json
import re
import warnings
from typing import IO, Any

from PIL import Image as Pillow

from stages.pixels.headers import DECODER_ERRORS, chunks, format_of
from stages.pixels.jpeg import segments

_SETTINGS = re.compile(r"Steps: \d+, .*\bSeed: \d")
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
_STARTS = ("positive", "conditioning")
"""Inputs of ComfyUI's nodes that sample."""
_FOLLOWED = (
    *(*_STARTS, "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from"),
    *("text", "text_g", "text_l", "clip_l", "t5xxl", "prompt", "string", "value", "populated_text"),
)
"""Inputs in which a prompt may stand, or that lead to it."""
_HEAD = 1 << 17
"""EXIF stands at the beginning of a JPEG file, and is at most half as long."""
_MADE = (b"rompt:", b"ROMPT:", b"Steps:", b"S\0t\0e\0p\0s\0:")
"""One of these is in EXIF that is looked into: a camera's says much else."""
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286
_GRAPHS = (0x0110, 0x010F, 0x010E)
"""Model, make and description: where savers of ComfyUI put `prompt:` and its graph, each as it likes."""


def of_infotext(text: str) -> str:
    """The prompt alone of what A1111 writes of an image (prompt, negative prompt, settings); other text as it is."""
    above, _, last = text.rstrip().rpartition("\n")
    if not _SETTINGS.match(last):
        return text
    prompt, networks = _NETWORK.subn("", f"\n{above}".partition("\nNegative prompt:")[0].strip())
    return ", ".join(filter(None, map(str.strip, prompt.split(",")))) if networks else prompt


def in_image(file: IO[bytes]) -> bytes:
    """What a PNG, JPEG or WebP file says it was made by, as a .txt beside it would hold it: A1111's text as it stands.

    Empty where it says nothing that is understood. No pixel is decoded.
    """
    try:
        head = file.read(_HEAD)
        format = format_of(head)
        if format == "PNG":
            with Pillow.open(file, formats=["PNG"]) as image:  # reads what stands before the pixels, and not these
                texts = image.info
            text = texts["parameters"] if "parameters" in texts else _of_graph(json.loads(texts["prompt"]))
        elif format == "JPEG":
            starts = ((start, end) for marker, start, end in segments(head) if marker == 0xE1)
            text = _in_exif(next(head[start:end] for start, end in starts if head[start : start + 6] == b"Exif\0\0"))
        elif format == "WEBP" and head[12:16] == b"VP8X" and head[20] & 0x08:  # its header announces EXIF
            data = head + file.read()
            text = _in_exif(next(data[start:end] for name, start, end in chunks("WEBP", data) if name == b"EXIF"))
        else:
            text = ""
    except (*DECODER_ERRORS, StopIteration, RecursionError):
        text = ""
    return text.encode("utf-8", "replace")


def _in_exif(data: bytes) -> str:
    """The graph of _GRAPHS, or the user comment of A1111."""
    if not any(word in data for word in _MADE):
        return ""
    exif = Pillow.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on broken metadata
        exif.load(data)
        texts = [exif.get(tag) for tag in _GRAPHS]
        comment = exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    for text in texts:
        name, _, graph = text.partition(":") if isinstance(text, str) else ("", "", "")
        if name.lower() == "prompt":
            return _of_graph(json.loads(graph.encode("latin-1")))  # as which Pillow reads what is UTF-8
    if not isinstance(comment, bytes):
        return ""
    code, comment = comment[:8], comment[8:]
    is_little = comment[1::2].count(0) > comment[::2].count(0)  # writers do not agree; the zeros of "Steps:" tell
    encoding = ("utf-16-le" if is_little else "utf-16-be") if code == b"UNICODE\0" else "utf-8"
    text = comment.decode(encoding, "replace")
    return text if of_infotext(text) != text else ""  # cameras write comments too


def _of_graph(nodes: Any) -> str:
    """The positive prompt of a ComfyUI graph in its API form: {id: {class_type, inputs}}."""
    inputs = {key: node["inputs"] for key, node in nodes.items() if isinstance(node.get("inputs"), dict)}
    for own in inputs.values():
        links, seen, words = [own[name] for name in _STARTS if name in own], set[str](), dict[str, None]()
        while links:
            link = links.pop(0)
            if isinstance(link, str) and link.strip():
                words[link.strip()] = None
            elif isinstance(link, list) and link and str(link[0]) not in seen:
                seen.add(str(link[0]))
                linked = inputs.get(str(link[0]), {})
                links += [value for name, value in linked.items() if name in _FOLLOWED]
        if words:
            return ", ".join(words)
    return ""
