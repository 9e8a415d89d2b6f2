"""What cannot be run block by block, or pairs no tokens, is refitted all the same, with a note."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import Recovery
from lowrank.methods.resolved import resolve
from lowrank.nn import is_factored
from lowrank.recover import sequential
from lowrank.recover.journal import Journal
from lowrank.recover.run import recover_layers, refitted_twins
from lowrank.recover.sequential import SequentialPass, Student
from lowrank.recover.streams import _Sums
from lowrank.recover.workbench import Workbench
from lowrank.walk.sites import find_sites
from lowrank.walk.surgery import twin
from tests import zoo

ROWS = 96


class Block(nn.Module):
    """A residual block of two layers, which may keep its activation."""

    def __init__(self, keeps: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.keeps = keeps

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.up(self.norm(x)))
        if self.keeps:
            self.last = hidden
        return x + self.down(hidden)


def model_of(call: Callable[..., Any], count: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return zoo.Custom(call, blocks=nn.Sequential(*(Block() for _ in range(count))))


def rows() -> list[Any]:
    x = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0))
    return [{"x": part} for part in x.split(8)]


def refitted(
    model: nn.Module,
    data: Any = None,
    steps: int = 2,
    method: str = "whitened",
    ratio: float = 0.4,
    **options: Any,
) -> tuple[nn.Module, str]:
    """The compressed model, and the notes of its report."""
    lean, report = lowrank.compress(
        model, ratio, data=data or rows(), method=method, policy="uniform",
        effort=Recovery(block_steps=steps, **options), copy=True, progress=False,
    )  # fmt: skip
    assert report.achieved <= ratio
    assert all(bool(p.isfinite().all()) for p in lean.parameters())
    return lean, "; ".join(report.notes)


def siamese(self: Any, x: Tensor) -> Tensor:
    return self.blocks(x) * self.blocks(x.flip(0))


def looped(self: Any, x: Tensor) -> Tensor:
    return self.blocks(self.blocks(x))


def skipping(self: Any, x: Tensor) -> Tensor:
    for index, block in enumerate(self.blocks):
        x = block(x) if index != 1 or x[0, 0] < 0.4 else x
    return x


@pytest.mark.parametrize("call", [siamese, looped, skipping])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_chain_that_cannot_be_run_by_blocks_is_run_whole(call: Any, steps: int) -> None:
    lean, notes = refitted(model_of(call), steps=steps)
    assert "refitted in passes of the whole model, not block by block: blocks.0 to " in notes
    assert "is called out of chain order)" in notes
    assert ("block refit was skipped there" in notes) == (steps > 0)
    assert "refitted in closed form, layer by layer: 6" in notes
    assert sum(is_factored(part) for part in lean.modules()) == 6


def test_whole_passes_refit_as_well_as_blocks_do() -> None:
    """The same model, once with a chain and once with a second call that adds nothing: but for the
    tokens, which are counted twice, so that they are shrunk by half as much."""

    def again(self: Any, x: Tensor) -> Tensor:
        return self.blocks(x) + 0 * self.blocks(x)

    found = []
    for call in (lambda self, x: self.blocks(x), again):
        lean, notes = refitted(model_of(call), steps=0, shrinkage=0.0)
        assert ("not block by block" in notes) == (call is again)
        found.append(lean.blocks[2].down.dense_weight())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


class Alone(Block):
    """A block that runs only inside of its model."""

    inside = False

    def forward(self, x: Tensor) -> Tensor:
        if not Alone.inside:
            raise RuntimeError("no\nstate")
        return super().forward(x)


def test_a_block_that_fails_by_itself_is_run_in_the_model() -> None:
    def call(self: Any, x: Tensor) -> Tensor:
        Alone.inside = True
        try:
            return self.blocks(x)
        finally:
            Alone.inside = False

    model = zoo.Custom(call, blocks=nn.Sequential(Block(), Alone(), Block()))
    _, notes = refitted(model)
    assert "blocks.0 to blocks.2 (blocks.1 fails by itself: no state)" in notes
    assert "block refit: " in notes  # of the first block
    assert "of 1 blocks improved" in notes


class Mixture(nn.Module):
    """Experts that are sent the rows which a router chooses for them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 3)
        self.experts = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        choice, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            chosen = choice == index
            if bool(chosen.any()):
                y[chosen] = expert(x[chosen])
        return x + y


def test_experts_that_other_tokens_reach_are_fitted_to_those() -> None:
    torch.manual_seed(0)
    model = zoo.Custom(
        lambda self, x: self.blocks(x), blocks=nn.Sequential(Block(), Mixture(), Mixture())
    )
    lean, notes = refitted(model)
    assert "refitted to the compressed model's inputs alone, since other tokens reach" in notes
    assert "blocks.2.experts." in notes
    experts = lean.blocks[2].experts
    assert all(is_factored(part) for expert in experts for part in (expert.up, expert.down))


