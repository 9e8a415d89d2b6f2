"""Without --data a causal language model writes its calibration text, and the commands say so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lowrank

from .helpers import PLANTED, cells, logits, refused, run

OWN = "192 rows of {} tokens that the model wrote itself, seed {}"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return lowrank.from_pretrained(folder).state_dict()


@pytest.mark.parametrize(
    ("options", "length", "seed"),
    [
        ([], 64, 0),
        (["--data", "self", "--seed", 3], 64, 3),
        (["--length", 9], 9, 0),
        (["--data", "self", "--length", 9, "--method", "asvd"], 9, 0),
    ],
)
def test_compress_does_what_the_library_does_with_self(
    made: SimpleNamespace, tmp_path: Path, options: list[object], length: int, seed: int
) -> None:
    said = run("compress", made.dense, "--ratio", 0.6, *options, "--out", tmp_path / "a")
    assert f"calibrated on {OWN.format(length, seed)}" in said.splitlines()
    model = lowrank.from_pretrained(made.dense)
    seen = lowrank.calibrate(model, "self", length=length, seed=seed, progress=False)
    method = "asvd" if "asvd" in options else None
    lowrank.compress(model, 0.6, method=method, data=seen, seed=seed, progress=False)
    for name, tensor in weights_of(tmp_path / "a").items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_method_without_data_writes_nothing(made: SimpleNamespace, tmp_path: Path) -> None:
    args = ("--ratio", 0.6, "--method", "svd", "--length", 9)
    said = run("compress", made.dense, *args, "--out", tmp_path / "a")
    assert " 0 calibration tokens" in said
    assert "wrote itself" not in said


@pytest.mark.parametrize("options", [[], ["--length", 9], ["--data", "self", "--seed", 2]])
def test_a_plan_is_applied_as_it_says(
    made: SimpleNamespace, tmp_path: Path, options: list[object]
) -> None:
    file, chosen = tmp_path / "plan.json", ["--ratio", 0.6, *options]
    said = run("plan", made.dense, *chosen, "--out", file)
    assert f"calibrated on {lowrank.Plan.load(file).settings['data']}" in said
    line = next(line for line in said.splitlines() if line.startswith("wrote "))
    command = line.partition("apply it with: lowrank ")[2].removesuffix(" --out out").split()
    run(*command, "--out", tmp_path / "a")
    run("compress", made.dense, *chosen, "--out", tmp_path / "b")
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))


def test_inspect_weighs_by_what_the_model_writes(made: SimpleNamespace) -> None:
    found = lowrank.inspect(
        lowrank.from_pretrained(made.dense), "self", length=9, timing=False, progress=False
    )
    row = cells(run("inspect", made.dense, "--data", "self", "--length", 9), PLANTED)
    for column in ("eff", "90 %", "95 %", "99 %", "eff W"):
        assert found[PLANTED].row()[column] in row


def test_a_model_that_writes_nothing_asks_for_a_text(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**size, vocab_size=40)).save_pretrained(tmp_path / "bert")
    args = ("compress", tmp_path / "bert", "--ratio", 0.6, "--out", tmp_path / "a")
    why = "BertForMaskedLM cannot write its own calibration text"
    assert f"{why}, and whitened needs one: add --data TEXT" in refused(
        *args, "--method", "whitened"
    )
    assert f"{why}: add --data TEXT" in refused(*args, "--data", "self")
    assert "factored by svd" in run(*args)
