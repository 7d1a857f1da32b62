"""HEIF files (HEIC), which no package here writes; pillow-heif made them of `drawn` at quality 50."""

import base64
import zlib

import numpy as np


def drawn() -> np.ndarray:
    """(80, 96, 3) uint8 RGB, all corners different."""
    y, x = np.mgrid[:80, :96]
    return np.stack([x * 255 // 95, y * 255 // 79, 255 - x * 255 // 95], 2).astype(np.uint8)


UPRIGHT = zlib.decompress(
    base64.b64decode(
        "eNpjYGCQSSupLMhIzUxmAILczDRDEDs3MzGNgYExLDe1JJEBAhQzUnKKoGyGgszkEgY0oJSZkw82xMWBgREIgYCxCkIDwTYgVs7MzEsD80CiokBO"
        "KhOUl1GWbAhi8hVkluTClVzLLCgqANLbMwuS84F0BVCZMyMzSGgCWJHcB4Y/f3/8YGDgZ04A6pBwYORh/P8fpIAZpIIZhOR2MTkkAiW1nRgZ0WQW"
        "GDS6Tnvlqbkuj0mKhwMkdAJEcDgkAdWzuzAeLNqg5AC0Rjg5P6coLzmnAijMy8DWABQSySwuSIX6LQGIA4BYoCCzIhMkwMzBATSNQTyzIBcWfMAQ"
        "YWlkYmYBMvflpiSCQm+TBuN64YaMpON+vlPP/bZvdC/WYw1c/MBHL32+v7iX/cYzbpunzJ7ceOSVSm/lecG3Onp7Zjg3zp5lYWYdc6i3pracQUCT"
        "k23t/Sv5zEYVvbPk5p/Nlt79XNVqn1UHw9TDLYr2VQs6+98meUrUFrwuMwszvR6nO+mksXbOldulm2fV9jzisXx8+rqcOOuMH8W14RqJFjta0qws"
        "f6k88FFycvrCwf/hCoPu+ag1Gwr2r9iydlFzcfzthd49AFNYlD0="
    )
)
TURNED = zlib.decompress(
    base64.b64decode(
        "eNpjYGCQSSupLMhIzUxmAILczDRDEDs3MzGNgYFxYW5qSSIDBChmpOQUQdkMBZnJJQxowCQzJx9siIsDAxMDI4jFeBRCA8E6oBgQMBXDRVSA2CIz"
        "My8NzAPJigI5qWBlQDUZZcmGDEiCjCAlrhWZYOV8BZkluQxQlQwPMguKCoD0gcyC5HwgXQHU68zIDBKaAFYk94Hhz98fPxgY+JkTgDokHBh5GP//"
        "BylgBqlgBiG5XUwOiUBJbSdGRjSZBRqNrdNeeWquy2OS4uEACZ0AERwOSUD17C6MB4s2KDkArRFOzs8pykvOqQAK8zKwNQCFRDKLC1KhHg4A4gQg"
        "FijIrMgECTBzcABNY+DMLMovAdrEIJFZkAsLbkYGRtZGJmaWViBbKrMoNQ0qzpecUpwMDl+Qz2/lpiSCImKVBuN64YYd7mJl0vdKFPg5lq34f27B"
        "12uTJussLlCqembnuU8x8+phsUsJMn8+PLmumq/tL1LJlXfs9adPp3urXghInOWarqXDIa6zWft5zd7K393X5Z8vuHeV48574RPpqcen8Fr1l8rd"
        "YPuUHSA01ymgYopN6aNrS0OrLMUup6fPusj8Im3ppfuB67y737XO0H67bvrRsgbzhNORnZNqVhlEsYq8K2eyepwkkn3hy8dzVgeArmWDRKOvL4MW"
        "kMfBwMgoBAppoI/YIJ4EAM7upEE="
    )
)
"""Stored lying on its side, with EXIF's orientation 6 and the turn (`irot`) that libheif makes of it."""