def test_a_layer_that_no_token_reaches_in_the_compressed_model_keeps_its_factors() -> None:
    """What the router sends elsewhere is not left dense."""

    def call(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        return x if is_factored(self.first.up) else self.second(x)

    torch.manual_seed(0)
    lean, notes = refitted(zoo.Custom(call, first=Block(), second=Block()))
    assert is_factored(lean.second.up)
    assert "inputs alone" in notes


# Blocks that are no chain


def outside(self: Any, x: Tensor) -> Tensor:
    for block in self.blocks:
        x = 0.5 * x + block(x)
    return x


@pytest.mark.parametrize("method", ["whitened", "two-sided"])
def test_blocks_with_the_residual_outside_are_refitted_one_by_one(method: str) -> None:
    _, notes = refitted(model_of(outside), method=method)
    assert "of 3 blocks improved" in notes
    assert "whole model" not in notes


def test_a_feed_forward_with_the_residual_outside_is_one_block() -> None:
    """Not one for each of its two layers."""
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(3)]
    model = zoo.Custom(outside, blocks=nn.ModuleList(parts))
    _, notes = refitted(model)
    assert "of 3 blocks improved" in notes


def test_a_single_block_is_trained_to_what_the_dense_one_returns() -> None:
    """An oracle by hand: its error on the compressed stream's inputs falls."""
    model, data = model_of(outside), torch.cat([batch["x"] for batch in rows()])
    apart = []
    for steps in (0, 80):
        lean, _ = refitted(model, steps=steps, shrinkage=0.0)
        with torch.no_grad():
            apart.append(float((lean.eval()(data) - model.eval()(data)).square().mean()))
    assert apart[1] < 0.9 * apart[0]


# Activations kept as attributes; padding in torch's own encoder


