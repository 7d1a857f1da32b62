"""An aligned face as ArcFace's recognisers expect it; shared by who embeds faces and who trains against them."""

import numpy as np

from schemas.arrays import Doubles

ARCFACE_SIZE = 112
"""Side, pixels."""
ARCFACE_TEMPLATE = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)
"""Its five points, x and y: eyes, nose, corners of the mouth, the image's left first (insightface, face_align.py)."""

INSIGHTFACE_LICENCE = "insightface pretrained models: non-commercial research only"
PACK_FILES = {
    "det_10g": (16_923_827, "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91"),
    "det_2.5g": (3_292_009, "041f73f47371333d1d17a6fee6c8ab4e6aecabefe398ff32cca4e2d5eaee0af9"),
    "det_500m": (2_524_817, "5e4447f50245bbd7966bd6c0fa52938c61474a04ec7def48753668a9d8b4ea3a"),
    "w600k_r50": (174_383_860, "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"),
    "w600k_mbf": (13_616_099, "9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f"),
    "glintr100": (260_665_334, "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"),
    "auraface": (260_694_151, "a7933ea5330113b01c9b60351d8f4c33003f145d8470ac5f0e52ee2effe25c60"),
}
"""Bytes and sha256 of the files of insightface's packs, and of AuraFace."""
IR_SE50 = 175_367_323, "a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28"
"""Bytes and sha256 of facexlib's ArcFace, the recogniser of the ID loss."""
IR_SE50_LICENCE = "code MIT; weights trained on MS-Celeb-1M: non-commercial research only"
LICENCES = {sha: "Apache-2.0" if name == "auraface" else INSIGHTFACE_LICENCE for name, (_, sha) in PACK_FILES.items()}
LICENCES[IR_SE50[1]] = IR_SE50_LICENCE
"""sha256 -> licence: whatever folder a file lies in, the hash tells its licence."""

_DEPTH = 0.5
"""How far the tip of a nose stands out, in distances between the eyes."""


def pose(kps: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """Yaw, pitch and roll (N,), degrees, that five points (N, 5, 2) suggest; NaN where they suggest none.

    Yaw is positive where the nose points to the image's right, pitch where it points down, roll clockwise. The nose is
    taken to stand out by half the distance of the eyes, over the proportions of ArcFace's template: good to about 10°.
    """
    template = np.array(ARCFACE_TEMPLATE)
    eyes = (template[1] - template[0])[0]
    nose, mouth = ((template[at].mean(axis=0) - template[:2].mean(axis=0))[1] / eyes for at in ([2], [3, 4]))
    with np.errstate(all="ignore"):
        middle, across = kps[:, :2].mean(axis=1), kps[:, 1] - kps[:, 0]
        distance = np.hypot(*across.T)
        right = across / distance[:, None]
        down = np.stack([-right[:, 1], right[:, 0]], axis=1)
        to_nose, to_mouth = kps[:, 2] - middle, kps[:, 3:].mean(axis=1) - middle
        yaw = np.arctan2((to_nose * right).sum(axis=1) / distance, _DEPTH)
        length = (to_mouth * down).sum(axis=1)
        pitch = np.arctan2((to_nose * down).sum(axis=1) / length * mouth - nose, _DEPTH)
        roll = np.where(distance > 0, np.arctan2(across[:, 1], across[:, 0]), np.nan)
    return np.degrees(yaw), np.degrees(pitch), np.degrees(roll)
