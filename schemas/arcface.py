"""An aligned face as ArcFace's recognisers expect it; shared by who embeds faces and who trains against them."""

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
