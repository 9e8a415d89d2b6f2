"""What torchao itself makes, through files and back: `python -m tests.seams.torchao_round_trips`.

In a process of its own, with torchao on the path: it prints four lines at each import, and
transformers imports it wherever it is installed.
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank
from lowrank.io import verify
from lowrank.measure.size import bytes_of, model_cost
from tests.seams.test_torchao import FORMS
from tests.zoo import llama, mlp, tokens


def configs() -> dict[str, Any]:
    """In eight bits; with activations coded too; in four bits, which torchao holds in eight."""
    from torchao import quantization as ao

    four = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerAxis(0))
    return {
        "int8": ao.Int8WeightOnlyConfig(),
        "dynamic": ao.Int8DynamicActivationInt8WeightConfig(),
        "int4": four,
        "float8": ao.Float8WeightOnlyConfig(),
    }


def quantized(model: nn.Module, config: Any) -> Any:
    """A copy; torchao cannot take a weight of one column."""
    from torchao.quantization import quantize_

    made = copy.deepcopy(model)
    quantize_(made, config, lambda m, _: type(m) is nn.Linear and m.in_features > 1)
    return made


def codes(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if type(p).__module__.startswith("torchao")]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(2, 6)).logits


def check_transformers(model: Any, config: Any, folder: Path) -> tuple[int, int]:
    """Bytes of the quantized weights, and of the numbers that they stand for."""
    from transformers import AutoModelForCausalLM

    small = quantized(model, config)
    want = logits(small)
    small.save_pretrained(folder, max_shard_size="100KB")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again), want)
    assert [type(p) for p in codes(again)] == [type(p) for p in codes(small)]
    assert verify(folder).quantized == len(codes(small)) > 6
    stored = [t for path in folder.glob("*.safetensors") for t in load_file(path).values()]
    guards = [t for t in stored if t.shape == (1,) and t.is_floating_point()]
    assert bytes_of(stored) - bytes_of(guards) == model_cost(small, []).bytes
    difference = logits(lowrank.to_dense(again)) - want
    assert float(difference.norm() / want.norm()) < 0.03  # dynamic ones round activations too
    return bytes_of(codes(small)), sum(p.numel() * p.dtype.itemsize for p in codes(small))


def check_any_module(method: str, config: Any, folder: Path) -> None:
    x = torch.randn(64, 24)
    net = lowrank.compress(mlp(24, 40, 16), 0.6, method=method, data=[x], progress=False)[0]
    small = quantized(net, config)
    lowrank.save(small, folder)
    again = lowrank.load(folder, mlp(24, 40, 16))
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
    assert len(codes(again)) == len(codes(small)) > 1


def main() -> None:
    where, every = Path(sys.argv[1]), configs()
    for form, options in FORMS.items():
        # One layer stays dense, and is quantized beside the factored ones.
        asked = {**options, "exclude_modules": "v_proj"} if form != "shared" else options
        tiny = llama(num_hidden_layers=1).eval()
        model = lowrank.compress(tiny, 0.6, progress=False, **asked)[0]
        check_transformers(model, every["int8"], where / form)
    for method in ("lowrank-sparse", "dense-sparse"):
        check_any_module(method, every["int8"], where / method)
    # Wide enough for scales to be few beside codes; the head is untied once it is quantized.
    wide = {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": True}
    dense = llama(**wide).eval()
    model = lowrank.compress(copy.deepcopy(dense), 0.6, data=None)[0]
    for name, config in every.items():
        small, large = check_transformers(model, config, where / name)
        print(f"{name} of float32: {small / large:.3f}")
        assert small < 0.28 * large
    model.to(torch.bfloat16)
    model.model.rotary_emb = dense.model.rotary_emb  # which models in 16 bits have in 32
    small, large = check_transformers(model, every["int8"], where / "bfloat16")
    print(f"int8 of bfloat16: {small / large:.3f}")
    assert small < 0.55 * large


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")  # torchao's own
    main()
