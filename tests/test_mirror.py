"""Where every source file is tested: at the mirrored path, or where this map says.

`lowrank/linalg/svd.py` is tested by `tests/linalg/test_svd.py`. A file without such a mirror stands
in ELSEWHERE, with a test file and a name that it, or a helper of it, mentions: one that the source
file defines, or a file that leads to it by imports. A test file that mirrors none is a TOPIC.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Source file below lowrank/ -> test file below tests/, a name that it mentions.
ELSEWHERE = {
    "api/arguments.py": ("test_house.py", "ARGUMENTS"),
    "api/deciding.py": ("api/test_names.py", "decide"),
    "api/signatures.py": ("api/test_request.py", "compress"),
    "api/footprint.py": ("api/test_estimating.py", "scratch_bytes"),
    "api/grouping.py": ("methods/test_basis_sharing.py", "compress"),
    "api/jobs.py": ("api/test_estimating.py", "job_of"),
    "api/positions.py": ("api/test_macs.py", "plan"),
    "api/verbs.py": ("api/test_applying.py", "compress"),
    "api/workload.py": ("api/test_estimating.py", "estimate"),
    "calibration/by_block.py": ("calibration/test_chain.py", "gradients_by_block"),
    "calibration/gradients.py": ("api/test_work.py", "Gradients"),
    "calibration/gathering.py": ("api/test_work.py", "_Gather"),
    "calibration/digests.py": ("calibration/test_file.py", "load_calibration"),
    "cli/__init__.py": ("cli/test_errors.py", "app"),
    "cli/console.py": ("cli/test_errors.py", "hushed"),
    "cli/inputs.py": ("cli/test_looking.py", "load_model"),
    "cli/layers.py": ("cli/test_reporting.py", "app"),
    "cli/options.py": ("cli/test_changing.py", "app"),
    "diagnose/cache.py": ("diagnose/test_sensitivities.py", "sensitivity"),
    "diagnose/feature_table.py": ("diagnose/test_activations.py", "features"),
    "diagnose/layer_inputs.py": ("diagnose/test_activations.py", "features"),
    "diagnose/one_layer.py": ("diagnose/test_sensitivities.py", "sensitivity"),
    "diagnose/sensitivity_table.py": ("diagnose/test_sensitivities.py", "Sensitivity"),
    "diagnose/spectrum.py": ("diagnose/test_inspection.py", "inspect"),
    "engines/products.py": ("engines/test_fused.py", "put_fused"),
    "engines/vllm.py": ("engines/test_plugin.py", "LowRankConfig"),
    "engines/sglang.py": ("engines/test_plugin.py", "LowRankConfig"),
    "io/adapters.py": ("seams/test_peft.py", "name_children"),
    "io/card.py": ("io/test_pretrained.py", "from_pretrained"),
    "io/diffusers_format.py": ("seams/test_diffusers.py", "DiffusersConfig"),
    "io/import_hooks.py": ("io/test_registration.py", "install"),
    "io/ties.py": ("io/test_declaration.py", "attach"),
    "io/merging.py": ("io/test_hf.py", "densify"),
    "io/tensors.py": ("io/test_checkpoint.py", "save"),
    "linalg/tokens.py": ("api/test_own_forms.py", "compress"),
    "measure/size.py": ("api/test_storage.py", "model_cost"),
    "methods/auto.py": ("methods/test_own_forms.py", "Auto"),
    "methods/blast.py": ("methods/test_own_forms.py", "Blast"),
    "methods/conv_forms.py": ("methods/test_convolution.py", "Metric"),
    "methods/dense_sparse.py": ("methods/test_own_forms.py", "DenseSparse"),
    "methods/frequency.py": ("methods/test_tables.py", "Frequency"),
    "methods/head_aware.py": ("methods/test_tables.py", "HeadAware"),
    "methods/lowrank_masked.py": ("methods/test_own_forms.py", "LowRankMasked"),
    "methods/lowrank_sparse.py": ("methods/test_own_forms.py", "LowRankSparse"),
    "methods/sampled.py": ("methods/test_own_forms.py", "Blast"),
    "nn/blast_linear.py": ("nn/test_sparse_forms.py", "BlastLinear"),
    "nn/block_lowrank.py": ("nn/test_sparse_forms.py", "BlockLowRankLinear"),
    "nn/cp_conv.py": ("nn/test_factored_conv.py", "CPConv"),
    "nn/dense_sparse.py": ("nn/test_sparse_forms.py", "DenseSparseLinear"),
    "nn/geometry.py": ("nn/test_factored_conv.py", "Geometry"),
    "nn/last_product.py": ("nn/test_shared_linear.py", "SharedLowRankLinear"),
    "nn/lowrank_masked.py": ("nn/test_sparse_forms.py", "LowRankMaskedLinear"),
    "nn/lowrank_sparse.py": ("nn/test_sparse_forms.py", "LowRankSparseLinear"),
    "nn/spatial_conv.py": ("nn/test_factored_conv.py", "SpatialConv"),
    "nn/tubal_conv.py": ("nn/test_factored_conv.py", "TubalConv"),
    "nn/tucker_conv.py": ("nn/test_factored_conv.py", "TuckerConv"),
    "page/figures.py": ("page/test_document.py", "html"),
    "plans/schema.py": ("plans/test_plan.py", "Plan"),
    "recover/blocks.py": ("recover/test_run.py", "compress"),
    "recover/copies.py": ("recover/test_run.py", "compress"),
    "recover/written.py": ("recover/test_budget.py", "written_until"),
    "recover/streams.py": ("recover/test_sequential.py", "SequentialPass"),
    "recover/job.py": ("recover/test_run.py", "compress"),
    "recover/closed_form.py": ("recover/test_sequential.py", "recover_layers"),
    "recover/recovery.py": ("recover/test_run.py", "Recovery"),
    "testing/cases.py": ("testing/test_suite.py", "linear_case"),
    "testing/crossing.py": ("testing/test_suite.py", "check_laws"),
    "testing/error_laws.py": ("testing/test_suite.py", "laws"),
    "testing/joint_cases.py": ("testing/test_joint.py", "check_joint_method"),
    "testing/memo.py": ("testing/test_suite.py", "snapshot"),
    "testing/modules.py": ("testing/test_suite.py", "laws"),
    "testing/purity.py": ("testing/test_suite.py", "laws"),
    "walk/quantized.py": ("seams/test_gguf.py", "is_dense"),
    "train/callback.py": ("train/test_plugs.py", "LowRankCallback"),
    "train/parts/attachment.py": ("train/test_bad_input.py", "Attachment"),
    "train/parts/coding.py": ("train/test_stf.py", "STF"),
    "train/parts/cycle.py": ("train/test_dlrt.py", "DLRT"),
    "train/parts/distributed.py": ("train/test_bad_input.py", "wrapper_of"),
    "train/parts/draws.py": ("train/test_maestro.py", "Draws"),
    "train/parts/factors.py": ("train/test_maestro.py", "Maestro"),
    "train/parts/product_decay.py": ("train/test_frobenius.py", "FrobeniusDecay"),
    "train/parts/gaudi_form.py": ("train/test_gblr.py", "GaudiLinear"),
    "train/parts/latent.py": ("train/test_stf.py", "LatentWeight"),
}

# Test file below tests/ -> why it is a topic of its own.
TOPICS = {
    "test_architectures.py": "a tenth of the table of docs/architectures.md",
    "test_matrix.py": "some cells of the tables of docs/matrix.md",
    "api/test_bad_efforts.py": "What efforts make of data and models that are of no use.",
    "api/test_crossing.py": "All verbs, and what sensitivity and the probe measure, agree.",
    "api/test_parts.py": "Modules of torch that fuse their weights, through the verbs.",
    "api/test_mixtures.py": "Mixtures of experts through the verbs, of every family.",
    "api/test_families.py": "Every family of models at every effort.",
    "api/test_joint.py": "A joint method beside pivoted storage, recovery and probing policies.",
    "api/test_macs.py": "A budget in products, across planning and policies.",
    "api/test_names.py": "Names decide nothing; what judges does so on rows of its own.",
    "api/test_own_forms.py": "Forms with several sizes, from the one line to the file.",
    "api/test_own_methods.py": "Methods that are objects of the user's.",
    "api/test_processes.py": "Compression by two processes, through every room.",
    "api/test_self_calibration.py": "Compression without data, whichever verb is called.",
    "api/test_speed.py": "prefer='speed', across planning and timing.",
    "api/test_storage.py": "Pivoted storage through all verbs.",
    "api/test_work.py": "What an effort computes, and that two runs agree.",
    "cli/test_errors.py": "Errors, help and files that exist, for every command.",
    "cli/test_self_calibration.py": "Commands without data.",
    "cli/test_sweep.py": "One command, whose output, picture and cache are its own.",
    "io/test_checkpoint_errors.py": "Files that are damaged, one test each.",
    "io/test_damaged_numbers.py": "Dtypes and indices that cannot be what was saved.",
    "io/test_ecosystem.py": "Trainer, generate and peft with a model that was reloaded.",
    "io/test_pivoted.py": "One storage through every kind of file.",
    "methods/test_own_forms.py": "What the methods share whose sizes are several numbers.",
    "methods/test_tables.py": "The two methods of embeddings, compared with each other.",
    "nn/test_own_form.py": "A form that is registered from outside, all the way.",
    "nn/test_sparse_forms.py": "What the forms keep that store indices or masks.",
    "nn/test_two_factors.py": "What plain factors and their pivoted storage share.",
    "page/test_browser.py": "The page in a real browser.",
    "policies/test_own_policy.py": "A policy that is added from outside.",
    "test_bad_input.py": "Models and data that every verb refuses.",
    "test_convolutions.py": "Networks of convolutions through every verb.",
    "test_docs.py": "README and docs: their code runs and prints what they say.",
    "test_fuzz.py": "Files damaged at random: tests/fuzz.py.",
    "test_house.py": "Loose modules, circles, names, lengths and contracts of the library.",
    "test_layers.py": "The order of imports in the whole library.",
    "test_mirror.py": "This map.",
    "methods/test_low_rank_statistics.py": "Every method on inputs that say little.",
    "test_mutants.py": "Mistakes that tests must find: tests/mutants.py.",
    "test_recipes.py": "Recipes that check the library.",
    "test_robust_to_odd_models.py": "Models that share, hook or parametrize their weights.",
    "test_roster.py": "All laws of all methods: tests/roster.py.",
    "test_sizes_of_bert_and_gpt2.py": "Published sizes of two models.",
    "test_sizes_of_vgg16.py": "Published sizes of a third.",
    "test_trace.py": "What one call of compress enters: tests/trace.py.",
    "train/test_acceptance.py": "The list of the laws of training, and who holds them.",
    "train/test_bad_input.py": "What every controller refuses.",
    "train/test_own_controller.py": "A controller that is written outside.",
    "train/test_plugs.py": "Every controller in every kind of loop.",
    "train/test_resume.py": "Every controller stopped and resumed.",
    "seams/test_accelerate.py": "Factored models on devices and disks.",
    "seams/test_datasets.py": "Rows of a data set, by the protocol of the package datasets.",
    "seams/test_gguf.py": "Models that another tool quantized and transformers dequantised.",
    "seams/test_peft.py": "Adapters on what is factored; models with adapters.",
    "test_website.py": "The site of the documentation: its gallery, plots and links.",
    "walk/test_patches.py": "Rows that layers read, convolutions above all.",
    "walk/test_patterns.py": "target_modules, with peft as the oracle.",
    "seams/test_diffusers.py": "Stock diffusers saves and loads factored models.",
    "seams/test_sentence_transformers.py": "SentenceTransformer saves and loads them.",
    "seams/test_sharded.py": "FSDP2 and DDP: two processes train what one trains.",
    "seams/test_trainer.py": "transformers' Trainer and trl's on factored models.",
    "seams/test_graphs.py": "TorchScript, torch.fx and torch.export.",
    "seams/test_torchao.py": "Factored models that are quantized afterwards.",
    "seams/test_transformers_parts.py": "Whatever part is compressed, saved or loaded.",
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def below(folder: str, pattern: str) -> dict[str, Path]:
    """Files below a folder of the repository, by their path there."""
    root = ROOT / folder
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob(pattern))}


SOURCES = below("lowrank", "*.py")
TESTS = below("tests", "test_*.py")


def mirror(source: str) -> str:
    """Where a source file is tested if nothing else is said."""
    folder, _, name = source.rpartition("/")
    return f"{folder}/test_{name.strip('_').replace('__.py', '.py')}".lstrip("/")


@cache
def defined(source: str) -> set[str]:
    """Names of functions, classes and constants at the top of a file."""
    names: set[str] = set()
    for node in tree(SOURCES[source]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def has_logic(source: str) -> bool:
    """More than imports, constants and docstrings; a module's own __getattr__ is an import."""
    kinds = ast.FunctionDef | ast.ClassDef | ast.For | ast.While | ast.With | ast.Try
    return any(
        isinstance(node, kinds) and getattr(node, "name", "") != "__getattr__"
        for node in tree(SOURCES[source]).body
    )


