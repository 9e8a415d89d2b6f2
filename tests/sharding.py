"""FSDP2 on tiny models of one architecture, in two processes: for `tests/matrix.py`."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests import matrix
from tests.tools import logits

STEPS, TOLERANCE = 2, 1e-6


def wide(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64, so that the order of sums does not matter."""
    return {key: v.double() if v.is_floating_point() else v for key, v in inputs.items()}


def trained(model: Any, one: matrix.Architecture, rows: slice) -> None:
    """Two steps of AdamW in eval mode, without random numbers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(STEPS):
        whole = wide(one.batch(4, step))
        labels = one.labels(whole)[rows]
        words = model(**{key: value[rows] for key, value in whole.items()}).logits
        loss = cross_entropy(words.flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def compared(name: str, form: str, lean: nn.Module) -> str:
    """ "yes" if two processes train it as one does, and what they gather is saved and loads."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    one, rank = matrix.ARCHITECTURES[name], dist.get_rank()
    alone, model = (copy.deepcopy(lean).double() for _ in range(2))
    trained(alone, one, slice(None))
    inside: set[nn.Module] = set()  # of a unit already
    for blocks in [m for m in model.modules() if isinstance(m, nn.ModuleList)]:
        for block in blocks if blocks not in inside else ():
            inside |= set(block.modules())
            fully_shard(block)
    fully_shard(model)
    trained(model, one, slice(2 * rank, 2 * rank + 2))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if rank:
        return ""
    for key, value in alone.state_dict().items():
        away = float((state[key].double() - value.double()).abs().max()) if value.numel() else 0.0
        assert away <= TOLERANCE, f"{key} differs by {away:.1e}"
    folder = Path(os.environ["FOLDER"]) / form.replace(" ", "_").replace(":", "")
    model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    again = type(lean).from_pretrained(folder, dtype=torch.float64).eval()  # type: ignore[attr-defined]
    inputs = wide(one.batch(2, 9))
    away = float((logits(again, inputs) - logits(alone, inputs)).abs().max())
    assert away <= TOLERANCE, f"reloaded it differs by {away:.1e}"
    return "yes"


def cells() -> dict[str, str]:
    """What each form says, in this process of two; asked for by the environment."""
    name, found = os.environ["ARCHITECTURE"], {}
    matrix.silence()
    for form in os.environ["FORMS"].split("|"):
        lean = matrix.compressed(name, form)
        if isinstance(lean, str):
            continue
        try:
            found[form] = compared(name, form, lean)
        except Exception as error:
            found[form] = f"fault: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        dist.barrier()
    return found
