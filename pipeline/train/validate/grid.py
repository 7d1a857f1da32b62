"""Draws the grid of validation images: one row per face, one column per prompt."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont, ImageOps

from schemas.arrays import Image

_LEAST_SIDE = 192
"""Smaller images are drawn larger, each pixel as a square, so that prompts can be read above them."""
_GAP = 8
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


class GridRow(NamedTuple):
    name: str
    face: Image
    images: Sequence[Image]
    """One per prompt, all of one size."""
    captions: Sequence[str]
    """What is written below each image; may be empty."""


def draw(prompts: Sequence[str], rows: Sequence[GridRow]) -> Image:
    """The grid as one RGB picture: prompts on top, the faces on the left with their names, captions below images."""
    height, width = rows[0].images[0].shape[:2]
    factor = -(-_LEAST_SIDE // width)
    cell = (width * factor, height * factor)
    font = ImageFont.load_default(max(14, cell[0] // 20))
    headers = ["\n".join(textwrap.wrap(text, _letters(text, font, cell[0]))) for text in ("face", *prompts)]
    pen = ImageDraw.Draw(Pillow.new("RGB", (1, 1)))
    top, line = (
        2 * _GAP - round(min(pen.multiline_textbbox((0, 0), text, font, anchor="ld")[1] for text in texts))
        for texts in (headers, ["Ágjpqy|"])
    )
    sheet = Pillow.new(
        "RGB", (_GAP + len(headers) * (cell[0] + _GAP), top + len(rows) * (cell[1] + line) + _GAP), _PAPER
    )
    for column, header in enumerate(headers):
        left = _GAP + column * (cell[0] + _GAP)
        sheet.paste(_label(header, font, cell[0], top - _GAP), (left, 0))
        for index, row in enumerate(rows):
            y = top + index * (cell[1] + line)
            if column == 0:
                picture, caption = ImageOps.contain(Pillow.fromarray(row.face), cell), row.name
            else:
                picture, caption = Pillow.fromarray(row.images[column - 1]), row.captions[column - 1]
                picture = picture.resize(cell, Pillow.Resampling.NEAREST)
            sheet.paste(picture, (left, y))
            letters = _letters(caption, font, cell[0])
            if len(caption) > letters:  # names differ at their ends
                caption = f"…{caption[1 - letters :]}"
            sheet.paste(_label(caption, font, cell[0], line - _GAP), (left, y + cell[1]))
    return np.asarray(sheet)


def _letters(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> int:
    """How many letters of the text, as wide as they are on average and some spare, fit into `width`."""
    return max(int(0.9 * width * len(text) / max(font.getlength(text.replace("\n", " ")), 1)), 2)


def _label(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, height: int) -> Pillow.Image:
    """Text at the bottom of a strip of paper, where what is too wide is cut off."""
    strip = Pillow.new("RGB", (width, height), _PAPER)
    ImageDraw.Draw(strip).multiline_text((0, height), text, _INK, font, anchor="ld")
    return strip
