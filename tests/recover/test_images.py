"""Images that every step of distillation sees anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError, Recovery
from lowrank.recover.blocks import distill
from lowrank.recover.images import are_images, changed, images_in, mirrored, shifted
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


def test_what_counts_as_images() -> None:
    images = torch.zeros(2, 3, 8, 8)
    labelled = {"pixel_values": images, "labels": torch.tensor([1, 2]), "return_dict": True}
    assert images_in(labelled) is images
    assert are_images([images, labelled])
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
    assert not are_images([images, none[0]])
    assert not are_images([])


@pytest.mark.parametrize("options", [{"augment": True}, {"augment": 2, "distill_steps": 3}])
def test_images_are_changed_for_distillation_alone(options: dict[str, Any]) -> None:
    with pytest.raises(LowrankError, match="whether distillation changes its images"):
        Recovery(**options)


def test_the_report_says_what_was_distilled_on() -> None:
    torch.manual_seed(0)
    wide, head = nn.Linear(288, 40), nn.Linear(40, 5)
    effort = Recovery(refit=False, distill_steps=2, augment=True)
    how: dict[str, Any] = {"method": "svd", "policy": "uniform", "effort": effort}
    for channels, said in ((8, "distilled on the data as it is"), (4, "mirrored and shifted")):
        net = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.Flatten(), wide, nn.ReLU(), head).eval()
        data = [torch.randn(24, channels, 8, 8)]
        _, report = lowrank.compress(net, 0.6, data=data, copy=True, progress=False, **how)
        assert any(said in note for note in report.notes)


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
