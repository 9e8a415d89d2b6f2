"""Going on after a kill: the finished pieces of a call from folder to folder, beside its output.

`.OUT.unfinished` holds a journal, the statistics, the plan, and each block once it is refitted. It
belongs to one call, known by a digest of model, options and versions; statistics also by that of
the data. It is gone when the result is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..calibration.batches import read_rows
from ..calibration.digests import data_print, model_print
from ..calibration.file import load_calibration, save_calibration
from ..calibration.statistics import SELF, Calibration
from ..errors import LowrankError, listed
from ..plans.plan import Plan, versions
from ..recover.journal import NAME, Journal
from .from_disk import bring_back

CALL = "call.json"
NEUTRAL = frozenset({"data", "tokenizer", "progress", "copy", "out"})  # seen in the data's digest


class OtherData(LowrankError):
    """The data is not that of the unfinished work, which stays."""


@dataclass
class Work:
    """The finished pieces of a call.

    Attributes:
        journal: of what is finished.
        data: digest of the data; "" if it shows no rows, and statistics are not kept.
    """

    journal: Journal
    data: str = ""

    @property
    def folder(self) -> Path:
        return self.journal.folder

    def read(self, data: Any, tokenizer: Any, rows: int | None) -> Any:
        """The data to calibrate on, read once, so that its digest is known.

        Raises:
            LowrankError: it is not what the finished pieces were made from.
        """
        if data is None or isinstance(data, Calibration):
            self._check_data()
            return data
        if isinstance(data, str) and data in (SELF, "default"):
            self.data = "self"
            self._check_data()
            return data
        reading = read_rows(data, tokenizer, rows=rows)
        if not callable(reading.batches):
            self.data = data_print(reading.batches)
        self._check_data()
        return reading

    def statistics(self, model: nn.Module) -> Calibration | None:
        """The calibration that an earlier call has finished, if any."""
        path = self.folder / "calibration"
        index = path / "calibration.safetensors"
        if not self.data or not self.journal.has("calibration", index):
            return None
        return load_calibration(path, model)

    def keep_statistics(self, calibration: Calibration, model: nn.Module) -> Calibration:
        """The calibration as it is read from its folder, so that the matrices are kept once."""
        if not self.data:
            return calibration
        path = self.folder / "calibration"
        save_calibration(calibration, path, model)
        (self.folder / "data.txt").write_text(self.data, encoding="utf-8")
        self.journal.finished("calibration", path / "calibration.safetensors")
        return load_calibration(path, model)

    def plan(self) -> Plan | None:
        """The plan that an earlier call has finished, if any."""
        path = self.folder / "plan.json"
        return Plan.load(path) if self.data and self.journal.has("plan", path) else None

    def keep_plan(self, plan: Plan) -> None:
        if self.data:
            plan.save(self.folder / "plan.json")
            self.journal.finished("plan", self.folder / "plan.json")

    def _check_data(self) -> None:
        path = self.folder / "data.txt"
        if path.is_file() and path.read_text(encoding="utf-8") != self.data:
            raise OtherData(
                f"{self.folder} holds unfinished work on other data: pass the same rows to go on, "
                "or delete it"
            )


def unfinished_at(out: Path) -> Path:
    """Where the work towards an output folder is kept until it is whole."""
    return out.parent / f".{out.name}.unfinished"


@contextmanager
def unfinished(out: Path, model: nn.Module, options: Mapping[str, Any]) -> Iterator[Work]:
    """The work of a call; its folder is deleted at the end, and after an error in the arguments.

    A kill, a full disk or another failure of the machine leaves it, and the same call goes on.

    Args:
        options: the arguments of the call, by name.

    Raises:
        LowrankError: the place cannot be written, another process is at work there, or it holds
            unfinished work of another call.
    """
    folder = unfinished_at(out)
    call = _call(model, options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise LowrankError(f"{out} cannot be written: {error.strerror}") from error
    with lock:
        _lock(lock, folder)
        bring_back(out, folder)
        _check_call(folder, call)
        try:
            yield Work(Journal.read(folder))
        except OtherData:
            raise
        except LowrankError as error:
            pieces, of_machine = Journal.read(folder).pieces, isinstance(error.__cause__, OSError)
            if not pieces or ("plan" not in pieces and not of_machine):
                shutil.rmtree(folder, ignore_errors=True)
                raise
            again = f"{error}; what is finished stays in {folder}: run it again to go on"
            raise LowrankError(again) from error.__cause__
        shutil.rmtree(folder)


def _call(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a call is known by, as JSON."""
    shown = {name: _shown(value) for name, value in options.items() if name not in NEUTRAL}
    return {"options": shown, "versions": dict(versions()), "model": model_print(model)}


def _shown(value: Any) -> str:
    if isinstance(value, Plan):
        return hashlib.sha256(value.to_json().encode()).hexdigest()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}{dataclasses.asdict(value)}"
    if callable(value):  # its repr holds an address
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return repr(value)


def _check_call(folder: Path, call: dict[str, Any]) -> None:
    """Check that unfinished work is of the same call, or note it for the first time."""
    path = folder / CALL
    before = None
    if (folder / NAME).is_file() and path.is_file():
        with contextlib.suppress(ValueError):
            before = json.loads(path.read_text(encoding="utf-8"))
    if before is None:
        path.write_text(json.dumps(call, indent=1) + "\n", encoding="utf-8")
        return
    if before == call:
        return
    now, then = ({**c.get("options", {}), **c.get("versions", {})} for c in (call, before))
    changed = [f"{k}={then.get(k)}, not {v}" for k, v in now.items() if then.get(k) != v]
    what = listed(changed, 3) or "another model"
    raise LowrankError(
        f"{folder} holds unfinished work of another call ({what}): repeat that call to go on, or "
        "delete the folder to start anew"
    )


def _lock(file: Any, folder: Path) -> None:
    """Raises LowrankError if another process holds the lock; it ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise LowrankError(f"another process is at work in {folder}: wait for its end") from error
