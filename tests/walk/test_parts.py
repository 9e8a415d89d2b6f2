"""Fused weights as layers for a while: in every net, and as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank.nn.unfused import Unfused
from lowrank.walk.coverage import uncovered
from lowrank.walk.parts import join_parts, parts_apart, separate_parts
from lowrank.walk.sites import find_sites
from lowrank.walk.surgery import copied

from ..fused import NETS, net
from ..mixtures import mixture
from ..zoo import unchanged

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("name", NETS)
def test_every_matrix_is_a_site_inside_and_all_is_as_before_afterwards(name: str) -> None:
    model, data = net(name)
    with torch.no_grad():
        expected = model(data)
    with unchanged(model):
        before = dict(model.named_parameters())
        with separate_parts(model):
            sites = find_sites(model)
            assert not uncovered(model, sites)
            assert not [site.name for site in sites if site.reason]
            found = model(data)
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(after[key] is before[key] for key in before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_inside_of_another_context_nothing_happens() -> None:
    model, _ = net("LSTM")
    with separate_parts(model):
        with separate_parts(model):
            pass
        assert isinstance(model.rnn, Unfused)
    assert type(model.rnn) is nn.LSTM


def test_an_interrupt_while_splitting_puts_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowrank.walk import experts

    model = nn.ModuleList([mixture("Mixtral"), nn.LSTM(4, 6)])
    layout, calls = experts._layout, []

    def interrupted(*args: object) -> object:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return layout(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(experts, "_layout", interrupted)
    model.append(mixture("GptOss"))
    with unchanged(model), pytest.raises(KeyboardInterrupt), separate_parts(model):
        pass
    assert len(calls) == 2
    assert not [m for m in model.modules() if isinstance(m, Unfused)]


def test_a_copy_made_inside_is_joined_where_asked() -> None:
    model, _ = net("Transformer")
    with separate_parts(model):
        copy = copied(model)
    join_parts(copy)
    assert list(copy.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(copy.state_dict()[key], value)


def test_what_is_no_model_is_passed_on() -> None:
    assert parts_apart(lambda model: model)("folder") == "folder"  # type: ignore[arg-type]
