"""Convolutional networks go through all verbs: plan, compress, efforts, files, back to dense."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank
from lowrank import LowrankError, Plan, Recovery
from lowrank.nn import ChannelConv, LowRankLinear, SpatialConv, TuckerConv

from .nets import Residual, images, small_net
from .zoo import Custom

FEW = Recovery(block_steps=3, distill_steps=3)


FORMS = (ChannelConv, TuckerConv, SpatialConv)


def factored_convs(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, FORMS)]


def test_one_line_without_data_and_with() -> None:
    net, x = small_net(), images(4, seed=1)
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for data in (None, [images(24)]):
        lean, report = lowrank.compress(net, 0.6, data=data, align=1, copy=True, progress=False)
        assert report.achieved <= 0.6
        assert len(factored_convs(lean)) >= (6 if data else 4)
        counted = sum(p.numel() for n, p in lean.named_parameters() if not n.endswith("bias"))
        assert report.params_after == sum(p.numel() for p in lean.parameters())
        assert counted < sum(p.numel() for p in net.parameters())
        assert lean(x).shape == (4, 5)
        assert "whitened" in str(report) if data else "svd" in str(report)
    assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())


def test_the_default_policy_is_that_which_serves_convolutions() -> None:
    net = small_net()
    plan = lowrank.plan(net, 0.6, data=None, progress=False)
    assert plan.settings["policy"] == "spectrum"
    linear = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Conv2d(1, 1, 3))
    assert lowrank.plan(linear, 0.6, data=None, progress=False).settings["policy"] == "uniform"


def test_with_data_the_default_policy_is_judged() -> None:
    """By rows held out from the statistics, as if it had been named."""
    net, data = small_net(), [images(64)]
    made = lowrank.plan(net, 0.6, data=data, progress=False)
    assert made.settings["policy"] == "lossaware"
    named = lowrank.plan(net, 0.6, policy="lossaware", data=data, progress=False)
    assert made.entries == named.entries
    (point,) = lowrank.sweep(net, [0.6], data=data, progress=False).points
    assert point.plan.entries == made.entries


def test_where_nothing_can_be_judged_the_default_policy_adds_errors() -> None:
    net, x = small_net(), images(24)
    made = lowrank.plan(net, 0.6, data=lambda m: m(x), progress=False)
    assert made.settings["policy"] == "spectrum"
    boxes = Custom(lambda self, x: {"boxes": self.net(x).tolist()}, net=net)  # no tensors
    assert lowrank.plan(boxes, 0.6, data=[x], progress=False).settings["policy"] == "spectrum"
    half = Custom(lambda self, x: self.net.stage1(self.net.stem(x)), net=net)
    made = lowrank.plan(half, 0.6, data=[x], on_missing="data-free", progress=False)
    assert made.settings["policy"] == "uniform"  # errors of weights and of outputs do not add up


@pytest.mark.parametrize("ratio", [0.8, 0.6])
def test_data_are_never_worse_than_none_by_default(ratio: float) -> None:
    """One layer needs all of its ranks and the other few: uniform shares break the first."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(8, 16, 1, bias=False), nn.Conv2d(16, 64, 3, padding=1, bias=False)
    with torch.no_grad():
        low = torch.randn(64, 4) @ torch.randn(4, 144) + 0.02 * torch.randn(64, 144)
        second.weight.copy_(low.view(64, 16, 3, 3) / 8)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *pool, nn.Linear(64, 10)).eval()
    data, x = [torch.randn(64, 8, 6, 6)], torch.randn(64, 8, 6, 6)
    away = {}
    for name, way in {"none": {"data": None}, "data": {"data": data}}.items():
        small, _ = lowrank.compress(net, ratio, copy=True, progress=False, **way)
        away[name] = lowrank.kl(small, net, [x])
    uniform, _ = lowrank.compress(
        net, ratio, policy="uniform", data=data, copy=True, progress=False
    )
    assert away["data"] <= away["none"] < lowrank.kl(uniform, net, [x])


