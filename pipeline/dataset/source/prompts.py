"""Prompts that programs write into, or beside, the images that they make: A1111 and its kin, ComfyUI."""

import json
import re
from typing import Any

from PIL import Image as Pillow

from stages.pixels.headers import DECODER_ERRORS

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
        with Pillow.open(path, formats=["PNG"]) as image:  # reads what stands before the pixels, and not these
            texts = image.info
        return of_infotext(texts["parameters"]) if "parameters" in texts else _of_graph(json.loads(texts["prompt"]))
    except (*DECODER_ERRORS, RecursionError):
        return ""


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
