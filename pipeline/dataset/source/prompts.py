"""Prompts that programs write into, or beside, the images that they make: A1111 and its kin, ComfyUI."""

import json
import re
import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST_BYTES = 4 << 20
"""Of a text in a file; ComfyUI's hold a whole workflow."""
_MOST_CHUNKS = 1000
_SETTINGS = re.compile(r"Steps: \d+, .*\bSeed: \d")
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
_STARTS = ("positive", "conditioning")
"""Inputs of ComfyUI's nodes that sample."""
_FOLLOWED = (
    *(*_STARTS, "conditioning_1", "conditioning_2", "conditioning_to", "conditioning_from"),
    *("text", "text_g", "text_l", "clip_l", "t5xxl", "prompt", "string", "value", "populated_text"),
)
"""Inputs in which a prompt may stand, or that lead to it."""


def of_infotext(text: str) -> str:
    """The prompt alone of what A1111 writes of an image (prompt, negative prompt, settings); other text as it is."""
    above, _, last = text.rstrip().rpartition("\n")
    if not _SETTINGS.match(last):
        return text
    prompt, networks = _NETWORK.subn("", f"\n{above}".partition("\nNegative prompt:")[0].strip())
    return ", ".join(filter(None, map(str.strip, prompt.split(",")))) if networks else prompt


def in_png(path: str) -> str:
    """The prompt that a PNG file says it was made by; empty where it says none that is understood."""
    try:
        with open(path, "rb") as stream:
            texts = dict(_texts(stream))
        return of_infotext(texts["parameters"]) if "parameters" in texts else _of_graph(json.loads(texts["prompt"]))
    except (OSError, LookupError, ValueError, RecursionError, AttributeError):
        return ""


def _texts(stream: BinaryIO) -> Iterator[tuple[str, str]]:
    """Keywords and texts before the pixels; none that is compressed."""
    is_png = stream.read(len(_SIGNATURE)) == _SIGNATURE
    for _ in range(_MOST_CHUNKS if is_png else 0):
        head = stream.read(8)
        if len(head) < 8 or head.endswith(b"IDAT"):
            return
        size, kind = struct.unpack(">I4s", head)
        if kind not in (b"tEXt", b"iTXt") or size > _MOST_BYTES:
            stream.seek(size + 4, 1)
            continue
        content = stream.read(size + 4)  # and its checksum
        if len(content) < size + 4:
            return
        keyword, _, text = content[:-4].partition(b"\0")
        if kind == b"iTXt" and text[:1] == b"\0":  # two bytes of compression, language, translated keyword
            yield keyword.decode("latin-1"), text[2:].split(b"\0", 2)[2].decode("utf-8", "replace")
        elif kind == b"tEXt":
            yield keyword.decode("latin-1"), text.decode("latin-1")


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