def test_data_make_the_outputs_nearer() -> None:
    net, x = small_net(), images(64, seed=5)
    off = {}
    for method in ("svd", "whitened"):
        lean, _ = lowrank.compress(
            net, 0.5, method=method, data=[images(64)], align=1, copy=True, progress=False
        )
        off[method] = lowrank.kl(lean, net, [x])
    assert off["whitened"] < off["svd"]


@pytest.mark.parametrize("effort", ["fast", FEW])
def test_every_stage_serves_convolutions(effort) -> None:
    net = small_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    own = {"policy": "uniform"} if effort is FEW else {}  # "fast" tries several allocations
    lean, report = lowrank.compress(
        net, 0.6, data=[images(96)], effort=effort, copy=True, progress=False, **own
    )
    assert report.achieved <= 0.6
    assert any("refitted in closed form" in note for note in report.notes)
    if effort is FEW:
        assert any("4 blocks improved" in note for note in report.notes)
        assert any(note.startswith("distilled") for note in report.notes)
    assert factored_convs(lean)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_the_refit_helps_on_what_it_did_not_see() -> None:
    net, data, x = small_net(), [images(256)], images(256, seed=9)
    plain, _ = lowrank.compress(
        net, 0.4, method="whitened", policy="uniform", data=data, align=1, copy=True,
        progress=False,
    )  # fmt: skip
    plan = lowrank.plan(
        net, 0.4, method="whitened", policy="uniform", storage="factors", data=data, align=1,
        effort=Recovery(), progress=False,
    )  # fmt: skip
    fitted, _ = lowrank.compress(net, plan, data=data, copy=True, progress=False)
    assert lowrank.kl(fitted, net, [x]) < 0.9 * lowrank.kl(plain, net, [x])


def test_files_and_back_to_dense(tmp_path: Path) -> None:
    net, x = small_net(), images(4, seed=1)
    lean, _ = lowrank.compress(net, 0.6, data=[images(24)], copy=True, progress=False)
    lowrank.save(lean, tmp_path)
    loaded = lowrank.load(tmp_path, small_net(seed=3)).eval()
    assert factored_convs(loaded) == factored_convs(lean)
    with torch.no_grad():
        assert torch.equal(loaded(x), lean(x))
        dense = lowrank.to_dense(copy.deepcopy(lean))
        torch.testing.assert_close(dense(x), lean(x), rtol=1e-4, atol=1e-5)
    assert {n: type(m) for n, m in dense.named_modules()} == {
        n: type(m) for n, m in net.named_modules()
    }
    assert dense.stage2[0].conv1.stride == (2, 2)
    other = small_net()
    other.stage2[0].conv1 = nn.Conv2d(8, 12, 3, 1, 1, bias=False)
    with pytest.raises(LowrankError, match=r"stage2\.0\.conv1: stored as"):
        lowrank.load(tmp_path, other)


def test_plans_are_text() -> None:
    net = small_net()
    plan = lowrank.plan(net, 0.5, data=None, progress=False)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    edited = plan.edit({"stage1.0.conv1": 2})
    lean, report = lowrank.apply(net, edited, data=None, copy=True, progress=False)
    assert lean.stage1[0].conv1.rank == 2
    assert report.params_after < sum(p.numel() for p in net.parameters())


def test_one_budget_over_convolutions_and_linears() -> None:
    net = nn.Sequential(
        nn.Conv2d(6, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, 40)
    )
    lean, report = lowrank.compress(
        net, 0.5, policy="spectrum", target_modules="all", data=None, progress=False
    )
    assert isinstance(lean[0], ChannelConv | nn.Conv2d)
    assert isinstance(lean[4], LowRankLinear)
    assert report.achieved <= 0.5


