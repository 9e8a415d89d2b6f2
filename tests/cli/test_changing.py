"""plan, compress and merge do what the library does, and write what they say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import lowrank
from lowrank.cli import console, inputs
from lowrank.nn import LowRankLinear, PivotedLinear

from .helpers import (
    HIDDEN,
    PLANTED,
    logits,
    refused,
    run,
    tiny_llama,
    tiny_tokenizer,
)


def test_compress_writes_a_checkpoint_a_card_and_a_report(made: SimpleNamespace) -> None:
    report = json.loads((made.out / "report.json").read_text())
    assert 0.6 - 2 / HIDDEN < report["achieved"] <= 0.6  # a rank is 1/16 of a square layer
    assert report["tokens"] > 0
    model = lowrank.from_pretrained(made.out)
    factored = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(factored) == 14
    dense = sum(m.in_features * m.out_features for m in factored)
    assert sum(m.cost().params for m in factored) / dense == pytest.approx(report["achieved"])
    assert f"achieved {report['achieved']:.4f}" in made.said
    assert f"{report['params_before']:,} -> {model.num_parameters():,}" in made.said
    assert "left dense: lm_head: the output head" in made.said
    assert f'lowrank.from_pretrained("{made.out}")' in made.said
    card = (made.out / "README.md").read_text()
    rank = model.get_submodule(PLANTED).rank
    assert f"| {PLANTED} | 32x32 | whitened | {rank} |" in card
    assert "How to load" in card
    assert (made.out / "tokenizer.json").is_file()


def test_compress_does_what_the_library_does(made: SimpleNamespace) -> None:
    model = lowrank.from_pretrained(made.dense)
    text = made.text.read_text(encoding="utf-8")
    seen = lowrank.calibrate(model, text, tokenizer=tiny_tokenizer(), length=32, progress=False)
    lowrank.compress(model, 0.6, method="whitened", data=seen, align=1, progress=False)
    with torch.no_grad():
        want = model(input_ids=torch.arange(20)[None] * 7 % 300).logits
    torch.testing.assert_close(logits(made.out), want, rtol=0, atol=1e-5)


def test_compress_says_where_tensors_lived(made: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run("compress", made.dense, "--ratio", 0.6, "--method", "svd", "-o", out, "--from-disk")
    assert said.startswith("runs from disk, as asked\n")
    assert "\nran in memory: weights, factors and statistics take " in made.said
    assert lowrank.from_pretrained(out).num_parameters() > 0


def test_compress_prints_the_stages(made: SimpleNamespace) -> None:
    rows = [line.split() for line in made.said.splitlines()]
    start = rows.index(["stage", "seconds", "peak", "memory"])
    named = [row[0] for row in rows[start + 1 : start + 7]]
    assert named == ["loading", "calibration", "decompositions", "choosing", "factoring", "writing"]
    saved = json.loads((made.out / "report.json").read_text())["stages"]
    assert [one["name"].split()[0] for one in saved] == named


def test_a_dry_run_prints_an_estimate_and_runs_nothing(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing is loaded")

    monkeypatch.setattr(inputs, "load_model", never)
    out = tmp_path / "out"
    asked = ("--ratio", 0.6, "--effort", "fast", "--data", made.text, "--length", 32, "-o", out)
    said = run("compress", made.dense, *asked, "--dry-run")
    tokens = len(tiny_tokenizer()(made.text.read_text(encoding="utf-8"))["input_ids"])
    assert f"\ndata: {-(-tokens // 32)} rows of 32 tokens\n" in said
    rows = [line.split()[0] for line in said.splitlines() if line]
    start = rows.index("stage")
    assert rows[start + 1 : start + 4] == ["loading", "calibration", "gradients"]
    assert said.splitlines()[-1].endswith(f"GiB of disk are free at {tmp_path}")
    assert not list(tmp_path.iterdir())
    said = run("compress", made.dense, "--rank", 4, "-o", out, "--dry-run")
    assert "\ndata: 192 rows of 64 tokens\n" in said


def test_a_dry_run_says_what_is_wrong(made: SimpleNamespace, tmp_path: Path) -> None:
    dry = ("-o", tmp_path / "out", "--dry-run")
    assert "no target size" in refused("compress", made.dense, *dry)
    plan = ("--plan", tmp_path / "plan.json")
    assert "not from a plan: drop one" in refused("compress", made.dense, *plan, *dry)
    assert "there is no folder" in refused("compress", tmp_path / "no", "--ratio", 0.5, *dry)
    assert "factored already" in refused("compress", made.out, "--ratio", 0.5, *dry)
    long = ("--ratio", 0.5, "--length", 65)
    assert "--length must be in [1, 64]" in refused("compress", made.dense, *long, *dry)


def test_compress_passes_every_choice_on(made: SimpleNamespace, tmp_path: Path) -> None:
    run(
        "compress", made.dense, "-o", tmp_path / "a", "--ratio", 0.96, "--of", "model", "--policy",
        "energy", "--align", 2, "--target", "q_proj", "--target", "up_proj", "--exclude",
        r".*layers\.0.*", "--seed", 5, "--unit", "bytes", "--method", "random",
    )  # fmt: skip
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    asked, settings = report["plan"]["asked"], report["plan"]["settings"]
    assert (asked["ratio"], asked["of"], asked["unit"]) == (0.96, "model", "bytes")
    assert (settings["policy"], settings["align"], settings["seed"]) == ("energy", 2, 5)
    assert settings["method"] == "random"
    model = lowrank.from_pretrained(tmp_path / "a")
    ranks = {n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
    assert set(ranks) <= {PLANTED, "model.layers.1.mlp.up_proj"}
    assert ranks
    assert all(rank % 2 == 0 for rank in ranks.values())


def test_pivoted_factors_are_planned_and_compressed(made: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    said = run("plan", made.dense, "--ratio", 0.8, "--method", "svd", "--storage", "pivoted",
               "-o", file)  # fmt: skip
    assert "svd, pivoted" in said
    assert max(map(len, said.splitlines()[:-1])) <= console.WIDTH
    run("compress", made.dense, "--plan", file, "-o", tmp_path / "a")
    run(
        "compress",
        made.dense,
        "--ratio",
        0.8,
        "--method",
        "svd",
        "--storage",
        "pivoted",
        "-o",
        tmp_path / "b",
    )
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))
    model = lowrank.from_pretrained(tmp_path / "a")
    assert sum(isinstance(m, PivotedLinear) for m in model.modules()) == 14
    assert "unknown storage 'x'" in refused("plan", made.dense, "--ratio", 0.8, "--storage", "x")
    assert "drop --storage" in refused(
        "compress", made.dense, "--plan", file, "--storage", "pivoted", "-o", tmp_path / "c"
    )


@pytest.mark.parametrize(("given", "rank"), [("4", 4), ("0.99", 3)])
def test_a_rank_is_a_number_and_a_share_an_energy(
    made: SimpleNamespace, tmp_path: Path, given: str, rank: int
) -> None:
    run("compress", made.dense, "--rank", given, "--target", PLANTED, "--out", tmp_path / "a")
    assert lowrank.from_pretrained(tmp_path / "a").get_submodule(PLANTED).rank == rank


def test_the_dtype_stays(made: SimpleNamespace, tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "half")
    said = run("compress", tmp_path / "half", "--ratio", 0.6, "--out", tmp_path / "a")
    assert "has no tokenizer, so none was saved" in said
    kinds = {t.dtype for t in load_file(tmp_path / "a" / "model.safetensors").values()}
    assert kinds == {torch.bfloat16}


def test_a_plan_changes_nothing_and_can_be_applied(made: SimpleNamespace, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in made.dense.iterdir()}
    file, chosen = tmp_path / "plan.json", ("--ratio", 0.6, "--data", made.text, "--align", 1)
    said = run("plan", made.dense, *chosen, "--length", 32, "-o", file)
    assert {path.name: path.read_bytes() for path in made.dense.iterdir()} == before
    plan = lowrank.Plan.load(file)
    assert f"keeps {plan.kept():.4f} of the targets' params" in said
    assert "model.layers.0.mlp.down_proj" in said
    assert max(map(len, said.splitlines()[:-1])) <= console.WIDTH
    args = ("--plan", file, "--data", made.text, "--length", 32, "--out", tmp_path / "a")
    run("compress", made.dense, *args)
    assert torch.equal(logits(tmp_path / "a"), logits(made.out))
    assert "add --data TEXT" in refused("compress", made.dense, *args[:2], "--out", tmp_path / "b")
    assert "drop --ratio" in refused("compress", made.dense, *args, "--ratio", 0.5)
    assert "add --force" in refused("plan", made.dense, "--ratio", 0.5, "-o", file)
    run("plan", made.dense, "--ratio", 0.5, "-o", file, "--force")
    assert lowrank.Plan.load(file).asked["ratio"] == 0.5


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("length", [[], ["--length", 9]])
def test_rows_are_those_asked_for(
    made: SimpleNamespace, tmp_path: Path, text: bool, length: list[object]
) -> None:
    """Of a text, and of what the model writes, at once or by a plan."""
    args = ("--rows", 5, *length, *(("--data", made.text) if text else ()))
    tokens = 5 * (9 if length else 64)
    file = tmp_path / "plan.json"
    said = run("plan", made.dense, "--ratio", 0.6, *args, "-o", file)
    assert "--rows 5" in said
    assert lowrank.Plan.load(file).settings["tokens"] == tokens
    run("compress", made.dense, "--ratio", 0.6, *args, "--out", tmp_path / "a")
    run("compress", made.dense, "--plan", file, *args, "--out", tmp_path / "b")
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))
    again = ("--ratio", 0.6, "--rows", 0, "--out", tmp_path / "c")
    assert "rows must be a positive integer" in refused("compress", made.dense, *again)


def test_merge_gives_a_dense_checkpoint_of_the_same_function(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    assert "loads without lowrank" in run("merge", made.out, "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any(isinstance(m, LowRankLinear) for m in merged.modules())
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    # Logits of this model reach 30, where float32 resolves 2e-6: sums in another order show.
    torch.testing.assert_close(logits(tmp_path / "merged"), logits(made.out), rtol=2e-6, atol=1e-5)
    assert (logits(made.dense) - logits(made.out)).abs().max() > 1e-3


def test_cut_gives_a_smaller_checkpoint(made: SimpleNamespace, tmp_path: Path) -> None:
    said = run("cut", made.out, "--ratio", 0.3, "--out", tmp_path / "cut")
    wanted, report = lowrank.at_rank(lowrank.from_pretrained(made.out), 0.3)
    assert f"keeps {report.achieved:.4f} of the targets' parameters" in said
    ids = torch.arange(20)[None] * 7 % 300
    assert torch.equal(logits(tmp_path / "cut"), wanted.eval()(input_ids=ids).logits)
    assert (tmp_path / "cut" / "tokenizer.json").is_file()
    told = refused("cut", tmp_path / "cut", "--ratio", 0.6, "--out", tmp_path / "again")
    assert "what was cut off is not stored" in told
