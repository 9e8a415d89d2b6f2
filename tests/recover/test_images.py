"""Images that every step of distillation sees anew."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from lowrank.recover.blocks import distill
from lowrank.recover.images import are_images, blended, changed, images_in, mirrored, shifted
from lowrank.recover.training import Training


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shifted_images_are_windows_of_the_image_with_mirrored_edges() -> None:
    """By NumPy: up to two of sixteen rows and one of eight columns, every place alike often."""
    images = torch.randn(300, 2, 16, 8, generator=draw())
    wide = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (1, 1)), mode="reflect")
    seen = dict.fromkeys(((i, j) for i in range(5) for j in range(3)), 0)
    for row, new in zip(wide, shifted(images, draw(1)).numpy(), strict=True):
        (place,) = (p for p in seen if np.array_equal(row[:, p[0] :, p[1] :][:, :16, :8], new))
        seen[place] += 1
    assert min(seen.values()) > 5
    assert max(seen.values()) < 45


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.randn(200, 1, 8, 9, generator=draw())
    new = mirrored(images, draw(1))
    turned = sum(torch.equal(n, x.flip(-1)) for n, x in zip(new, images, strict=True))
    kept = sum(torch.equal(n, x) for n, x in zip(new, images, strict=True))
    assert turned + kept == 200
    assert 70 < turned < 130


def test_blends_are_of_two_images_in_any_shares() -> None:
    images = torch.eye(64).view(64, 1, 8, 8)
    shares = blended(images, draw()).view(64, 64)
    torch.testing.assert_close(shares.sum(1), torch.ones(64))
    assert int((shares > 0).sum(1).max()) == 2
    own = shares.diagonal()[(shares > 0).sum(1) == 2]
    assert len(own) > 50
    assert float(own.min()) < 0.1
    assert float(own.max()) > 0.9


def test_what_counts_as_images() -> None:
    images, norm = torch.zeros(2, 3, 8, 8), nn.BatchNorm2d(3)
    labelled = {"pixel_values": images, "labels": torch.tensor([1, 2]), "return_dict": True}
    assert images_in(labelled) is images
    assert are_images(norm, [images, labelled])
    new = changed({**labelled, "pixel_values": torch.rand(2, 3, 8, 8)}, draw())
    assert isinstance(new, dict)
    assert new["labels"] is labelled["labels"]
    assert new["pixel_values"].shape == images.shape
    none: list[Tensor | dict[str, Tensor]] = [
        torch.zeros(2, 64, 8, 8),  # hidden states
        torch.zeros(2, 1, 80, 3),  # a strip
        torch.zeros(2, 3, 8, 8, dtype=torch.long),
        torch.zeros(2, 8, 8),
        {"pixel_values": images, "boxes": torch.zeros(2, 4)},
    ]
    assert [images_in(batch) for batch in none] == [None] * 5
    assert not are_images(norm, [images, none[0]])
    assert not are_images(nn.LayerNorm(8), [images])


def test_each_step_sees_other_images_and_states_are_judged_on_the_data() -> None:
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))
        for _ in range(2)
    ]
    teacher, student = (net.eval() for net in nets)
    data = [torch.randn(4, 1, 8, 8) for _ in range(3)]
    seen: list[tuple[bool, Tensor]] = []
    student.register_forward_hook(lambda _, x, __: seen.append((torch.is_grad_enabled(), x[0])))
    for vary in (False, True):
        seen.clear()
        options = Training(steps=6, rate=0.01, vary=vary)
        distill(teacher, student, data, list(student.parameters()), options)
        steps = [x for training, x in seen if training]
        known = [any(torch.equal(x, batch) for batch in data) for x in steps]
        assert known == [not vary] * 6
        assert len({float(x.sum()) for x in steps}) == (6 if vary else 2)
        assert all(torch.equal(x, data[2]) for training, x in seen if not training)
