"""2:4 through sparse kernels: who may, and why not; the product itself needs such a device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank.errors import LowrankError
from lowrank.linalg import nm_mask
from lowrank.nn import LowRankMaskedLinear, semi_structured
from lowrank.nn.sparse_kernels import unfit

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def layer(out: int, inner: int, n: int = 2, dtype: torch.dtype = torch.float16) -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    down, up, entries = (
        torch.randn(*shape, generator=rng) / 8 for shape in ((4, inner), (out, 4), (out, inner))
    )
    parts = LowRankMaskedLinear.from_parts(down, up, entries, nm_mask(entries, n, 4), None)
    return parts.to(dtype)


def test_without_such_a_device_it_says_so() -> None:
    with pytest.raises(LowrankError, match="it is on cpu, and the kernels need CUDA"):
        semi_structured(nn.Sequential(layer(32, 64)))
    with pytest.raises(LowrankError, match="none is a LowRankMaskedLinear"):
        semi_structured(nn.Linear(4, 4))


class OnCuda:
    """The sparse part as if it were on such a device."""

    def __init__(self, sparse: nn.Module) -> None:
        self.mask, self.in_features, self.dense = sparse.mask, sparse.in_features, sparse.dense
        self.weight = type("W", (), {"device": torch.device("cuda"), "dtype": sparse.weight.dtype})


@pytest.mark.parametrize(
    ("made", "capability", "said"),
    [
        (layer(32, 64), (8, 0), ""),
        (layer(32, 64), (7, 5), r"capability is (7, 5), and the kernels need (8, 0)"),
        (layer(32, 64, dtype=torch.float32), (9, 0), "dtype is torch.float32"),
        (layer(48, 64), (8, 6), "shape (48, 64) is not a multiple of (32, 64)"),
        (layer(32, 64, n=3), (8, 0), "pattern is not 2:4"),
    ],
)
def test_what_the_kernels_ask_for(
    made: nn.Module, capability: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    found = unfit(OnCuda(made.sparse))  # type: ignore[arg-type]
    assert said in found
    assert bool(said) == bool(found)


@pytest.mark.skipif(not CAPABLE, reason="no CUDA device of capability 8.0 or more")
def test_products_are_those_of_the_layer() -> None:
    model = nn.Sequential(layer(256, 128)).cuda()
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        want = model(x)
        assert semi_structured(model) == 1
        torch.testing.assert_close(model(x), want, rtol=1e-2, atol=1e-2)
    assert "0.sparse.packed" not in model.state_dict()
