"""Where a face lies in a picture, by its five points, as ArcFace's alignment has it; in torch."""

import torch
from torch import Tensor
from torch.nn import functional

from schemas.arcface import ARCFACE_SIZE, ARCFACE_TEMPLATE


def similarity_transform(kps: Tensor) -> tuple[Tensor, Tensor]:
    """The scaled rotation (B, 2, 2) and shift (B, 1, 2) that bring points (B, 5, 2) closest to the ArcFace template.

    Umeyama's least-squares solution, which needs no decomposition in the plane: a point times a complex number. For
    row vectors: `kps @ rotation + shift`.
    """
    template = torch.tensor(ARCFACE_TEMPLATE, device=kps.device)
    centre, goal = kps.mean(1, keepdim=True), template.mean(0)
    points, goals = kps - centre, template - goal
    (x, y), (u, v) = points.unbind(-1), goals.unbind(-1)
    size = (x * x + y * y).sum(1).clamp_min(1e-6)
    cos, sin = (x * u + y * v).sum(1) / size, (x * v - y * u).sum(1) / size
    rotation = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    return rotation, goal - centre @ rotation


def align(pixels: Tensor, kps: Tensor) -> Tensor:
    """Faces as ArcFace sees them, insightface's `norm_crop` as a differentiable operation.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        kps: (B, 5, 2) in pixels of these images, the centre of the first pixel at (0, 0).

    Returns:
        (B, 3, 112, 112) in [-1, 1], black outside the image.
    """
    height, width = pixels.shape[-2:]
    rotation, shift = similarity_transform(kps.to(pixels.device, torch.float32))
    axis = torch.arange(ARCFACE_SIZE, dtype=torch.float32, device=pixels.device)
    crop = torch.cartesian_prod(axis, axis).flip(1)
    scale = rotation[:, :1].square().sum(2, keepdim=True).clamp_min(1e-12)
    points = (crop - shift) @ rotation.mT / scale
    grid = 2 * points / torch.tensor([width - 1, height - 1], device=pixels.device) - 1
    grid = grid.view(-1, ARCFACE_SIZE, ARCFACE_SIZE, 2)
    return functional.grid_sample(pixels.float() + 1, grid, padding_mode="zeros", align_corners=True) - 1


def in_face(kps: Tensor, size: tuple[int, int], step: int) -> Tensor:
    """(B, height, width): which cells of a grid over an image have their middle in the square that `align` cuts out.

    `kps` are as `align` takes them; `size` is the grid's height and width in cells, `step` the side of a cell, pixels.
    """
    rotation, shift = similarity_transform(kps)
    down, right = (torch.arange(count) * step + (step - 1) / 2 for count in size)
    middles = torch.cartesian_prod(down, right).flip(1)
    inside = (middles @ rotation + shift + 0.5).sub(ARCFACE_SIZE / 2).abs() <= ARCFACE_SIZE / 2
    return inside.all(-1).view(-1, *size)
