"""Rows are cut only where a forward over some of them is that part of a forward over all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from lowrank.calibration.batches import Batch, parted
from lowrank.calibration.independence import rows_depend
from lowrank.calibration.running import reads_ids
from tests.nets import images, small_net
from tests.zoo import Custom, inputs_of, make, mlp, tokens, unchanged

WIDE, CLASSES = 12, 5


def ring(nodes: int) -> Tensor:
    """Every node reads itself and the next one (nodes, nodes)."""
    return (torch.eye(nodes) + torch.eye(nodes).roll(1, 1)) / 2


def graph(nodes: int, seed: int = 0) -> dict[str, Tensor]:
    x = torch.randn(nodes, WIDE, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "adjacency": ring(nodes)}


def graph_net(residual: float = 0.0) -> Custom:
    """Two graph convolutions, adjacency @ x @ W."""

    def call(self: Any, x: Tensor, adjacency: Tensor) -> Tensor:
        hidden = self.one(adjacency @ x).relu()
        return self.two(adjacency @ hidden) + residual * self.own(x)

    torch.manual_seed(0)
    parts = {"one": nn.Linear(WIDE, 16), "two": nn.Linear(16, CLASSES)}
    return Custom(call, **parts, own=nn.Linear(WIDE, CLASSES)).eval()


def by_neighbours(self: Any, x: Tensor, neighbours: Tensor) -> Tensor:
    return self.fc(x[neighbours].mean(1))


def neighbours() -> dict[str, Tensor]:
    return {"x": torch.randn(24, WIDE), "neighbours": torch.randint(0, 24, (24, 4))}


def set_net(batch_first: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(WIDE, 2, 16, batch_first=batch_first).eval()


class Recurrent(nn.Module):
    """`backwards` reads the last step first; inputs (steps, rows, features) unless batch first."""

    def __init__(self, batch_first: bool, backwards: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(WIDE, 8, batch_first=batch_first)
        self.axis, self.backwards = int(batch_first), backwards

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.flip(self.axis) if self.backwards else x)[0]


def pooled(self: Any, x: Tensor) -> Tensor:
    return self.fc(x).mean(0, keepdim=True)


def fixed(self: Any, x: Tensor) -> Tensor:
    return self.fc(x.view(2, -1, WIDE)).flatten(0, 1)[: len(x)]


X = torch.randn(9, 6, WIDE, generator=torch.Generator().manual_seed(0))
FC = nn.Linear(WIDE, CLASSES)
DEPENDENT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "adjacency": (graph_net, lambda: graph(9)),
    "large adjacency": (graph_net, lambda: graph(100)),
    "little of others": (lambda: graph_net(residual=20.0), lambda: graph(9)),
    "two nodes": (graph_net, lambda: graph(2)),
    "neighbours": (lambda: Custom(by_neighbours, fc=FC), neighbours),
    "elements of a set": (lambda: set_net(False), lambda: X),
    "steps of time": (lambda: Recurrent(False), lambda: X),
    "steps backwards": (lambda: Recurrent(False, True), lambda: X),
    "pooled": (lambda: Custom(pooled, fc=FC), lambda: X),
    "a fixed number": (lambda: Custom(fixed, fc=FC), lambda: X[:8, 0]),
    "a scalar": (lambda: Custom(lambda self, x: self.fc(x).sum(), fc=FC), lambda: X),
    "no output": (lambda: Custom(lambda self, x: None, fc=FC), lambda: X),
}
INDEPENDENT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "mlp": (lambda: mlp(WIDE, 20, CLASSES), lambda: X[:, 0]),
    "two rows": (lambda: mlp(WIDE, 20, CLASSES), lambda: X[:2, 0]),
    "many rows": (lambda: mlp(WIDE, 20, CLASSES), lambda: torch.randn(300, WIDE)),
    "images": (small_net, lambda: images(6)),
    "attention": (lambda: set_net(True), lambda: X),
    "time within rows": (lambda: Recurrent(True), lambda: X),
    "ids": (lambda: make("gpt2"), lambda: tokens(6)),
    "training mode": (lambda: nn.Sequential(FC, nn.Dropout(0.5)).train(), lambda: X),
    "not finite": (lambda: Custom(lambda self, x: self.fc(x) / 0, fc=FC), lambda: X),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_rows_that_read_each_other_depend(kind: str) -> None:
    model, batch = (make() for make in DEPENDENT[kind])
    assert rows_depend(model, batch)


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_rows_of_their_own_do_not(kind: str) -> None:
    model, batch = (make() for make in INDEPENDENT[kind])
    with unchanged(model):
        assert not rows_depend(model, batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rounding_is_no_dependence(dtype: torch.dtype) -> None:
    model = set_net(True).to(dtype)
    x = torch.randn(64, 6, WIDE).to(dtype)
    assert not rows_depend(model, x)
    assert rows_depend(set_net(False).to(dtype), x)


def test_nor_is_what_another_size_changes_in_the_kernels() -> None:
    x = torch.randn(64, WIDE, dtype=torch.float64)
    near = Custom(lambda self, x: self.fc(x) * (1 + 1e-5 * len(x)), fc=nn.Linear(WIDE, 3).double())
    assert not rows_depend(near, x)
    far = Custom(lambda self, x: self.fc(x) * (1 + 1e-3 * len(x)), fc=nn.Linear(WIDE, 3).double())
    assert rows_depend(far, x)


def test_a_large_batch_is_not_run_whole_again() -> None:
    seen: list[int] = []
    model = Custom(lambda self, x: (seen.append(len(x)), self.fc(x))[1], fc=FC)
    assert not rows_depend(model, torch.randn(1000, WIDE))
    assert seen == [64, 16]


def test_a_lookup_that_would_end_the_process_is_not_tried() -> None:
    """On an accelerator an index out of range is no exception."""
    batch, calls = neighbours(), []
    model = Custom(lambda self, **_: calls.append(1), fc=nn.Linear(1, 1, device="meta"))
    assert rows_depend(model, batch)
    assert calls == []
    rows_depend(model, {"x": batch["x"], "labels": torch.ones(24, 2, dtype=torch.long)})
    assert calls == [1]


def test_ids_for_transformers_are_rows() -> None:
    model = make("gpt2")
    mask = torch.ones_like(tokens())
    assert reads_ids(model, tokens())
    assert reads_ids(model, {"input_ids": tokens(), "attention_mask": mask, "use_cache": False})
    assert not reads_ids(model, {"input_ids": tokens(), "states": torch.ones(2, 7)})
    assert not reads_ids(model, {"input_ids": tokens(), "pairs": torch.ones(2, 7, 7).long()})
    assert not reads_ids(model, {"inputs_embeds": torch.ones(2, 7, 4)})
    assert not reads_ids(model, torch.ones(2, 7))
    assert not reads_ids(mlp(4, 4), tokens())
    assert not reads_ids(make("vit"), tokens())


# What calibration does with it


GRAPHS = [graph(nodes, nodes) for nodes in (9, 30, 9, 12, 40, 20, 7, 11)]


def runs_of(model: nn.Module, data: Any) -> list[int]:
    """How many rows each forward pass of a calibration reads."""
    seen: list[int] = []

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(len(next(iter((*args, *kwargs.values())))))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    lowrank.calibrate(model, data, progress=False, hold_out=1 / 4)
    handle.remove()
    return seen


def test_language_models_are_run_no_more_often() -> None:
    assert runs_of(make("gpt2"), [tokens(8)]) == [6, 6]
    assert runs_of(make("gpt2"), [{"input_ids": tokens(8)}]) == [6, 6]


def test_ids_whose_rows_go_together_are_kept_whole() -> None:
    """Four streams an item, one row each, as of sound in codebooks: cut, the rows make no item."""
    from transformers import GPT2Config, PreTrainedModel

    class Streams(PreTrainedModel):
        config_class = GPT2Config

        def __init__(self) -> None:
            super().__init__(GPT2Config(vocab_size=20))
            self.table, self.fc = nn.Embedding(20, WIDE), nn.Linear(WIDE, WIDE)
            self.head = nn.Linear(WIDE, 20)

        def forward(self, input_ids: Tensor) -> Tensor:
            streams = input_ids.reshape(-1, 4, input_ids.shape[-1])
            return self.head(self.fc(self.table(streams).sum(1)).relu())

    torch.manual_seed(0)
    data = [torch.randint(0, 20, (8, 6)) for _ in range(3)]
    assert reads_ids(Streams(), data[0])
    _, report = lowrank.compress(Streams(), 0.6, data=data, effort="fast", progress=False)
    assert any("batches were kept whole" in note for note in report.notes)
    with pytest.raises(LowrankError, match="Streams does not run on the data: RuntimeError"):
        lowrank.calibrate(Streams(), [torch.ones(3, 6).long()], progress=False)


def test_one_check_serves_all_batches() -> None:
    """Of the first batch; then 18 rows of 24, the first of them once more to observe."""
    assert runs_of(mlp(WIDE, CLASSES), [X[:8, 0]] * 3) == [8, 5, 16, 16, 2]


def test_graphs_are_held_out_whole() -> None:
    net = graph_net()
    seen = lowrank.calibrate(net, GRAPHS, progress=False, hold_out=1 / 4)
    assert seen.whole
    assert [len(b["x"]) for b in seen.batches] == [9, 30, 9, 12, 40, 20]  # type: ignore[union-attr]
    assert [len(b["x"]) for b in seen.held_out] == [7, 11]  # type: ignore[call-overload]
    for mine, given in zip([*seen.batches, *seen.held_out], GRAPHS, strict=True):  # type: ignore[misc]
        assert all(torch.equal(mine[name], given[name]) for name in given)


def test_statistics_are_those_of_whole_graphs() -> None:
    net = graph_net()
    seen = lowrank.calibrate(net, GRAPHS, progress=False)
    rows = inputs_of(net, ["one", "two"], lambda: [net(**batch) for batch in GRAPHS])
    for name, x in rows.items():
        torch.testing.assert_close(seen.statistics[name].gram, torch.from_numpy(x.T @ x / len(x)))


def test_a_single_whole_batch_is_not_split() -> None:
    assert parted([X], 0.5, whole=True) == ([X], ())


@pytest.mark.parametrize("effort", [None, "fast", lowrank.Recovery(block_steps=30)])
def test_a_graph_net_is_compressed(effort: str | lowrank.Recovery | None) -> None:
    """Cut into rows, x (16, features) meets an adjacency (16, nodes)."""
    net, options = graph_net(), {} if effort is None else {"effort": effort}
    small, report = lowrank.compress(
        net, 0.8, data=GRAPHS, copy=True, progress=False, align=1, **options
    )
    assert report.params_after < report.params_before
    assert any("batches were kept whole" in note for note in report.notes)
    assert small(**GRAPHS[0]).shape == (9, CLASSES)
    again = lowrank.compress(mlp(WIDE, 20, CLASSES), 0.8, data=[X[:, 0]], progress=False)[1]
    assert not any("kept whole" in note for note in again.notes)


def test_gradients_are_those_of_whole_graphs() -> None:
    """Every batch runs once, forwards and backwards, as it is."""
    net, nodes = graph_net(), []
    seen = lowrank.calibrate(net, GRAPHS, progress=False)
    handle = net.get_submodule("one").register_forward_hook(lambda m, a, o: nodes.append(len(o)))
    found = lowrank.with_fisher(net, seen)
    handle.remove()
    assert nodes == [len(batch["x"]) for batch in GRAPHS]
    assert found.statistics["two"].out_gram is not None


def test_the_file_keeps_that_batches_stay_whole(tmp_path: Any) -> None:
    for name, net, data in (("graphs", graph_net(), GRAPHS), ("rows", FC, [X])):
        path = tmp_path / f"{name}.safetensors"
        lowrank.save_calibration(lowrank.calibrate(net, data, progress=False), path, net)
        assert lowrank.load_calibration(path, net).whole is (name == "graphs")
