"""Images that every step of distillation sees anew: mirrored, shifted and mixed.

A network learns a few thousand images by heart, and is no nearer to the dense one on others. The
dense network says what it sees in any image, so that these need no labels, and may be blends of two
(Beyer et al., arXiv 2106.05237).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..calibration.batches import Batch, is_dense
from ..walk.layouts import keeps_moments

CHANNELS = 4  # at most, of an image; see walk/heads.py
SHIFT = 1 / 8  # of a side, at most
LEAST = 8  # pixels of a side: less is no image


def are_images(model: nn.Module, batches: Sequence[Batch]) -> bool:
    """Whether the batches hold images for a model with batch norms, and nothing else but labels."""
    found = any(map(keeps_moments, model.modules()))
    return found and bool(batches) and all(images_in(batch) is not None for batch in batches)


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
    """The batch with other images: each mirrored or not, shifted, and blended with another.

    Args:
        batch: one of which `images_in` finds the images.
    """
    images = images_in(batch)
    assert images is not None
    new = blended(shifted(mirrored(images, generator), generator), generator)
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


def blended(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mixed with another of the batch, by any share (mixup, arXiv 1710.09412)."""
    share = torch.rand(len(images), generator=generator).to(images)[:, None, None, None]
    other = images[torch.randperm(len(images), generator=generator).to(images.device)]
    return share * images + (1 - share) * other