@cache
def mentioned(test: str) -> set[str]:
    """Names that a test file and its helpers say in code: strings and comments do not count."""
    test_and_helpers = [TESTS[test], *imported(TESTS[test], ROOT / "tests")]
    return {
        name
        for path in test_and_helpers
        for node in ast.walk(tree(path))
        for name in (getattr(node, field, None) for field in ("id", "attr", "name"))
        if isinstance(name, str)
    }


@cache
def imported(file: Path, package: Path) -> frozenset[Path]:
    """Files of the package that a file of it imports, inside of functions too."""
    files: set[Path] = set()
    for node in ast.walk(tree(file)):
        if not isinstance(node, ast.ImportFrom):
            continue
        words = (node.module or "").split(".") if node.module else []
        if node.level:
            base = file.parents[node.level - 1].joinpath(*words)
        elif words[0] == package.name:
            base = package.joinpath(*words[1:])
        else:
            continue
        for alias in node.names:
            files |= set(files_of(base / alias.name)) or set(files_of(base))
    return frozenset(files)


def files_of(module: Path) -> Iterator[Path]:
    for path in (module.with_name(f"{module.name}.py"), module / "__init__.py"):
        if path.is_file():
            yield path


@cache
def reached(start: str) -> frozenset[Path]:
    """All that a source file imports, through however many files, and itself."""
    known = {SOURCES[start]}
    waiting = [SOURCES[start]]
    while waiting:
        new = imported(waiting.pop(), ROOT / "lowrank") - known
        known |= new
        waiting += new
    return frozenset(known)


