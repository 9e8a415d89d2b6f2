"""Files saved next to the weights: the model card, and the code for trust_remote_code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from torch import nn

from ..errors import LowrankError
from ..plans.plan import version
from ..plans.report import Report
from ..tables import markdown
from .specs import specs_of

REMOTE_FILE = "modeling_lowrank.py"
_MARK = "<!-- written by lowrank -->"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_REMOTE = '''"""Lets trust_remote_code=True load this model: install lowrank first."""

import lowrank  # noqa: F401, registers this checkpoint format with transformers
from transformers import {name} as _Base


class LowRank{name}(_Base):
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        # The stock class, so that its checkpoint conversions apply and saving copies no code.
        return _Base.from_pretrained(*args, **kwargs)
'''

_CARD = """---
library_name: transformers
{base}tags:
- lowrank
- low-rank
---
{mark}

# {name}, compressed by lowrank

{count} weight matrices of this model are stored in factored form by the Python library
lowrank {version}.

## How to load

```python
import lowrank  # registers this checkpoint format with transformers
{snippet}
```

Or `lowrank.from_pretrained("path/to/this")`, which checks that every weight is there{remote}.
Where lowrank is installed, transformers finds it by itself. Where it is not, loading fails: each
compressed layer has a weight of one element in the file, whose size fits no dense layer.
"""


def auto_classes(model: nn.Module) -> list[str]:
    """Names of transformers' Auto classes that load this model's class; [] for a custom class.

    AutoModelForPreTraining comes last: where several classes fit, users expect another one.
    """
    transformers = sys.modules["transformers"]
    if getattr(transformers, type(model).__name__, None) is not type(model):
        return []
    auto = transformers.models.auto.modeling_auto
    names = []
    for name in vars(auto):
        mapping = getattr(getattr(auto, name), "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None:
            continue
        if type(model.config) in mapping and _loads(mapping[type(model.config)], type(model)):
            names.append(name)
    return sorted(names, key=lambda name: name == "AutoModelForPreTraining")


def auto_map(name: str, classes: list[str]) -> dict[str, str]:
    """Entries of `config.json["auto_map"]` that point each Auto class to our file."""
    stem = REMOTE_FILE.removesuffix(".py")
    return dict.fromkeys(classes, f"{stem}.LowRank{name}")


def remote_code(name: str) -> str:
    """The file for trust_remote_code, around transformers' class `name`."""
    if not name.isidentifier():
        raise LowrankError(f"{name!r} is not a class name")
    return _REMOTE.format(name=name)


def body_of(report: Report, source: str = "") -> str:
    """What was asked, what came of it, and the ranks layer by layer, as markdown."""
    origin = [f"Compressed from `{source}`."] if source else []
    return "\n\n".join(["## Compression", *origin, *report.summary(), markdown(report.rows())])


def write(path: Path, model: nn.Module, classes: list[str], card: str | None) -> None:
    """Write the model card; one that lowrank did not write is kept.

    Args:
        card: its last part; by default what the model's compression reported, if it is known.
    """
    if path.exists() and _MARK not in path.read_text(encoding="utf-8"):
        return
    report = getattr(getattr(model, "hf_quantizer", None), "report", None)
    if card is None and report is not None:
        card = body_of(report)
    name = classes[0] if classes else type(model).__name__
    text = _CARD.format(
        mark=_MARK,
        base=_base_of(model),
        name=type(model).__name__,
        count=len(specs_of(model)),
        version=version(),
        snippet=(
            f'from transformers import {name}\n\nmodel = {name}.from_pretrained("path/to/this")'
        ),
        remote=", or `trust_remote_code=True`" if classes else "",
    )
    path.write_text(f"{text}\n{card.strip()}\n" if card else text, encoding="utf-8")


def _base_of(model: nn.Module) -> str:
    """The card's line that names the dense model, if that came from the hub."""
    name = str(getattr(model.config, "name_or_path", ""))
    return f"base_model: {name}\n" if _HUB_ID.fullmatch(name) and not Path(name).exists() else ""


def _loads(entry: object, wanted: type) -> bool:
    return wanted in entry if isinstance(entry, (list, tuple)) else entry is wanted
