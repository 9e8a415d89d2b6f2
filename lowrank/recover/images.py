"""Images that every step of distillation sees anew: mirrored and shifted.

A network learns a few thousand images by heart, and is no nearer to the dense one on others. The
dense network says what it sees in any image, so that these need no labels (the same views for both
networks: Beyer et al., arXiv 2106.05237).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..calibration.batches import Batch, is_dense

CHANNELS = 4  # at most, of an image; see walk/heads.py
SHIFT = 1 / 8  # of a side, at most
LEAST = 8  # pixels of a side: less is no image


def are_images(batches: Sequence[Batch]) -> bool:
    """Whether all batches hold images, and nothing else but labels."""
    return bool(batches) and all(images_in(batch) is not None for batch in batches)


def images_in(batch: Batch) -> Tensor | None:
    """The only tensor of a batch beside labels, if it is one of images: (rows, channels, height,
    width)."""
    parts = batch.items() if isinstance(batch, Mapping) else [("", batch)]
    tensors = [part for key, part in parts if key != "labels" and isinstance(part, Tensor)]
    if len(tensors) != 1 or tensors[0].ndim != 4 or not is_dense(tensors[0]):
        return None
    images = tensors[0]
    few = 1 <= images.shape[1] <= CHANNELS and min(images.shape[2:]) >= LEAST
    return images if few and images.is_floating_point() else None


def changed(batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with other images: each mirrored or not, and shifted.

    Args:
        batch: one of which `images_in` finds the images.
    """
    images = images_in(batch)
    assert images is not None
    new = shifted(mirrored(images, generator), generator)
    if isinstance(batch, Mapping):
        return {key: new if value is images else value for key, value in batch.items()}
    return new


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every other image, on average, with left and right exchanged."""
    chosen = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to an eighth of a side, whole pixels; what comes in is mirrored."""
    count, _, *sides = images.shape
    for axis, side in zip((2, 3), sides, strict=True):
        most = int(SHIFT * side)
        wide = pad(images, (0, 0, most, most) if axis == 2 else (most, most, 0, 0), mode="reflect")
        start = torch.randint(0, 2 * most + 1, (count, 1), generator=generator)
        places = (start + torch.arange(side)).to(images.device)
        shape = (count, 1, side, 1) if axis == 2 else (count, 1, 1, side)
        index = places.view(shape).expand(images.shape)
        images = wide.gather(axis, index)
    return images
