"""What people do with a compressed model, one function a tool; `tests/matrix.py` crosses them.

A tool gets a `Case` and returns nothing, or why it has nothing to do there. Whatever it raises is
what the cell says: a LowrankError its reason, anything else a fault.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank
from lowrank.nn import BlastLinear
from lowrank.nn.expert_weights import ExpertWeights
from lowrank.walk.surgery import factored

Inputs = Mapping[str, Any]
Answer = str | None


@dataclass
class Case:
    """A compressed model of one architecture in one stored form.

    Attributes:
        lean: the model, in eval mode; a tool works on a copy.
        batch: makes inputs of so many rows from a seed, without labels.
        labels: of such inputs, for training.
        writes: it generates text.
        folder: empty, of its own.
    """

    lean: nn.Module
    batch: Callable[[int, int], dict[str, Tensor]]
    labels: Callable[[Inputs], Tensor]
    writes: bool
    folder: Path

    def copied(self) -> Any:
        return copy.deepcopy(self.lean)

    def saved(self, name: str = "model", **options: Any) -> Path:
        place = self.folder / name
        self.copied().save_pretrained(place, **options)
        return place

    def loaded(self, place: Path, **options: Any) -> Any:
        return type(self.lean).from_pretrained(place, **options).eval()  # type: ignore[attr-defined]


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def equal(found: Tensor, wanted: Tensor) -> None:
    """But for the last bit, in which products differ by where their factors lie in memory."""
    if found.is_floating_point():
        near(found, wanted, 2.0**-22)
    else:
        assert torch.equal(found, wanted)


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    away = float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    assert away <= tolerance, f"differs by {away:.1e}"


def reloads(case: Case) -> Answer:
    inputs = case.batch(2, 0)
    equal(logits(case.loaded(case.saved()), inputs), logits(case.lean, inputs))
    return None


def in_bfloat16(case: Case) -> Answer:
    def cast(inputs: Inputs) -> dict[str, Any]:
        return {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}

    model = case.loaded(case.saved(), dtype=torch.bfloat16)
    inputs = cast(case.batch(2, 0))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # Parts that a model keeps in float32 do not matter here: they are equal in both.
    near(logits(model, inputs), logits(case.lean, case.batch(2, 0)), 0.1)
    near(logits(model, inputs), logits(case.copied().to(torch.bfloat16), inputs), 0.02)
    return None


def in_shards(case: Case) -> Answer:
    place = case.saved(max_shard_size="10KB")
    assert len(list(place.glob("*.safetensors"))) > 1
    inputs = case.batch(2, 0)
    equal(logits(case.loaded(place), inputs), logits(case.lean, inputs))
    return None


def offloaded(case: Case) -> Answer:
    place, inputs = case.saved(), case.batch(2, 0)
    away = case.loaded(place, device_map={"": "disk"}, offload_folder=case.folder / "away")
    assert any(parameter.is_meta for parameter in away.parameters())
    equal(logits(away, inputs), logits(case.lean, inputs))
    return None


def generates(case: Case) -> Answer:
    """Greedy with every kind of cache, beams, and rows that are padded on the left."""
    if not case.writes:
        return "writes no text"
    model, inputs = case.copied(), case.batch(2, 0)
    asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(**inputs, **asked)
    for more in ({"use_cache": False}, {"cache_implementation": "static"}):
        equal(model.generate(**inputs, **asked, **more), greedy)
    again = case.loaded(case.saved())
    equal(again.generate(**inputs, **asked, num_beams=3), model.generate(
        **inputs, **asked, num_beams=3))  # fmt: skip
    if set(inputs) == {"input_ids"}:
        ids = inputs["input_ids"]
        padded = torch.cat([torch.zeros_like(ids[:, :2]), ids], 1)
        mask = torch.cat([torch.zeros_like(ids[:, :2]), torch.ones_like(ids)], 1)
        found = model.generate(input_ids=padded, attention_mask=mask, **asked)
        equal(found[:, 2:], greedy)
    return None


def compiles(case: Case) -> Answer:
    """One graph without a break; another for other rows and lengths, and none after that."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counts = case.copied(), []
    more = {"use_cache": False} if case.writes else {}
    if any(isinstance(module, ExpertWeights) for module in model.modules()):
        inputs = {**case.batch(2, 0), **more}
        near(logits(torch.compile(model, backend="eager"), inputs), logits(case.lean, inputs))
        return "in pieces: how many rows an expert reads depends on data"
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (2, 3, 4, 5):
        inputs = {**_cut(case.batch(rows, rows), 2 + rows), **more}
        near(logits(compiled, inputs), logits(case.lean, inputs))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[0] == 1, counts
    assert counts[1:] == [counts[1]] * 3, counts
    return None


