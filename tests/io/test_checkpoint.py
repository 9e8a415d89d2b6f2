"""save and load for any nn.Module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lowrank.errors import LowrankError
from lowrank.io import load, save
from lowrank.nn import LowRankLinear

WEIGHTS, INDEX = "model.safetensors", "lowrank.json"


def x() -> torch.Tensor:
    return torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_is_exact(net: nn.Module, zoo, tmp_path: Path, dtype: torch.dtype) -> None:
    net.to(dtype)
    save(net, tmp_path)
    loaded = load(tmp_path, zoo.Net().eval().to(dtype))
    before, after = net.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    assert torch.equal(net(x().to(dtype)), loaded(x().to(dtype)))


def test_ties_and_shared_modules_come_back(folder: Path, zoo) -> None:
    loaded = load(folder, zoo.Net)
    assert loaded.again is loaded.shared
    assert isinstance(loaded.shared, LowRankLinear)
    assert loaded.head.weight is loaded.embed.weight
    with torch.no_grad():
        loaded.embed.weight.fill_(7)
    assert loaded.head.weight.eq(7).all()


def test_ties_are_restored_in_a_skeleton_without_them(folder: Path, zoo, net) -> None:
    skeleton = zoo.Net().eval()
    skeleton.head.weight = nn.Parameter(torch.zeros(9, 12))
    loaded = load(folder, skeleton)
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(loaded(x()), net(x()))


def test_each_tensor_is_stored_once_and_contiguous(folder: Path, net: nn.Module) -> None:
    index = json.loads((folder / INDEX).read_text())
    with safe_open(folder / WEIGHTS, "pt") as file:
        names = set(file.keys())
        size = sum(file.get_tensor(n).numel() * file.get_tensor(n).itemsize for n in names)
    assert names | index["aliases"].keys() == net.state_dict().keys()
    assert not names & index["aliases"].keys()
    assert index["aliases"]["head.weight"] == "embed.weight"
    distinct = {id(t): t for t in net.state_dict(keep_vars=True).values()}
    assert size == sum(t.numel() * t.itemsize for t in distinct.values())


def test_views_and_transposed_tensors_are_saved_whole(tmp_path: Path) -> None:
    """Parameters that look into one memory, in part or transposed, come back as their values."""
    base = torch.arange(24.0).reshape(4, 6)

    def build() -> nn.Module:
        model = nn.Module()
        model.a = nn.Parameter(base[:2])
        model.b = nn.Parameter(base[1:])
        model.t = nn.Parameter(base.T)
        model.flat = nn.Parameter(base.reshape(-1))
        model.wide = nn.Parameter(base.view(2, 12))
        return model

    save(build(), tmp_path)
    loaded = load(tmp_path, build)
    for name, tensor in build().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].is_contiguous()


def test_skeleton_keeps_mode_and_gradient_flags(folder: Path, zoo) -> None:
    skeleton = zoo.Net().train()
    skeleton.body[0].weight.requires_grad_(False)
    skeleton.conv.requires_grad_(False)
    skeleton.shared.eval()
    loaded = load(folder, skeleton)
    assert loaded is skeleton
    flags = {n: p.requires_grad for n, p in loaded.named_parameters()}
    frozen = {"conv.weight", "conv.bias", "body.0.down.weight", "body.0.up.weight"}
    assert {name for name, flag in flags.items() if not flag} == frozen
    assert loaded.body[0].training
    assert not loaded.shared.down.training


def test_root_is_factored(tmp_path: Path) -> None:
    layer = LowRankLinear.from_factors(torch.randn(2, 5), torch.randn(7, 2), torch.randn(7))
    save(layer, tmp_path)
    loaded = load(tmp_path, nn.Linear(5, 7))
    assert isinstance(loaded, LowRankLinear)
    assert torch.equal(loaded(torch.ones(5)), layer(torch.ones(5)))


def test_dense_model_round_trips(tmp_path: Path, zoo) -> None:
    net = zoo.Net().eval()
    save(net, tmp_path)
    assert torch.equal(load(tmp_path, lambda: zoo.Net().eval())(x()), net(x()))


def test_dtype_and_device(folder: Path, zoo) -> None:
    loaded = load(folder, zoo.Net, device="cpu", dtype=torch.float64)
    floating = [t for t in (*loaded.parameters(), *loaded.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.float64}
    assert loaded.norm.num_batches_tracked.dtype == torch.int64


def test_skeleton_on_meta(folder: Path, zoo, net: nn.Module) -> None:
    with torch.device("meta"):
        skeleton = zoo.Net().eval()
    check = zoo.snapshot(skeleton)
    with pytest.raises(LowrankError, match="buffers on the meta device that are not saved: scale"):
        load(folder, skeleton)
    check()
    skeleton.scale = torch.full((1,), 0.5)
    assert torch.equal(load(folder, skeleton)(x()), net(x()))


def test_saving_twice_replaces(folder: Path, zoo, net: nn.Module) -> None:
    with torch.no_grad():
        net.embed.weight.add_(1)
    save(net, folder)
    assert torch.equal(load(folder, zoo.Net().eval())(x()), net(x()))
    assert sorted(p.name for p in folder.iterdir()) == [INDEX, WEIGHTS]


def test_what_torch_compile_wraps_is_saved_plain(net: nn.Module, zoo, tmp_path: Path) -> None:
    save(torch.compile(net), tmp_path)  # type: ignore[arg-type]
    assert torch.equal(load(tmp_path, zoo.Net().eval())(x()), net(x()))
