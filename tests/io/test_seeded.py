"""A network comes back from seed and vector bit for bit, from a file of another day too."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lowrank
from lowrank import LowrankError
from lowrank.io.seeded import KEY, read_seeded
from lowrank.linalg.projections import PROJECTIONS
from lowrank.train import Subspace

STORED = Path(__file__).with_name("seeded.safetensors")
EVERY = pytest.mark.parametrize("kind", PROJECTIONS)


def net(seed: int = 0, width: int = 10) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, width)
    )


def bytes_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def trained(kind: str, **options: Any) -> tuple[nn.Module, Any]:
    """Three steps, after which nothing is what it was."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = Subspace(
        model,
        optimizer,
        **{"dimension": 6, "projection": kind, "start": "seed", "seed": 3, **options},
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(8, 1, 6, 6, generator=generator)
        model(x).square().mean().backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    vector = controller.seeded()
    return controller.finish(), vector


@EVERY
def test_the_network_comes_back(kind: str, tmp_path: Path) -> None:
    model, vector = trained(kind)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    vector.save(first)
    read_seeded(first).save(second)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert len(first.read_bytes()) < 1400  # of 2,760 bytes of weights; most is the header
    other = net(seed=1)  # drawn from the seed: the skeleton's weights do not matter
    assert lowrank.load_seeded(first, other) is other
    assert bytes_of(other) == bytes_of(model)
    assert other[1].num_batches_tracked == 3  # type: ignore[union-attr]


@EVERY
def test_one_thread_or_two_it_is_the_same(kind: str) -> None:
    model, vector = trained(kind)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            other = net(seed=1)
            vector.write_into(other)
            assert bytes_of(other) == bytes_of(model)
    finally:
        torch.set_num_threads(before)


def test_a_file_of_another_day_gives_the_same_network() -> None:
    """It was written once, by another process; only integers and sums in one order lie between."""
    found = lowrank.load_seeded(STORED, net(seed=5))
    assert bytes_of(found) == "fe9f40ac06deb42228698ec42d0e7116561b8fcbcbf13015635e25d7e0544715"


def test_a_difference_needs_its_beginning(tmp_path: Path) -> None:
    model, vector = trained("fastfood", start="model", said=True, precision="float16")
    vector.save(tmp_path / "d.safetensors")
    assert bytes_of(lowrank.load_seeded(tmp_path / "d.safetensors", net())) == bytes_of(model)
    other = net(seed=1)
    before = bytes_of(other)
    with pytest.raises(LowrankError, match="a difference to other weights"):
        lowrank.load_seeded(tmp_path / "d.safetensors", other)
    assert bytes_of(other) == before


def test_frozen_parameters_are_stored(tmp_path: Path) -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = Subspace(model, optimizer, dimension=3, start="seed")
    controller.seeded().save(tmp_path / "f.safetensors")
    again = lowrank.load_seeded(tmp_path / "f.safetensors", net(seed=1))
    assert torch.equal(again[0].weight, net()[0].weight)  # type: ignore[index]
    assert bytes_of(again) == bytes_of(controller.finish())


def damaged(path: Path, about: str | None = None, **tensors: Any) -> Path:
    with safe_open(STORED, framework="pt") as file:
        said = file.metadata()[KEY]
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stored = {name: t for name, t in {**stored, **tensors}.items() if t is not None}
    save_file(stored, path, metadata={KEY: said if about is None else about})
    return path


def test_damaged_files_and_other_networks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(LowrankError, match="there is no file"):
        read_seeded(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(LowrankError, match="could not be read"):
        read_seeded(path)
    nan = torch.full((4,), torch.nan)
    for about, tensors, words in (
        ("[]", {}, "is not a file of a seed"),
        ("{", {}, "is not a file of a seed"),
        ('{"version": 2, "draws": 1}', {}, r"versions \(2, 1\) of format and draws"),
        (None, {"coordinates": None}, "is not a file of a seed"),
        (None, {"coordinates": nan}, "not finite"),
    ):
        with pytest.raises(LowrankError, match=words):
            read_seeded(damaged(path, about, **tensors))
    model = net(width=9)
    before = bytes_of(model)
    with pytest.raises(LowrankError, match="other parameters than Sequential"):
        lowrank.load_seeded(STORED, model)
    odd = damaged(path, **{"kept.1.running_mean": torch.zeros(3)})
    with pytest.raises(LowrankError, match=r"no such tensors as the file: 1\.running_mean"):
        lowrank.load_seeded(odd, model := net())
    assert before != bytes_of(model) == bytes_of(net())