def reaches(start: str, goal: str) -> bool:
    return SOURCES[goal] in reached(start)


MIRRORS = {mirror(source) for source in SOURCES}


@pytest.mark.parametrize("source", [source for source in SOURCES if has_logic(source)])
def test_every_source_file_is_tested_where_it_is_mirrored_or_mapped(source: str) -> None:
    if mirror(source) in TESTS:
        assert source not in ELSEWHERE, f"{source} has its mirror: take it out of ELSEWHERE"
        return
    assert source in ELSEWHERE, f"write tests/{mirror(source)}, or say in ELSEWHERE who tests it"
    file, name = ELSEWHERE[source]
    assert file in TESTS, f"{source}: there is no tests/{file}"
    assert name in mentioned(file), f"{source}: tests/{file} does not mention {name}"
    homes = [other for other in SOURCES if name in defined(other)]
    assert any(reaches(home, source) for home in homes), f"{source}: {name} does not lead to it"


def test_the_maps_hold_nothing_that_is_gone() -> None:
    assert set(ELSEWHERE) <= set(SOURCES)
    assert set(TOPICS) <= set(TESTS)


@pytest.mark.parametrize("file", TESTS)
def test_every_test_file_mirrors_a_source_file_or_is_a_topic(file: str) -> None:
    assert (file in MIRRORS) != (file in TOPICS), (
        f"tests/{file}: name it after what it mirrors, or give a sentence in TOPICS"
    )


def test_a_map_that_lies_is_noticed() -> None:
    assert mirror("linalg/svd.py") == "linalg/test_svd.py"
    assert mirror("io/__init__.py") == "io/test_init.py"
    assert mirror("types.py") == "test_types.py"
    assert has_logic("linalg/svd.py")
    assert not has_logic("linalg/__init__.py")
    assert reaches("api/verbs.py", "linalg/svd.py")
    assert not reaches("linalg/svd.py", "api/verbs.py")
    assert "compress" in mentioned("api/test_applying.py")
    assert "semi_nmf" not in mentioned("api/test_applying.py")
