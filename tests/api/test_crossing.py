"""Whatever measures or makes layers does the same to them: plan, compress, apply, sweep, the probe
of a policy, and sensitivity."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Calibration, calibrate
from lowrank.policies import Uniform
from lowrank.types import Allocation, Budget, Curve, Probe
from tests import zoo
from tests.nets import images, small_net

RATIO = 0.5


class Half(nn.Module):
    """Two branches, of which data reaches one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(12, 20), nn.Linear(12, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.spare if float(x.detach().sum()) > 1e6 else self.used)(x).relu())


def half() -> nn.Module:
    torch.manual_seed(0)
    return Half().eval()


def vectors(count: int, seed: int) -> Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def ids(count: int, seed: int) -> Tensor:
    return torch.randint(2, 60, (count, 12), generator=torch.Generator().manual_seed(seed))


class Setting(NamedTuple):
    make: Callable[[], Any]
    rows: Callable[[int, int], Tensor]
    asked: dict[str, Any]
    lone: str  # the layer, or the leader of a group, that sensitivity looks at
    group: tuple[str, ...] = ()


LLAMA = ("model.layers.0.self_attn.",)
SETTINGS = {
    "linears": Setting(
        zoo.llama, ids, {"method": "whitened"}, "model.layers.0.mlp.up_proj"
    ),
    "linears, two-sided": Setting(
        zoo.llama, ids, {"method": "two-sided"}, "model.layers.1.mlp.down_proj"
    ),
    "convolutions": Setting(small_net, images, {"method": "two-sided"}, ""),
    "convolutions, one form": Setting(small_net, images, {"method": "whitened-tucker"}, ""),
    "convolutions, no data": Setting(small_net, images, {"method": "tucker"}, ""),
    "embedding": Setting(
        zoo.llama, ids, {"method": "head-aware", "target_modules": ["embed_tokens"]},
        "model.embed_tokens",
    ),
    "groups": Setting(
        zoo.llama, ids, {"method": "basis-sharing"}, "model.layers.0.self_attn.q_proj",
        ("q_proj", "k_proj", "v_proj"),
    ),
    "unreached": Setting(
        half, vectors, {"method": "whitened", "on_missing": "data-free"}, "spare"
    ),
    "unreached, other forms": Setting(
        half, vectors, {"method": "two-sided", "on_missing": "data-free"}, "spare"
    ),
}  # fmt: skip


@dataclass
class Asking:
    """Uniform, and what the probe says of it."""

    said: list[float] = field(default_factory=list)
    judges = True

    def __call__(self, curves: Sequence[Curve], budget: Budget, probe: Probe | None) -> Allocation:
        assert probe is not None
        chosen = Uniform()(curves, budget)
        self.said.append(probe(chosen))
        return chosen


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    return SETTINGS[request.param]


@pytest.fixture
def model(setting: Setting) -> Any:
    torch.manual_seed(0)
    return setting.make().eval()


@pytest.fixture
def calibration(setting: Setting, model: nn.Module) -> Calibration:
    return calibrate(model, setting.rows(48, 0), hold_out=0.25, progress=False)


def state(model: nn.Module) -> dict[str, bytes]:
    return {k: v.contiguous().numpy().tobytes() for k, v in model.state_dict().items()}


def test_all_verbs_give_one_result(
    setting: Setting, model: nn.Module, calibration: Calibration
) -> None:
    asked: dict[str, Any] = {**setting.asked, "data": calibration, "progress": False}
    asked["align"], dense = 1, copy.deepcopy(model)  # what is rounded is rounded after the policy
    asked["policy"] = "uniform"
    plan = lowrank.plan(model, RATIO, **asked)
    small, report = lowrank.compress(copy.deepcopy(model), RATIO, **asked)
    assert report.plan.entries == plan.entries
    applied, _ = lowrank.apply(copy.deepcopy(model), plan, data=calibration, progress=False)
    assert state(applied) == state(small)
    (point,) = lowrank.sweep(model, [RATIO], **asked).points
    assert point.plan.entries == plan.entries
    assert [s.measured for s in point.report.sites] == [s.measured for s in report.sites]
    held = lowrank.kl(small, dense, list(calibration.held_out))
    assert point.kl == held
    asking = Asking()
    judged, _ = lowrank.compress(copy.deepcopy(model), RATIO, **{**asked, "policy": asking})
    assert state(judged) == state(small)
    assert asking.said == [held]


def test_sensitivity_measures_what_compress_does_to_that_layer(
    setting: Setting, model: nn.Module, calibration: Calibration
) -> None:
    asked = {k: v for k, v in setting.asked.items() if k != "target_modules"}
    plan = lowrank.plan(model, RATIO, data=calibration, progress=False, **setting.asked)
    name = setting.lone or next(e.name for e in plan.entries if e.kind == "conv" and e.size)
    alone = [name] if not setting.group else [
        f"{name.rpartition('.')[0]}.{member}" for member in setting.group
    ]  # fmt: skip
    dense, held = copy.deepcopy(model), list(calibration.held_out)
    table = lowrank.sensitivity(
        model, held, ratios=[RATIO], calibration=calibration, target_modules=alone,
        progress=False, **asked,
    )  # fmt: skip
    small, report = lowrank.compress(
        model, RATIO, data=calibration, target_modules=alone, progress=False, **asked
    )
    assert len(table.sites) == 1
    entry = next(entry for entry in report.plan.entries if entry.name == table.sites[0])
    assert entry.size is not None
    assert float(table.kl[0, 0]) == lowrank.kl(small, dense, held)
    assert int(table.rank[0, 0]) == entry.size[0]
    assert entry.error is not None
    assert entry.total
    assert float(table.error[0, 0]) == pytest.approx(entry.error / entry.total, rel=1e-12)
