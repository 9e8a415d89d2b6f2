"""From folder to folder: a model's weights stay in its files, and what is made of them in others.

transformers maps the weights of a safetensors file into memory, so that the operating system reads
a block when it is used and drops it when memory is short. Statistics, factors and candidates go to
unnamed files beside the output (linalg/mapped.py). Memory that lies in no file does not
grow with depth (benchmarks/stream.py). The steps are those of every compression.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from .. import io
from ..errors import LowrankError
from ..linalg.mapped import in_files, is_in_files
from ..plans.report import Report
from ..plans.stages import stage
from ..types import Site
from ..walk.sites import find_sites

GIB = 1 << 30
SPILLED = GIB  # more than this is kept in files: memory is then for other work
SHARD = "250MB"  # a shard is copied when it is written


@dataclass(frozen=True)
class Room:
    """Where tensors live, and why.

    Attributes:
        in_memory: whether everything fits comfortably.
        needed, available: bytes.
    """

    in_memory: bool
    needed: int
    available: int
    places: ClassVar[tuple[str, str]] = ("from disk", "in memory")

    def __str__(self) -> str:
        return (
            f"{self.places[self.in_memory]}: weights, factors and statistics take "
            f"{self.needed / GIB:.1f} GiB, {self.available / GIB:.1f} GiB of memory are available"
        )


def room_for(model: nn.Module, sites: Sequence[Site] | None = None) -> Room:
    """Whether a model, its factors and all statistics take less than half of the memory."""
    layers = find_sites(model) if sites is None else sites
    weights = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    matrices = [site.shape for site in layers if not site.reason and site.kind == "linear"]
    statistics = 8 * sum(outputs**2 + inputs**2 for outputs, inputs in matrices)
    needed, available = 2 * weights + statistics, available_memory()
    return Room(2 * needed < available, needed, available)


def available_memory() -> int:
    """Bytes that this process may still take, at most what its control group allows."""
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        least = min(least, int(lines.get("MemAvailable", f"{least // 1024} kB").split()[0]) * 1024)
    group = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if all(path.is_file() for path in group):
        most = group[0].read_text().strip()
        if most.isdigit():
            least = min(least, int(most) - int(group[1].read_text()))
    return max(least, 0)


@contextmanager
def replacing(out: Path, within: Path | None = None) -> Iterator[Path]:
    """A new folder, which takes the place of `out` once the block has succeeded.

    An older result is whole until then, and stays if anything fails; files of others stay too.

    Args:
        within: an existing folder to make it in, on the same disk. Default: beside `out`.

    Raises:
        LowrankError: the place cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = out.parent if within is None else within
        bring_back(out, place)  # of a call that was killed
        fresh = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=place))
    except OSError as error:
        raise LowrankError(f"{out} cannot be written: {error.strerror}") from error
    try:
        yield fresh
        fresh.chmod(0o755)
        if out.exists():
            out.replace(place / _older(out))
        fresh.replace(out)
    except (OSError, LowrankError) as error:
        reason = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(reason, OSError):
            raise
        raise LowrankError(f"{out} cannot be written: {reason.strerror or reason}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        bring_back(out, place)


def bring_back(out: Path, place: Path) -> None:
    """What an older result held and the new one does not; all of it if there is no new one, which
    a kill between the two moves leaves."""
    old = place / _older(out)
    if not old.exists():
        return
    if not out.exists():
        old.replace(out)
        return
    _keep_others(old, out)
    shutil.rmtree(old)


def _older(out: Path) -> str:
    return f".{out.name}.older"


def _keep_others(old: Path, new: Path) -> None:
    """Move what is no part of the older result, such as a user's notes."""
    for path in old.iterdir():
        if not (new / path.name).exists() and not path.match("model*.safetensors*"):
            path.replace(new / path.name)


def check_apart(source: str | Path, out: str | Path) -> Path:
    """The output folder; raises LowrankError if it is the model's own or a file."""
    target = Path(out)
    if Path(source).exists() and target.resolve() == Path(source).resolve():
        raise LowrankError(f"{out} is the model's own folder: choose another")
    if target.exists() and not target.is_dir():
        raise LowrankError(f"{out} is a file, expected a folder")
    return target


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """A context in which large tensors live in unnamed files of a folder.

    Raises:
        LowrankError: the place cannot be written, or the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_files(folder):
            yield
    except OSError as error:
        raise LowrankError(f"{folder}: {error.strerror or error}") from error


@contextmanager
def spilling(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """A context in which statistics and factors of a model in memory live in unnamed temporary
    files, if they take more than `SPILLED` or would not fit comfortably beside it, and the disk has
    room for them.

    Args:
        sites: all of the model.
    """
    room, place = room_for(model, sites), Path(tempfile.gettempdir())
    stays = room.in_memory and room.needed <= SPILLED
    if is_in_files() or stays or shutil.disk_usage(place).free < room.needed:
        yield
        return
    with working_in(place):
        yield


def write(
    model: nn.Module,
    report: Report,
    source: str | Path,
    out: Path,
    *,
    tokenizer: Any = None,
    within: Path | None = None,
) -> Report:
    """Save a compressed model with its card and `report.json`, all or nothing.

    Args:
        within: see `replacing`.

    Returns:
        The report, with the stages and seconds up to here.
    """
    body = io.body_of(report, Path(source).name)
    with replacing(out, within) as fresh:
        with stage("writing"):
            io.save(model, fresh, tokenizer=tokenizer, card=body, max_shard_size=SHARD)
        report = report.updated()
        (fresh / "report.json").write_text(report.to_json() + "\n", encoding="utf-8")
    return report
