"""Factored layers that are quantized run. What torchao made is stored; what nothing can put
together again is refused before anything is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank
from lowrank import LowrankError
from tests.coded import Codes
from tests.coded import in_eight_bits as coded
from tests.processes import ROOT, environment
from tests.zoo import make, mlp, tokens

REFUSED = r"tensors are quantized and cannot be stored .*: quantize with torchao, whose int8"
TORCHAO = ROOT / "build" / "torchao"
DATA: dict[str, Any] = {"data": [tokens(16, 32)]}
FORMS: dict[str, dict[str, Any]] = {
    "factors": {"data": None},
    "pivoted": {"data": None, "storage": "pivoted"},
    "columns": {"method": "lowrank-sparse", **DATA},
    "entries": {"method": "lowrank-masked", **DATA},
    "2:4": {"method": "lowrank-2:4", **DATA},
    "shared": {"method": "basis-sharing", **DATA},
}


def in_eight_bits(model: nn.Module) -> None:
    """By a class that torchao does not know."""
    coded(model, Codes)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 6)).logits


@pytest.mark.parametrize("form", FORMS)
def test_eight_bits_run_and_are_not_saved(form: str, tmp_path: Path) -> None:
    model, _ = lowrank.compress(make("llama"), 0.6, progress=False, **FORMS[form])
    before = logits(model)
    in_eight_bits(model)
    after = logits(model)
    assert 0 < float((after - before).norm() / before.norm()) < 0.03
    with pytest.raises(LowrankError, match=REFUSED):
        model.save_pretrained(tmp_path / "stock")
    with pytest.raises(LowrankError, match=REFUSED):
        lowrank.save(model, tmp_path / "ours")
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(model), after)


def test_the_way_that_the_error_names(tmp_path: Path) -> None:
    model, _ = lowrank.compress(make("llama"), 0.6, data=None)
    model.save_pretrained(tmp_path)
    again = lowrank.from_pretrained(tmp_path).eval()
    in_eight_bits(model)
    in_eight_bits(again)
    assert torch.equal(logits(again), logits(model))


def test_any_other_module(tmp_path: Path) -> None:
    net, _ = lowrank.compress(mlp(24, 40, 16), 0.6, data=None)
    in_eight_bits(net)
    with pytest.raises(LowrankError, match=REFUSED):
        lowrank.save(net, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["svd", "lowrank-sparse", "lowrank-masked", "dense-sparse"])
def test_dynamic_quantisation(method: str, tmp_path: Path) -> None:
    """torch's own; the sparse parts stay as they are, and no shortcut passes the packed ones by."""
    torch.manual_seed(0)
    net, _ = lowrank.compress(
        mlp(24, 40, 16), 0.6, method=method, data=[torch.randn(64, 24)], progress=False
    )
    lean = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    for rows in (3, 700):  # forms have one way for few rows and another for many
        x = torch.randn(rows, 24)
        with torch.no_grad():
            want, found = net(x), lean(x)
        assert 0 < float((found - want).norm() / want.norm()) < 0.05
    with pytest.raises(LowrankError, match=REFUSED):
        lowrank.save(lean, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(
    not TORCHAO.is_dir(),
    reason="`make test` unpacks torchao into build/torchao, apart from what is installed: wherever "
    "it can be found, transformers imports it, and each import prints four lines",
)
def test_what_torchao_itself_makes(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "tests.seams.torchao_round_trips", str(tmp_path)],
        env=environment(PYTHONPATH=f"{ROOT}:{TORCHAO}"),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.count(" of float32: 0.2") == 4