def test_what_stays_dense_says_why() -> None:
    class Odd(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.flip(-1))

    class Own(nn.Conv2d):
        pass

    net = nn.ModuleDict({
        "grouped": nn.Conv2d(8, 8, 3, groups=2),
        "depthwise": nn.Conv2d(8, 8, 3, groups=8),
        "transposed": nn.ConvTranspose2d(8, 8, 3),
        "small": nn.ConvTranspose2d(2, 8, 3),
        "normed": nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3)),
        "odd": Odd(8, 8, 3),
        "own": Own(8, 8, 3),
        "plain": nn.Conv2d(8, 8, 3),
    })  # fmt: skip
    plan = lowrank.plan(net, 0.6, data=None, progress=False)
    said = {entry.name.partition(".")[0]: entry.reason for entry in plan.entries}
    assert "2 groups of 4 channels" in said["grouped"]
    assert "8 groups of 1 channels" in said["depthwise"]
    assert "72 by 2 is too small" in said["small"]
    assert said["transposed"] == ""
    assert "parametrized" in said["normed"]
    assert "Odd does not compute what its base nn.Conv2d does" in said["odd"]
    assert said["plain"] == said["own"] == ""


def test_a_convolution_used_twice_is_one_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x).relu())

    net, x = Twice(), torch.randn(6, 8, 6, 6)
    seen = lowrank.calibrate(net, [x], progress=False)
    assert seen.statistics["conv"].count == 2 * 6 * 36
    lean, report = lowrank.compress(net, 0.6, data=seen, copy=True, progress=False)
    assert isinstance(lean.conv, FORMS)
    assert len(report.plan.entries) == 1
    with torch.no_grad():
        assert lean(x).shape == x.shape


def test_a_rank_above_the_break_even_is_refused() -> None:
    with pytest.raises(LowrankError, match=r"rank must be in \[1, 8\] for stage1\.0\.conv1"):
        lowrank.compress(
            small_net(), rank_pattern={"stage1.0.conv1": 9}, data=None, copy=True, progress=False
        )


def test_half_precision_on_the_cpu() -> None:
    net = Residual(8, 8).half().eval()
    x = torch.randn(4, 8, 6, 6).half()
    lean, _ = lowrank.compress(net, 0.6, data=[x], copy=True, progress=False)
    assert {p.dtype for p in lean.parameters()} == {torch.float16}
    with torch.no_grad():
        assert bool(torch.isfinite(lean(x)).all())


def test_channels_last_is_no_obstacle() -> None:
    net, x = small_net(), images(24)
    want, _ = lowrank.compress(net, 0.6, data=[x], copy=True, progress=False)
    moved = small_net().to(memory_format=torch.channels_last)
    got, _ = lowrank.compress(
        moved, 0.6, data=[x.to(memory_format=torch.channels_last)], copy=True, progress=False
    )
    with torch.no_grad():
        torch.testing.assert_close(got(x), want(x), rtol=1e-3, atol=1e-4)


def test_looking_at_convolutions() -> None:
    net = small_net()
    found = lowrank.inspect(net, [images(8)], progress=False)
    site = found["stage2.0.conv1"]
    assert site.shape == (12, 72)
    assert site.output is not None
    assert site.factored_ms is not None
    measured = lowrank.sensitivity(net, [images(8, seed=2)], ratios=[0.5], progress=False)
    assert len(measured.sites) == 9  # without the stem and the head
    assert (
        "few channels of an image"
        in lowrank.plan(net, 0.5, data=None, progress=False).entries[0].reason
    )
    assert bool((measured.kl[:, 0].nan_to_num() >= 0).all())
    swept = lowrank.sweep(net, [0.8, 0.5], data=[images(32)], progress=False)
    assert [p.kl is not None for p in swept.points] == [True, True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_graphs_say_the_same(tmp_path: Path) -> None:
    """torch.export and ONNX of a compressed network, also for another number of images."""
    runtime = pytest.importorskip("onnxruntime", reason="extra: lowrank[onnx]")
    lean, _ = lowrank.compress(small_net(), 0.6, data=[images(24)], align=1, progress=False)
    lean.train()
    for name in ("torch.export", "onnx"):
        lowrank.export(lean, tmp_path, name, example=images(2))
    assert lean.training
    lean.eval()
    x = images(5, seed=4)
    with torch.no_grad():
        want = lean(x)
        program = torch.export.load(tmp_path / "model.pt2").module()
        torch.testing.assert_close(program(x), want, rtol=1e-5, atol=1e-5)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-5, atol=1e-5)

    class Branching(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(LowrankError, match="Branching cannot be traced"):
        lowrank.export(Branching(), tmp_path, "torch.export", example=images(2))
