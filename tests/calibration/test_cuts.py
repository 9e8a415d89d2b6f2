"""Where models cut what layers return: seen by their use, whatever their names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank


class Net(nn.Module):
    """A layer of twelve outputs, and what a model does with them."""

    def __init__(self, use: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.fused, self.last = nn.Linear(6, 12), nn.Linear(12, 12)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        y = self.fused(x)
        self.use(y)
        output: Tensor = self.last(y)
        return output


USES: dict[str, tuple[Callable[[Tensor], object], tuple[int, ...] | None]] = {
    "split in sizes": (lambda y: y.split([6, 2, 4], dim=-1), (6, 2, 4)),
    "split in equal sizes": (lambda y: torch.split(y, 4, dim=2), (4, 4, 4)),
    "chunk": (lambda y: y.chunk(2, dim=-1), (6, 6)),
    "chunk of the last axis by keyword": (lambda y: torch.chunk(y, 3, dim=-1), (4, 4, 4)),
    "slices": (lambda y: (y[..., :8], y[..., 8:10], y[..., 10:]), (8, 2, 2)),
    "slices of every axis": (lambda y: (y[:, :, :5], y[:, :, 5:]), (5, 7)),
    "narrow": (lambda y: y.narrow(-1, 3, 5), (3, 5, 4)),
    "features in another axis": (lambda y: y.transpose(1, 2).chunk(2, dim=1), (6, 6)),
    "transposed twice": (lambda y: y.transpose(0, 2).transpose(2, 0).chunk(2, dim=2), (6, 6)),
    "other axes": (lambda y: (y.chunk(2, dim=1), y[:, :2], y[0], y[..., 3]), None),
    "every second": (lambda y: y[..., ::2], None),
    "heads interleaved by a view": (lambda y: y.unflatten(-1, (3, 4)).chunk(2, dim=-1), None),
    "something computed": (lambda y: (y + 1).chunk(2, dim=-1), None),
    "too many": (lambda y: y.split(1, dim=-1), None),
    "nothing": (lambda y: y, None),
}


@pytest.mark.parametrize("name", USES)
def test_what_a_model_cuts(name: str) -> None:
    use, sizes = USES[name]
    torch.manual_seed(0)
    found = lowrank.calibrate(Net(use), [torch.randn(2, 5, 6)], progress=False)
    assert found.observation.cuts == ({} if sizes is None else {"fused": sizes})


def test_cuts_are_kept_in_files(tmp_path) -> None:
    net = Net(USES["slices"][0])
    found = lowrank.calibrate(net, [torch.randn(2, 5, 6)], progress=False)
    lowrank.save_calibration(found, tmp_path / "kept", net)
    loaded = lowrank.load_calibration(tmp_path / "kept", net)
    assert loaded.observation.cuts == {"fused": (8, 2, 2)}