def _cut(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Texts of that length at most."""
    return {k: v if v.is_floating_point() else v[:, :length] for k, v in inputs.items()}


def trains(case: Case) -> Answer:
    """transformers' Trainer: two steps, a checkpoint that loads."""
    from transformers import Trainer, TrainingArguments

    model = case.copied()
    whole = case.batch(4, 0)
    labels = case.labels(whole)
    rows = [{**{k: v[i] for k, v in whole.items()}, "labels": labels[i]} for i in range(4)]
    arguments = TrainingArguments(
        str(case.folder / "trained"), max_steps=2, save_steps=2, per_device_train_batch_size=2,
        learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    before = dict(case.lean.named_parameters(remove_duplicate=False))
    after = model.named_parameters(remove_duplicate=False)
    moved = {name for name, tensor in after if not torch.equal(tensor, before[name])}
    for name, module in factored(model).items():
        own = {f"{name}.{n}" for n, p in module.named_parameters() if p.requires_grad}
        # A head that reads another's table has nothing of its own, some tables are frozen.
        assert not own or moved & own, f"{name} was not trained"
    inputs = case.batch(2, 1)
    again = case.loaded(case.folder / "trained" / "checkpoint-2")
    equal(logits(again, inputs), logits(model.eval(), inputs))
    return None


def adapted(case: Case) -> Answer:
    """LoRA on the layers by the names that they had, merged into the factors; in float64, where
    rounding is nothing beside a merge that went wrong."""
    import peft

    names = [n for n, m in factored(case.lean).items() if any(True for _ in m.parameters())]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    live = peft.get_peft_model(case.copied().double(), config).eval().double()
    given = case.batch(2, 0)
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    want = logits(live, inputs)
    assert float((want - logits(case.lean, given)).abs().max()) > 1e-4
    if any(isinstance(module, BlastLinear) for module in case.lean.modules()):
        near(logits(lowrank.to_dense(live).merge_and_unload(), inputs), want, 1e-8)
        return "LoRA stands beside the layer, and is merged once that is dense"
    near(logits(live.merge_and_unload(), inputs), want, 1e-8)
    return None


def in_eight_bits(case: Case) -> Answer:
    """torchao's int8 weights, saved and loaded."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, inputs = case.copied(), case.batch(2, 0)

    def fits(module: nn.Module, _: str) -> bool:
        return type(module) is nn.Linear and min(module.weight.shape) > 1

    quantize_(model, Int8WeightOnlyConfig(), fits)
    want = logits(model, inputs)
    away = float((want - logits(case.lean, inputs)).norm() / want.norm())
    assert away < 0.1, f"differs by {away:.1e}"
    if not any(fits(module, "") for module in model.modules()):
        return "holds no nn.Linear"
    assert away > 0
    model.save_pretrained(case.folder / "codes")
    equal(logits(case.loaded(case.folder / "codes"), inputs), want)
    return None


def exported(case: Case) -> Answer:
    """torch.export, at another number of rows."""
    lowrank.export(case.lean, case.folder, "torch.export", example=case.batch(2, 0))
    inputs = case.batch(3, 1)
    program = torch.export.load(case.folder / "model.pt2").module()
    near(program(**inputs)["logits"], logits(case.lean, inputs))
    return None


def in_onnx(case: Case) -> Answer:
    """ONNX, run by onnxruntime at another number of rows."""
    import onnxruntime

    lowrank.export(case.lean, case.folder, "onnx", example=case.batch(2, 0))
    inputs = case.batch(3, 1)
    session = onnxruntime.InferenceSession(case.folder / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    near(torch.from_numpy(found[names.index("logits")]), logits(case.lean, inputs))
    return None


TOOLS: dict[str, Callable[[Case], Answer]] = {
    "save, load": reloads,
    "bf16": in_bfloat16,
    "shards": in_shards,
    "offload": offloaded,
    "generate": generates,
    "compile": compiles,
    "Trainer": trains,
    "LoRA, merge": adapted,
    "int8": in_eight_bits,
    "torch.export": exported,
    "ONNX": in_onnx,
}


def tried(tool: str, case: Case) -> str:
    """What a cell says: "yes", or why not; faults begin with "fault"."""
    try:
        with tempfile.TemporaryDirectory() as directory:
            case.folder = Path(directory)
            answer = TOOLS[tool](case)
        return "yes" if answer is None else answer
    except lowrank.LowrankError as error:
        return str(error).split("\n")[0]
    except Exception as error:
        return f"fault: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
