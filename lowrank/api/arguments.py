"""Descriptions of the verbs' arguments, shared by docstrings and command-line help."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods import JOINT, METHODS
from ..policies import POLICIES


@dataclass(frozen=True)
class Argument:
    """The description of one argument.

    Attributes:
        text: shown in Python and on the command line.
        more: added in Python only.
        flag: command-line flag; "" for none.
        metavar: placeholder of the flag's value.
        typed: command-line help, where the value differs from Python's.
    """

    text: str
    more: str = ""
    flag: str = ""
    metavar: str = ""
    typed: str = ""


ARGUMENTS: dict[str, Argument] = {
    "ratio": Argument(
        "fraction of the targeted weights to keep, in (0, 1): 0.8 keeps 80 %.",
        flag="--ratio",
        metavar="RATIO",
    ),
    "ratios": Argument(
        "fractions to keep, each as `ratio` of `compress`.",
        flag="--ratios",
        metavar="RATIOS",
        typed="Fractions to keep, separated by commas.",
    ),
    "rank": Argument(
        "instead of a ratio: an integer is the rank of every layer, a decimal number in (0, 1] the "
        "share of energy that every layer keeps.",
        flag="--rank",
        metavar="RANK",
    ),
    "rank_pattern": Argument(
        "module name or regular expression -> rank; alone, or on top of ratio or rank. `align` "
        "does not apply to these ranks."
    ),
    "method": Argument(
        f"factorisation method: {', '.join((*METHODS, *JOINT))}. Default: whitened with data, "
        "given or self-written, else svd.",
        "Or an object: see `lowrank.types.Method`; docs/methods.md describes each.",
        flag="--method",
        metavar="NAME",
        typed="Factorisation method; lowrank methods lists all. Default: whitened with data, "
        "given or self-written, else svd.",
    ),
    "policy": Argument(
        f"how a ratio is divided among the layers: {', '.join(POLICIES)}. Default: uniform; "
        "for a convolutional net lossaware with data, spectrum without.",
        "Or a callable `(curves, budget, probe) -> {sites: option}`.",
        flag="--policy",
        metavar="NAME",
    ),
    "data": Argument(
        "calibration data: texts (with `tokenizer`), tensors, dicts, a loader, a callable "
        '`forward(model)`, or a `Calibration`. "self": text that a causal language model samples '
        'itself, from `seed`. "default": "self" for such models if the method needs data, else '
        "None. None does not run the model.",
        flag="--data",
        metavar="TEXT",
        typed="Calibration text. Without it, or with the word self, a causal language model "
        "writes its own.",
    ),
    "tokenizer": Argument("transformers tokenizer, needed for texts."),
    "rows": Argument(
        "read the data to this number of rows and no further, or let the model write as many. "
        "Default: a stream (a generator, loader or data set) is read to 256 rows, one of texts to "
        "256 × 256 tokens; texts, lists and tensors are taken whole; a model writes 192.",
        "A row of a text has 256 tokens.",
        flag="--rows",
        metavar="INT",
        typed="Read the text to this number of rows, or let the model write as many. Default: the "
        "whole text; a model writes 192 rows.",
    ),
    "effort": Argument(
        "how much work to do. fast: ranks by their effect on the loss, pivoted storage, layers "
        "refitted one after the other in closed form. balanced: also trains each block. best: also "
        "distils the whole model. By default layers are only replaced.",
        "An effort sets method, policy and storage unless given. Or a `Recovery`.",
        flag="--effort",
        metavar="LEVEL",
    ),
    "minutes": Argument(
        "time for the whole call, with an effort that trains: the closed form always runs whole, "
        "and training takes what it leaves, in fewer steps or, while they gain, in more. Default: "
        "the effort's own number of steps.",
        "In a sweep, the time of each ratio.",
        flag="--minutes",
        metavar="MINUTES",
    ),
    "of": Argument(
        "what the ratio is a fraction of: targets (default) or model.", flag="--of", metavar="WHAT"
    ),
    "unit": Argument(
        "what the ratio counts: params (default), bytes or macs.", flag="--unit", metavar="UNIT"
    ),
    "prefer": Argument(
        '"size" (default), or "speed": leave layers dense whose factors are not faster at the '
        "data's shape."
    ),
    "target_modules": Argument(
        "layers to compress, by name or name suffix; a single one may be a regular expression. "
        "Default all-linear: every linear layer and convolution except the output head and "
        "convolutions that read an image. all: embeddings too.",
        "A head tied to the embedding is factored with it.",
        flag="--target",
        metavar="NAME",
    ),
    "exclude_modules": Argument(
        "layers to leave dense, in the same notation.", flag="--exclude", metavar="NAME"
    ),
    "align": Argument(
        "ranks are multiples of this; 1 allows any. By default a rank is rounded down to a "
        "multiple of 8 where that costs less than 1 % of the layer's budget.",
        flag="--align",
        metavar="INT",
    ),
    "storage": Argument(
        "storage of factored linear layers: factors (default), r(m + n) numbers at rank r, or "
        "pivoted, the same matrix in r(m + n − r), so that ranks are higher at equal size.",
        "Not available where layers share a basis.",
        flag="--storage",
        metavar="NAME",
    ),
    "on_missing": Argument(
        'layers that the data did not reach: "dense" (default; they are then no targets), '
        '"data-free" (plain SVD) or "error".'
    ),
    "out": Argument(
        "folder to write the result to, where `model` is a folder or a name on the hub. Weights "
        "and statistics then stay in files, so that memory hardly grows with depth. An older "
        "result is replaced once the new one is whole."
    ),
    "length": Argument("tokens per row. Default: 256, or the model's limit if lower."),
    "seed": Argument("random seed (default 0).", flag="--seed", metavar="INT"),
    "judge": Argument(
        "texts or batches to compare predictions on, as for `kl`. Default: the held-out "
        "calibration rows, if an effort, policy or method judges; else further self-written rows, "
        "or the calibration rows.",
        flag="--judge",
        metavar="TEXT",
        typed="Text to compare predictions on. Default: the held-out calibration rows, if an "
        "effort, policy or method judges; else further self-written text, or all of --data.",
    ),
    "cache": Argument(
        "file (safetensors) that keeps statistics, spectra and rows for the next run; one made for "
        "another model or other data is refused.",
        flag="--cache",
        metavar="FILE",
    ),
    "copy": Argument("work on a deep copy."),
    "progress": Argument("show progress bars."),
}
