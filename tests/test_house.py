"""Rules of the house, read from the source: what is loose, circles, names, lengths, contracts."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import fields

import pytest

from lowrank import types
from lowrank.api.arguments import ARGUMENTS
from lowrank.api.estimating import Estimating
from lowrank.api.request import Compression, Request, Sweeping
from lowrank.nn import Form
from tests.test_layers import LIBRARY, RANK, Sources, imported, layer, packages, sources

LOOSE = {"errors", "tables", "types", "plots", "demo", "__main__"}
LONGEST = 60  # lines of code of a function, without its docstring
# The figures are called after what they show, and a verb may be called after what it gives.
DRAWINGS = {"plots", "page.figures"}
VERBS = {("api.verbs", "plan")}
# What a method, a policy, a module or a controller says of itself is declared, not looked for.
CONTRACTS = {
    name
    for contract in (*vars(types).values(), Form)
    if getattr(contract, "_is_protocol", False) or contract is Form
    for name in (*vars(contract), *contract.__annotations__)
    if not name.startswith("_")
}


@pytest.fixture(scope="module")
def files() -> Sources:
    return sources()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def circles(files: Sources) -> list[str]:
    """Rings of files that import each other, at whatever place in the file."""
    reads = {
        name: {t for node in ast.walk(ast.parse(text)) for t in imported(name, node, files)}
        for name, text in files.items()
    }
    doors = packages(files)
    # A file reaches what lies behind a door of its own room by the file itself, not by the door.
    graph = {
        name: {t for t in targets if t != name and not (t in doors and layer(t) == layer(name))}
        for name, targets in reads.items()
        if name not in doors
    }
    left = dict(graph)
    while True:
        done = [name for name, targets in left.items() if not targets & left.keys()]
        if not done:
            return sorted(left)
        for name in done:
            del left[name]


def through_their_own_door(files: Sources) -> list[str]:
    """Files that import from the package they lie in: the door has not been opened then."""
    return [
        f"{name}:{node.lineno}"
        for name, text in files.items()
        if name not in packages(files) and "." in name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
        and any(t == name.rpartition(".")[0] for t in imported(name, node, files))
        and name not in BEHIND
    ]


# They fill or read a registry that stands at the door, which imports none of them.
BEHIND = {"methods.resolved"}


def long(files: Sources) -> list[str]:
    found = []
    for name, text in files.items():
        code = [line.strip() for line in text.split("\n")]
        for function in functions(ast.parse(text)):
            first = function.body[0]
            said = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            start = (first.end_lineno or 0) + 1 if said else first.lineno
            body = code[start - 1 : function.end_lineno]
            lines = sum(bool(line) and not line.startswith("#") for line in body)
            if lines > LONGEST:
                found.append(f"{name}.{function.name}: {lines} lines")
    return found


def homonyms(files: Sources) -> list[str]:
    """Public functions that are called as a module is."""
    modules = {name.rpartition(".")[2] for name in files} - {""}
    return [
        f"{name}.{node.name}"
        for name, text in files.items()
        if name not in DRAWINGS
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name in modules
        if (name, node.name) not in VERBS
    ]


def shadows(files: Sources) -> list[str]:
    """Names at a door behind which a module of that name stands: `import a.b as b` gives the
    other one."""
    wrong = []
    for door in packages(files) & files.keys():
        inside = {n.rpartition(".")[2] for n in files if n and n.rpartition(".")[0] == door}
        for node in ast.parse(files[door]).body:
            if isinstance(node, ast.ImportFrom) and (node.level != 1 or node.module):
                wrong += [
                    f"{door}.{alias.asname or alias.name}"
                    for alias in node.names
                    if (alias.asname or alias.name) in inside
                ]
    return wrong


def looked_for(files: Sources) -> list[str]:
    """`getattr` and `hasattr` of what a contract declares."""
    return [
        f"{name}:{node.lineno} looks for {node.args[1].value!r}"
        for name, text in files.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("getattr", "hasattr")
        and isinstance(node.args[1], ast.Constant)
        and node.args[1].value in CONTRACTS
    ]


def test_few_modules_stand_beside_the_rooms(files: Sources) -> None:
    assert {name for name in files if "." not in name} - packages(files) == LOOSE


def test_every_door_says_what_is_behind_it(files: Sources) -> None:
    for door in packages(files):
        said = ast.get_docstring(ast.parse(files[door]))
        assert said, door
        assert said.split("\n")[0].endswith((".", "`")), door


def test_contributing_shows_the_order_whole() -> None:
    text = (LIBRARY.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = re.findall(r"(?m)^\| `(\w+)` \|", text.partition("## Where does")[0])
    assert sorted(rooms, key=RANK.__getitem__) == rooms
    assert set(rooms) == set(RANK)


def test_files_that_contributing_names_are_there() -> None:
    text = (LIBRARY.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/*])((?:\w+/)+\w+\.py)", text)) - {"lowrank/methods/halves.py"}
    named -= {"tests/methods/test_halves.py"}
    for file in named:
        assert (LIBRARY / file).exists() or (LIBRARY.parent / file).exists(), file
    assert len(named) > 20


def test_no_files_import_in_a_circle(files: Sources) -> None:
    assert circles(files) == []
    assert through_their_own_door(files) == []


def test_functions_are_short(files: Sources) -> None:
    assert long(files) == []


def test_a_name_is_one_thing(files: Sources) -> None:
    assert homonyms(files) == []
    assert shadows(files) == []


def test_contracts_are_declared(files: Sources) -> None:
    assert {"own_form", "error", "output_metric", "judges", "WORDS", "SHARES"} <= CONTRACTS
    assert looked_for(files) == []


def test_every_argument_is_explained_once() -> None:
    asked = {
        f.name for request in (Request, Compression, Sweeping, Estimating) for f in fields(request)
    }
    assert asked == set(ARGUMENTS)


@pytest.mark.parametrize(
    ("check", "files", "said"),
    [
        (circles, {"": "", "io": "", "io.a": "from .b import x", "io.b": "from .a import y"},
         ["io.a", "io.b"]),
        (circles, {"": "", "io.a": "def f():\n from ..nn import b", "nn": "", "nn.b": "from ..io "
         "import a"}, ["io.a", "nn.b"]),
        (through_their_own_door, {"": "", "io": "from .a import x", "io.a": "from . import y"},
         ["io.a:1"]),
        (long, {"a": "def f():\n 'said'\n" + " x = 1\n" * 61}, ["a.f: 61 lines"]),
        (homonyms, {"": "", "walk.sites": "def layouts(): ...", "walk.layouts": ""},
         ["walk.sites.layouts"]),
        (shadows, {"": "", "api": "from .plan import plan", "api.plan": ""}, ["api.plan"]),
        (looked_for, {"a": "getattr(method, 'own_form', '')"}, ["a:1 looks for 'own_form'"]),
    ],
)  # fmt: skip
def test_the_checks_can_fail(check: object, files: Sources, said: list[str]) -> None:
    assert check(files) == said  # type: ignore[operator]


def test_benchmarks_and_recipes_name_what_exists() -> None:
    """They run for minutes and not in every check: a name that was moved would go unseen."""
    root = LIBRARY.parent
    missing = [
        f"{path.name}: {node.module}.{name.name}"
        for folder in ("benchmarks", "recipes")
        for path in sorted((root / folder).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lowrank"
        for name in node.names
        if not exists(str(node.module), name.name)
    ]
    assert missing == []


def exists(module: str, name: str) -> bool:
    """Whether a module has a name, or a module of that name in it."""
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        return importlib.util.find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError:  # the module is a file
        return False
