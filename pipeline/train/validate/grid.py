"""Draws the grid of validation images: one row per face, one column per prompt."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]
"""(H, W, 3) RGB."""

_LEAST_SIDE = 192
"""Smaller images are drawn larger, each pixel as a square, so that prompts can be read above them."""
_GAP = 8
_PAPER, _INK = (255, 255, 255), (20, 20, 20)


class Row(NamedTuple):
    """One face and what was made of it."""

    name: str
    face: Pixels
    images: Sequence[Pixels]
    """One per prompt, all of one size."""
    captions: Sequence[str]
    """What is written below each image; may be empty."""


def draw(prompts: Sequence[str], rows: Sequence[Row]) -> Pixels:
    """The grid as one RGB picture: prompts on top, the faces on the left with their names, captions below images."""
    height, width = rows[0].images[0].shape[:2]
    factor = -(-_LEAST_SIDE // width)
    sheet = _Sheet(width * factor, height * factor, len(prompts) + 1, len(rows), ["face", *prompts])
    for index, row in enumerate(rows):
        sheet.put(index, 0, _fitted(row.face, width * factor, height * factor), row.name)
        for column, (image, caption) in enumerate(zip(row.images, row.captions, strict=True), start=1):
            sheet.put(index, column, image.repeat(factor, 0).repeat(factor, 1), caption)
    return sheet.pixels()


class _Sheet:
    """Paper with cells under a header of wrapped text, and a line of text below each cell."""

    def __init__(self, width: int, height: int, columns: int, rows: int, header: Sequence[str]) -> None:
        self._font = ImageFont.load_default(max(14, width // 20))
        # The box of letters with and without descenders is as high as any line.
        self._line = round(self._font.getbbox("Ágjpqy|")[3] * 1.15)
        self._cell = (width, height)
        wrapped = [self._wrap(text) for text in header]
        self._top = _GAP + self._line * max(len(lines) for lines in wrapped)
        size = (_GAP + columns * (width + _GAP), self._top + rows * (height + self._line + 2 * _GAP) + _GAP)
        self._paper = Image.new("RGB", size, _PAPER)
        self._pen = ImageDraw.Draw(self._paper)
        for column, lines in enumerate(wrapped):
            for index, line in enumerate(lines):
                # Short prompts stand directly above their images.
                y = self._top - self._line * (len(lines) - index)
                self._write(column, y, line)

    def put(self, row: int, column: int, image: Pixels, caption: str) -> None:
        """Put an image of at most the cell's size into a cell."""
        x = _GAP + column * (self._cell[0] + _GAP)
        y = self._top + row * (self._cell[1] + self._line + 2 * _GAP) + _GAP
        self._paper.paste(Image.fromarray(image), (x, y))
        if caption:
            self._write(column, y + self._cell[1] + _GAP // 4, self._cut(caption))

    def pixels(self) -> Pixels:
        return np.asarray(self._paper)

    def _write(self, column: int, y: int, line: str) -> None:
        self._pen.text((_GAP + column * (self._cell[0] + _GAP), y), line, _INK, self._font)

    def _fits(self, text: str) -> bool:
        return self._font.getlength(text) <= self._cell[0]

    def _cut(self, text: str) -> str:
        """The text, or as many letters of its end as fit: names differ there."""
        if self._fits(text):
            return text
        return next((cut for start in range(len(text)) if self._fits(cut := f"…{text[start:]}")), "")

    def _wrap(self, text: str) -> list[str]:
        """Lines that are not wider than a cell; words are broken only where one is wider by itself."""
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if self._fits(longer):
                lines[-1] = longer
                continue
            lines += [""] if lines[-1] else []
            for letter in word:
                if not self._fits(lines[-1] + letter):
                    lines.append("")
                lines[-1] += letter
        return lines


def _fitted(image: Pixels, width: int, height: int) -> Pixels:
    """The image as large as fits into width x height."""
    scale = min(width / image.shape[1], height / image.shape[0])
    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    resized: Pixels = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return resized
