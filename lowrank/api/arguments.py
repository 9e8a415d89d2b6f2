"""What every argument of the verbs means, said once: for Python, and for the command line."""

from __future__ import annotations

from dataclasses import dataclass

from ..methods import JOINT, METHODS
from ..policies import POLICIES


@dataclass(frozen=True)
class Argument:
    """What one argument means.

    Attributes:
        text: for Python and the command line.
        more: for Python alone.
        flag: of the command line; "" where it has none.
        metavar: what stands for the value there.
        typed: help of the command line, where that takes something else than Python.
    """

    text: str
    more: str = ""
    flag: str = ""
    metavar: str = ""
    typed: str = ""


ARGUMENTS: dict[str, Argument] = {
    "ratio": Argument(
        "fraction kept, in (0, 1): 0.8 keeps 80 % of the targeted weights.",
        flag="--ratio",
        metavar="SHARE",
    ),
    "ratios": Argument(
        "fractions kept, each as for `compress`.",
        flag="--ratios",
        metavar="SHARES",
        typed="Shares kept, with commas between them.",
    ),
    "rank": Argument(
        "instead of a ratio. An integer: the rank of every layer; a decimal number in (0, 1]: the "
        "share of energy that every layer keeps.",
        flag="--rank",
        metavar="RANK",
    ),
    "rank_pattern": Argument(
        "name or regular expression -> rank; alone, or on top of ratio or rank. Its ranks are kept "
        "as they are, whatever `align` says."
    ),
    "method": Argument(
        f"how layers are factored: {', '.join((*METHODS, *JOINT))}. By default whitened with data, "
        "given or self-written, else svd.",
        "Or an object: see `lowrank.types.Method`, and docs/methods.md for what each does.",
        flag="--method",
        metavar="NAME",
    ),
    "policy": Argument(
        f"how a ratio is shared out among the layers: {', '.join(POLICIES)}. By default uniform, "
        "and spectrum for a convolutional net without data.",
        "Or a callable `(curves, budget, probe) -> {sites: option}`.",
        flag="--policy",
        metavar="NAME",
    ),
    "data": Argument(
        "calibration data: texts (with `tokenizer`), tensors, dicts, a loader, a callable "
        '`forward(model)`, or a `Calibration`. "self": a causal language model writes the text '
        'itself, as `seed` decides. "default": "self" for such models where the method works from '
        "data, else None. None never runs the model.",
        flag="--data",
        metavar="TEXT",
        typed="Calibration text: what the layers' inputs look like. self, or not given: what a "
        "causal language model writes itself.",
    ),
    "tokenizer": Argument("a tokenizer of transformers, which texts need."),
    "effort": Argument(
        "how hard to try. fast: ranks by the loss, pivoted storage, layers refitted one after the "
        "other in closed form. balanced: also trains each block. best: also distils the whole "
        "model. By default layers are replaced, and nothing else is done.",
        "An effort sets method, policy and storage where they are not given. Or a `Recovery`.",
        flag="--effort",
        metavar="WORD",
    ),
    "of": Argument(
        "what the ratio is a share of: targets (default) or model.", flag="--of", metavar="WHAT"
    ),
    "unit": Argument(
        "what the ratio counts: params (default), bytes or macs.", flag="--unit", metavar="WHAT"
    ),
    "prefer": Argument('"speed" leaves a layer dense that is not faster at the data\'s shape.'),
    "target_modules": Argument(
        "layers to compress, by name or its ending; one alone may be a regular expression. By "
        "default all-linear: every linear layer and convolution but the output head and "
        "convolutions that read an image. all: these and embeddings too.",
        "A head that shares the embedding's weight is factored with it, once.",
        flag="--target",
        metavar="NAME",
    ),
    "exclude_modules": Argument(
        "layers to leave dense, written as the targets are.", flag="--exclude", metavar="NAME"
    ),
    "align": Argument(
        "ranks are multiples of this; 1 allows any. By default a rank is rounded down to a "
        "multiple of 8 where that loses less than 1 % of the layer's share.",
        flag="--align",
        metavar="INT",
    ),
    "storage": Argument(
        "of factored linear layers: factors (default), r(m + n) numbers at rank r, or pivoted: the "
        "same matrices in r(m + n − r), so that ranks are higher at equal size.",
        "Not where layers share a basis.",
        flag="--storage",
        metavar="FORM",
    ),
    "on_missing": Argument(
        'what becomes of layers that the data did not reach: "dense", "data-free" or "error".'
    ),
    "seed": Argument("random seed (default 0).", flag="--seed", metavar="INT"),
    "judge": Argument(
        "texts or batches on which predictions are compared, as for `kl`. By default the "
        "calibration rows that were held out, where an effort, policy or method judges; else more "
        "rows that the model writes itself, or those that the statistics come from.",
        flag="--judge",
        metavar="TEXT",
        typed="Text on which predictions are compared. By default the calibration rows that were "
        "held out, where an effort, policy or method judges; else more that the model writes, or "
        "all rows of --data.",
    ),
    "cache": Argument(
        "a file (safetensors) for statistics, spectra and rows, read the next time; one made for "
        "another model or other data is refused.",
        flag="--cache",
        metavar="FILE",
    ),
    "copy": Argument("work on a deep copy."),
    "progress": Argument("show progress bars."),
}
