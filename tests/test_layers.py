"""The order of the layers, read from the source: imports point one way, and nothing heavy is near.

Every file is parsed with ast; nothing is imported. The checks take sources as text, so that each
is also tried on a small violation: it has to be able to fail.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[1] / "lowrank"
TOP = "__init__"  # of the package: the public surface

# Layers from below to above: a file imports only from its own layer and from those before it. A
# package is one layer; entries on one line do not import each other.
ORDER = """
    errors
    types
    tables
    linalg
    nn
    walk
    policies plans
    calibration
    methods
    measure
    io
    engines
    recover
    train
    page
    api
    diagnose
    plots
    testing
    demo
    __init__
    cli
    __main__
"""
RANK = {layer: i for i, line in enumerate(ORDER.split("\n")) for layer in line.split()}

HEAVY = {"transformers", "accelerate", "huggingface_hub", "safetensors", "typer", "rich"}
HEAVY |= {"matplotlib", "onnx"}
# Files that may import these at module level: they are themselves imported only when needed.
LAZY = {"io.hf": {"transformers"}, "cli": {"typer", "rich"}, "train.callback": {"transformers"}}
TALKATIVE = frozenset({"demo", "cli"})  # layers that may print

# Words that belong to one architecture; a short one counts only where it stands alone.
FAMILIES = ("llama", "gpt2", "gptneo", "gptj", "qwen", "mistral", "mixtral", "bert", "roberta")
FAMILIES += ("gemma", "falcon", "resnet", "swin", "whisper", "mamba", "deepseek", "phi3")
SHORT = frozenset({"gpt", "opt", "t5", "vit", "phi", "deit", "bloom", "olmo"})
# Layers that may name one: they carry a model of their own, which is of some architecture.
MODELS = frozenset({"demo"})

Sources = Mapping[str, str]  # module name below the package ("io.hf"; "" for the root) -> source


def sources(folder: Path = LIBRARY) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


@cache
def parsed(source: str) -> ast.Module:
    return ast.parse(source)


def layer(module: str) -> str:
    return module.partition(".")[0] or TOP


def packages(files: Sources) -> set[str]:
    return {"", *(name.rpartition(".")[0] for name in files)}


def imported(name: str, node: ast.AST, files: Sources, package: str = "lowrank") -> Iterator[str]:
    """Modules of the package that one import statement in the module `name` reaches."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            first, _, rest = alias.name.partition(".")
            if first == package:
                yield rest
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            here = name if name in packages(files) else name.rpartition(".")[0]
            parts = here.split(".") if here else []
            base = parts[: len(parts) - node.level + 1]
            base += node.module.split(".") if node.module else []
        elif node.module and node.module.partition(".")[0] == package:
            base = node.module.split(".")[1:]
        else:
            return
        for alias in node.names:  # `from . import svd` is the module svd where there is one
            inner = ".".join([*base, alias.name])
            yield inner if inner in files else ".".join(base)


def upward(files: Sources) -> list[str]:
    """Imports that point up, anywhere in a file, and files of no layer."""
    wrong = [
        f"{name}: give the layer a place in ORDER" for name in files if layer(name) not in RANK
    ]
    for name, source in files.items():
        for node in ast.walk(parsed(source)):
            for target in imported(name, node, files):
                below, here = RANK.get(layer(target), -1), RANK.get(layer(name), -1)
                beside = below == here and layer(target) != layer(name)
                if below > here or beside:
                    line = getattr(node, "lineno", 0)
                    wrong.append(f"{name or '__init__'}:{line} imports {target or '__init__'}")
    return wrong


