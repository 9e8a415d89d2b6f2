"""Running numbers of batch norms: moved by what the data shows, kept only where rows gain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, Recovery
from lowrank.recover import bn_recalibrate
from lowrank.recover.batchnorm import batch_norms, gathered

from ..nets import images, small_net


def numbers(net: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in net.state_dict().items()}


def data() -> list[torch.Tensor]:
    return [images(40), images(24, seed=1)]


def test_a_layer_that_lost_its_scale_gets_it_back() -> None:
    """Half the weight: moments follow exactly, and so do predictions."""
    dense, name = small_net(), "stage1.0.conv1"
    lean = copy.deepcopy(dense)
    lean.get_submodule(name).weight.data.mul_(0.5)
    assert bn_recalibrate(lean, data(), reference=dense, held_out=[images(16, seed=2)])
    norm = next(n for n in batch_norms(dense) if n.startswith("stage1.0.") and n.endswith("bn1"))
    old, new = dense.get_submodule(norm), lean.get_submodule(norm)
    torch.testing.assert_close(new.running_var, 0.25 * old.running_var)
    torch.testing.assert_close(new.running_mean, 0.5 * old.running_mean, atol=1e-6, rtol=1e-5)
    away = lowrank.kl(lean, dense, [images(16, seed=3)])
    lean.get_submodule(norm).load_state_dict(old.state_dict())
    assert away < 0.001 * lowrank.kl(lean, dense, [images(16, seed=3)])


def test_moments_are_pooled_over_batches_of_any_size() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3)).eval()
    x, y = images(5)[:, :3] + 1, 2 * images(11)[:, :3]
    mean, variance = gathered(net, [x, y])["0"]
    rows = torch.cat([x, y]).double().movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(variance, rows.var(0))


def test_a_dense_model_stays_bit_for_bit_and_what_does_harm_is_taken_back() -> None:
    dense = small_net()
    before, flags = numbers(dense), [m.training for m in dense.modules()]
    assert not bn_recalibrate(dense, data(), reference=dense)
    assert all(torch.equal(before[k], v) for k, v in dense.state_dict().items())
    assert [m.training for m in dense.modules()] == flags
    lean = copy.deepcopy(dense)
    lean.get_submodule("stage1.0.conv1").weight.data[:, ::2] = 0
    before = numbers(lean)
    far = [images(1, seed=5).expand(8, -1, -1, -1).clone() - 9]  # unlike what is judged by
    assert not bn_recalibrate(lean, far, reference=dense, held_out=[images(16, seed=2)])
    assert all(torch.equal(before[k], v) for k, v in lean.state_dict().items())


def test_compress_says_what_became_of_the_norms_and_leaves_the_dense_model() -> None:
    net, rows = small_net(), [images(48), images(48, seed=1)]
    before = numbers(net)
    for wanted in (True, False):
        effort = Recovery(batchnorm=wanted)
        lean, report = lowrank.compress(
            net, 0.5, policy="uniform", data=rows, effort=effort, copy=True, progress=False
        )
        assert any("batch norms" in note for note in report.notes) is wanted
        assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
        moved = [
            n for n, part in batch_norms(lean).items()
            if not torch.equal(part.running_var, net.get_submodule(n).running_var)
        ]  # fmt: skip
        said = any("re-estimated: kept" in note for note in report.notes)
        assert bool(moved) is (said and not any("made it worse" in n for n in report.notes))


def test_bad_input() -> None:
    net = small_net()
    with pytest.raises(LowrankError, match="needs batches to run the models on"):
        bn_recalibrate(net, lambda model: model(images(2)), reference=net)
    linear = nn.Linear(3, 2)
    with pytest.raises(LowrankError, match="no batch norm with running statistics in common"):
        bn_recalibrate(linear, [torch.randn(4, 3)], reference=linear)
