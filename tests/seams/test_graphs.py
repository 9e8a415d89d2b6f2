"""torch's own ways to a graph: what traces, and what says that it cannot."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from tests.nets import images, small_net
from tests.zoo import mlp

DATA = [torch.randn(64, 24, generator=torch.Generator().manual_seed(0))]
FORMS: dict[str, dict[str, Any]] = {
    "factors": {"data": None},
    "pivoted": {"data": None, "storage": "pivoted"},
    "columns": {"method": "lowrank-sparse"},
    "entries": {"method": "lowrank-masked"},
    "2:4": {"method": "lowrank-2:4"},
    "coded": {"method": "dense-sparse"},
    "blast": {"method": "blast"},
    "convolutions": {"data": None},
    "table": {"data": None, "target_modules": "all"},
}
BY_FX = {"factors", "pivoted", "convolutions", "table"}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Shortcuts ask for sizes, and are not taken while tracing.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@cache
def built(form: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    nets = {"convolutions": small_net, "table": lambda: nn.Sequential(nn.Embedding(50, 32))}
    inputs = {"convolutions": images(2), "table": torch.arange(6).view(2, 3)}
    net = nets.get(form, lambda: mlp(24, 40, 16))()
    options = {"data": DATA, "progress": False, **FORMS[form]}
    return lowrank.compress(net, 0.6, **options)[0].eval(), inputs.get(form, DATA[0][:5])


@pytest.mark.parametrize("form", FORMS)
def test_traced_and_exported(form: str) -> None:
    net, x = built(form)
    with torch.no_grad():
        want = net(x)
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), want)
        traced = torch.jit.trace(net, x)
        for some in (x, x.repeat(200, *[1] * (x.ndim - 1)), x[:1]):  # other ways than when traced
            torch.testing.assert_close(traced(some), net(some))


@pytest.mark.parametrize("form", FORMS)
def test_by_fx_or_refused(form: str) -> None:
    net, x = built(form)
    if form in BY_FX:
        with torch.no_grad():
            torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))
        return
    with pytest.raises(LowrankError, match=r"torch\.fx cannot trace a \w+: use torch\.jit\.trace"):
        torch.fx.symbolic_trace(net)


@pytest.mark.parametrize("form", FORMS)
def test_scripting_says_what_works(form: str) -> None:
    with pytest.raises(
        LowrankError, match=r"cannot be scripted: use torch\.jit\.trace or torch\.e"
    ):
        torch.jit.script(built(form)[0])