def at_module_level(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that run on import: not those in functions, nor under TYPE_CHECKING."""
    waiting: list[ast.AST] = [*tree.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def others(node: ast.AST) -> set[str]:
    """First names of the outside packages that one import statement reaches."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        return {node.module.partition(".")[0]}
    return set()


def loaded_with(start: str, files: Sources) -> set[str]:
    """Every module that `import` of `start` runs, parents included."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in found or name not in files:
            continue
        found.add(name)
        waiting.append(name.rpartition(".")[0])
        for node in at_module_level(parsed(files[name])):
            waiting += imported(name, node, files)
    return found


def heavy(files: Sources) -> list[str]:
    """Heavy packages imported at module level: by `import lowrank`, or outside of LAZY."""
    near = loaded_with("", files)
    wrong = []
    for name, source in files.items():
        allowed = set() if name in near else LAZY.get(name, LAZY.get(layer(name), set()))
        for node in at_module_level(parsed(source)):
            wrong += [f"{name} imports {other}" for other in others(node) & HEAVY - set(allowed)]
    return wrong


def prints(files: Sources) -> list[str]:
    return [
        f"{name}:{node.lineno} prints"
        for name, source in files.items()
        if layer(name) not in TALKATIVE
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write")
    ]


def words(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Identifiers and string literals, docstrings and bare strings left out."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.value, line
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value, line


def architectures(files: Sources) -> list[str]:
    wrong = []
    for name, source in files.items():
        if layer(name) in MODELS:
            continue
        for text, line in words(parsed(source)):
            apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
            for word in re.split(r"[^a-z0-9]+", apart.lower()):
                if word in SHORT or word.startswith(FAMILIES):
                    wrong.append(f"{name}:{line} names {word!r}")
    return wrong


def test_the_whole_library_is_read() -> None:
    found = sources()
    assert {"", "errors", "types", "linalg", "linalg.svd", "io.hf", "api"} <= set(found)


def test_imports_point_one_way() -> None:
    assert upward(sources()) == []


def test_importing_the_library_loads_nothing_heavy() -> None:
    files = sources()
    assert {"", "api", "linalg.svd", "io.registration"} <= loaded_with("", files)
    assert heavy(files) == []


def test_the_library_does_not_print() -> None:
    assert prints(sources()) == []


def test_no_architecture_is_named() -> None:
    assert architectures(sources()) == []


def test_the_suite_needs_no_pytest() -> None:
    trees = {name: parsed(source) for name, source in sources().items()}
    users = [n for n, tree in trees.items() for node in ast.walk(tree) if "pytest" in others(node)]
    assert users == []


# A tiny library in order, and what breaks it.
GOOD = {
    "": "from .api import plan as plan",
    "errors": "",
    "policies": "",
    "linalg": "from .svd import factor as factor",
    "linalg.svd": '"""Used on Llama."""\nfrom ..errors import oops',
    "io": "",
    "io.hf": "import transformers",
    "api": "from . import linalg\nfrom .linalg import svd\n\ndef plan():\n    from .io import hf",
    "cli": "import typer\nfrom . import __version__\nprint(1)",
}


@pytest.mark.parametrize(
    ("check", "module", "line", "said"),
    [
        (upward, "linalg.svd", "from ..api import plan", "linalg.svd:3 imports api"),
        (upward, "linalg.svd", "from .. import api", "linalg.svd:3 imports api"),
        (upward, "linalg.svd", "from .. import __version__", "linalg.svd:3 imports __init__"),
        (upward, "linalg.svd", "import lowrank.io.hf", "linalg.svd:3 imports io.hf"),
        (upward, "linalg.svd", "from lowrank import api", "linalg.svd:3 imports api"),
        (upward, "linalg.svd", "def f():\n    from ..io import hf", "linalg.svd:4 imports io.hf"),
        (upward, "linalg", "from ..cli import main", "linalg:2 imports cli"),
        (upward, "errors", "from .linalg import factor", "errors:1 imports linalg"),
        (upward, "plots", "from .cli import main", "plots:1 imports cli"),
        (upward, "plans", "from .policies import policy", "plans:1 imports policies"),
        (upward, "novelty", "", "novelty: give the layer a place"),
        (heavy, "linalg.svd", "import rich.table", "linalg.svd imports rich"),
        (heavy, "linalg.svd", "try:\n    import rich\nexcept: pass", "linalg.svd imports rich"),
        (heavy, "linalg.svd", "class A:\n    import rich", "linalg.svd imports rich"),
        (heavy, "api", "from .io import hf", "io.hf imports transformers"),
        (heavy, "api", "from .io.hf import x", "io.hf imports transformers"),
        (
            heavy,
            "measure.bench",
            "from matplotlib import pyplot",
            "measure.bench imports matplotlib",
        ),
        (prints, "linalg.svd", "def f():\n    print(1)", "linalg.svd:4 prints"),
        (prints, "api", "import sys\nsys.stdout.write('x')", "api:7 prints"),
        (architectures, "api", "name = 'LlamaForCausalLM'", "api:6 names 'llama'"),
        (architectures, "api", "from x import GPT2Model", "api:6 names 'gpt2model'"),
        (architectures, "api", "model.bert_layer", "api:6 names 'bert'"),
        (architectures, "api", "f(opt=1)", "api:6 names 'opt'"),
        (architectures, "api", "x = f'{y}.t5'", "api:6 names 't5'"),
    ],
)
def test_each_check_can_fail(check, module: str, line: str, said: str) -> None:
    assert check(GOOD) == []
    broken = {**GOOD, module: f"{GOOD.get(module, '')}\n{line}".lstrip("\n")}
    assert any(found.startswith(said) for found in check(broken)), check(broken)


def test_what_is_not_run_on_import_is_left_alone() -> None:
    late = "def f():\n    import rich\n"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich\n"
    for body in (late, typed):
        assert heavy({**GOOD, "linalg.svd": body}) == []
    assert architectures({**GOOD, "api": '"""gpt2"""\noptimal = vital = 1  # opt, vit\n'}) == []