@pytest.mark.parametrize("where", ["attribute", "list", "object"])
def test_activations_kept_as_attributes(where: str) -> None:
    """Of a pass with gradients, in which torch refuses to copy them."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(keeps=True), Block(keeps=True), nn.Linear(16, 5))
    last = model(torch.ones(1, 16))
    if where == "list":
        model.kept = [{"state": last}]
    elif where == "object":
        model.kept = type("State", (), {})()
        model.kept.state = last
    lean, report = lowrank.compress(
        model, 0.5, data=[b["x"] for b in rows()], method="two-sided", policy="uniform",
        effort=Recovery(block_steps=2), copy=True, progress=False,
    )  # fmt: skip
    assert report.achieved <= 0.5
    assert not lean[0].last.requires_grad
    assert lowrank.to_dense(lean, copy=True)(torch.ones(2, 16)).shape == (2, 5)


def test_torchs_encoder_with_a_padding_mask() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = zoo.Custom(
        lambda self, x, pad: self.encoder(x, src_key_padding_mask=pad),
        encoder=nn.TransformerEncoder(layer, 2),
    ).eval()
    pad = torch.zeros(8, 6, dtype=torch.bool)
    pad[::2, 4:] = True
    data = [{"x": torch.randn(8, 6, 16), "pad": pad} for _ in range(6)]
    lean, notes = refitted(model, data, method="two-sided")
    assert "of 2 blocks improved" in notes
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        fast = lean.eval()(**data[0])
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            slow = lean(**data[0])
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(fast[~pad], slow[~pad], rtol=1e-4, atol=1e-5)


# The same in models of transformers

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4}
IDS = {"input_ids": zoo.tokens(24, 12)}
PIXELS = {"pixel_values": torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(2))}
WAVES = {"input_values": torch.randn(16, 200, generator=torch.Generator().manual_seed(2))}
# Class, config, batch, what the notes say.
FAMILIES: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "SwitchTransformers": (
        "ForConditionalGeneration",
        {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2,
         "num_heads": 4, "num_experts": 4, "num_sparse_encoder_layers": 1,
         "num_sparse_decoder_layers": 1, "decoder_start_token_id": 0},
        {**IDS, "decoder_input_ids": zoo.tokens(24, 6)},
        "refitted to the compressed model's inputs alone",
    ),
    "RecurrentGemma": (
        "ForCausalLM",
        {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 16, "head_dim": 4,
         "attention_window_size": 8, "pad_token_id": 0},
        IDS, "of 3 blocks improved",
    ),
    "DebertaV2": (
        "ForSequenceClassification",
        {**SIZES, "num_hidden_layers": 3, "relative_attention": True,
         "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32},
        IDS, "of 3 blocks improved",
    ),
    "Yolos": (
        "ForObjectDetection",
        {**SIZES, "num_hidden_layers": 3, "image_size": [32, 32], "patch_size": 16,
         "num_detection_tokens": 4},
        PIXELS, "of 3 blocks improved",
    ),
    "Pvt": (
        "ForImageClassification",
        {"image_size": 32, "hidden_sizes": [8, 16, 16, 16], "depths": [1] * 4,
         "num_attention_heads": [1, 2, 2, 2], "mlp_ratios": [2] * 4,
         "sequence_reduction_ratios": [2, 1, 1, 1]},
        PIXELS, "of 4 blocks improved",
    ),
    "Funnel": (
        "ForTokenClassification",
        {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 4, "d_head": 4,
         "d_inner": 32},
        IDS, "of 3 blocks improved",
    ),
    "Albert": (
        "ForSequenceClassification", {**SIZES, "embedding_size": 8, "num_hidden_layers": 3},
        IDS, "the model has no chain of blocks: block refit was skipped",
    ),
    "Mamba": (
        "ForCausalLM", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
        IDS, "are never called, only their weights are read,",
    ),
    "WavLM": (
        "ForSequenceClassification",
        {**SIZES, "num_hidden_layers": 2, "conv_dim": (8, 8), "conv_stride": (4, 2),
         "conv_kernel": (8, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
         "num_conv_pos_embedding_groups": 2, "num_buckets": 16, "classifier_proj_size": 8},
        WAVES, "8 layers with 2,048 parameters are never called, only their weights are read,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_are_built_in_other_ways(family: str) -> None:
    import transformers

    head, sizes, data, told = FAMILIES[family]
    torch.manual_seed(0)
    words = {} if data is PIXELS or data is WAVES else {"vocab_size": zoo.VOCABULARY}
    config = getattr(transformers, f"{family}Config")(**words, **sizes)
    model = getattr(transformers, f"{family}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # random models of this size hardly use their layers
                parameter.mul_(0.2 / parameter.std().clamp(min=1e-3))
    _, notes = refitted(model, [data], method="two-sided", ratio=0.6)
    assert told in notes


class Counting(nn.Linear):
    """A linear layer that counts how often it is computed; hooks run on what is remembered too."""

    runs = 0

    @classmethod
    def of(cls, layer: nn.Linear) -> Counting:
        new = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
        new.load_state_dict(layer.state_dict())
        return new

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


def test_a_run_ends_with_the_layer_whose_inputs_are_asked_for() -> None:
    """Every layer is computed once for each batch, in the dense block whatever the number of
    candidates: a run ends with the layer whose inputs are asked for, and a finished layer gives
    what it gave before. One batch more shows what is added to a stream."""
    model = model_of(lambda self, x: self.blocks(x), count=2)
    block = model.blocks[0]
    block.up, block.down = Counting.of(block.up), Counting.of(block.down)
    seen = lowrank.calibrate(model, rows(), hold_out=0.125, progress=False)
    bench = Workbench(model, seen)
    sites = [s for s in find_sites(model) if s.name.startswith("blocks.0")]
    numbers, fitted = bench.numbers()
    made: list[Counting] = []

    def fit(site: Any, _: Any) -> nn.Module:
        made.append(Counting(site.shape[1], site.shape[0]))
        return made[-1]

    students = [Student(twin(model), sites, fit) for _ in range(3)]
    bench.dense_chain(("blocks.0", "blocks.1"), numbers)  # its recording is another pass
    block.up.runs = block.down.runs = 0
    SequentialPass(bench, students, numbers, fitted).run()
    assert (block.up.runs, block.down.runs) == (len(numbers) + 1, len(numbers) + 1)
    assert [layer.runs for layer in made] == [len(numbers)] * 6


def test_outputs_that_are_too_much_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result."""
    found = []
    for most in (0, 2 * 3 * 16 * 32 * 4, 1 << 20):  # no batch, three of each model, all
        monkeypatch.setattr(sequential, "MOST", most)
        lean, _ = refitted(model_of(lambda self, x: self.blocks(x)), steps=0)
        found.append([p.detach() for p in lean.parameters()])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_follows_a_finished_layer_may_change_its_output_in_place() -> None:
    """Its output is given again to the runs for two further layers, and to the last one."""

    class InPlace(Block):
        def __init__(self) -> None:
            super().__init__()
            self.between = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.up(x)
            hidden += 1.0
            return x + self.down(torch.relu_(self.between(hidden))) + hidden[..., :16]

    torch.manual_seed(0)
    blocks = nn.Sequential(InPlace(), InPlace())
    model = zoo.Custom(lambda self, x: self.blocks(x), blocks=blocks)
    bench = Workbench(model, lowrank.calibrate(model, rows(), progress=False))
    numbers, fitted = bench.numbers()
    found = []
    for most in (0, 1 << 20):
        read: list[Tensor] = []

        def fit(site: Any, moments: Any, read: list[Tensor] = read) -> nn.Module:
            read += [moments.gram.clone(), moments.cross.clone()]
            torch.manual_seed(len(read))
            return nn.Linear(site.shape[1], site.shape[0])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sequential, "MOST", most)
            student = Student(twin(model), find_sites(model), fit)
            SequentialPass(bench, [student], numbers, fitted).run()
        found.append(read)
    assert len(found[0]) == 12
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_trained_block_is_not_remembered_as_it_was() -> None:
    """After a block refit its outputs are those of the trained factors."""
    found = []
    for most in (0, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sequential, "MOST", most)
            lean, _ = refitted(model_of(lambda self, x: self.blocks(x)), steps=20)
        found.append([p.detach() for p in lean.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_candidates_are_refitted_together_as_they_are_alone() -> None:
    model = model_of(lambda self, x: self.blocks(x))
    seen = lowrank.calibrate(model, rows(), hold_out=0.125, progress=False)
    bench = Workbench(model, seen)
    resolved = resolve("whitened", data=True)
    works = []
    for rank in (3, 5):
        plan = lowrank.plan(
            model, rank=rank, data=seen, method="whitened", align=1, target_modules=".*(up|down)"
        )
        sites = {site.name: site for site in find_sites(model)}
        works.append([(sites[e.name], e, None) for e in plan.entries if e.target])
    together = refitted_twins(bench, works, Recovery(), resolved)
    for work, lean in zip(works, together, strict=True):
        (alone,) = refitted_twins(bench, [work], Recovery(), resolved)
        assert [m.rank for m in lean.modules() if is_factored(m)] == [e.size[0] for _, e, _ in work]
        for (name, x), (_, y) in zip(
            lean.named_parameters(), alone.named_parameters(), strict=True
        ):
            assert torch.equal(x, y), name


def test_blocks_from_a_journal_say_what_they_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = zoo.Custom(
        lambda self, x: self.blocks(x), blocks=nn.Sequential(Block(), Mixture(), Mixture())
    )
    seen = lowrank.calibrate(model, rows(), hold_out=0.125, progress=False)
    plan = lowrank.plan(model, 0.4, data=seen, method="whitened", policy="uniform")
    sites = {site.name: site for site in find_sites(model)}
    resolved = resolve("whitened", data=True)
    work = [
        (sites[e.name], e, resolved.factor([sites[e.name]], e.option(), seen.statistics[e.name])[0])
        for e in plan.entries
        if e.target and e.size
    ]
    found = []
    for _ in range(2):
        bench = Workbench(model, seen)
        bench.journal = Journal.read(tmp_path)
        found.append(recover_layers(bench, work, Recovery(block_steps=2), resolved, progress=False))
    first, second = found
    assert "blocks.1" in bench.journal.pieces
    assert any("other tokens reach" in note for note in first.notes)
    assert second.notes == first.notes
    for name, module in first.modules.items():
        for x, y in zip(module.parameters(), second.modules[name].parameters(), strict=True):
            assert torch.equal(x, y), name


def test_the_moments_of_few_tokens_are_shrunk() -> None:
    """Towards the diagonal of H', in H' and in C alike, so that without errors W stays W."""
    layer = nn.Linear(4, 3)
    (site,) = find_sites(nn.Sequential(layer))
    x, y = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(0))
    for dense, paired in ((x, True), (x[:9], False)):
        plain, shrunk = (_Sums(site) for _ in range(2))
        for sums in (plain, shrunk):
            sums.add([dense], [y], [])
        exact, found = plain.moments(), shrunk.moments(shrinkage=5.0)
        assert exact is not None
        assert found is not None
        assert found.paired is paired
        added = torch.diag(2 * exact.gram.diagonal())  # 5 · 4 inputs / 10 tokens
        torch.testing.assert_close(found.gram, exact.gram + added)
        torch.testing.assert_close(found.cross, exact.cross + added)
        torch.testing.assert_close(found.mean, exact.mean)


def test_a_refit_to_few_tokens_holds_on_others() -> None:
    model = model_of(lambda self, x: self.blocks(x))
    others = torch.randn(512, 16, generator=torch.Generator().manual_seed(7))
    bench = Workbench(model, lowrank.calibrate(model, rows()[:3], progress=False))
    plan = lowrank.plan(model, 0.6, data=bench.calibration, method="whitened", policy="uniform")
    sites = {site.name: site for site in find_sites(model)}
    work = [(sites[e.name], e, None) for e in plan.entries if e.option().size]

    def error(shrinkage: float) -> float:
        resolved, recovery = resolve("whitened", data=True), Recovery(shrinkage=shrinkage)
        (lean,) = refitted_twins(bench, [work], recovery, resolved)
        with torch.no_grad():
            return float((lean(others) - model(others)).square().mean())

    assert error(2.0) < 0.9 * error(0.0)
