"""The roster: one row per method, its traits as arguments; the suite crosses laws with rows.

python -m tests.roster         # how many combinations of law, method, case and dtype it holds
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from lowrank.linalg.tensor_train import column_sides, row_sides
from lowrank.methods import JOINT, METHODS
from lowrank.testing import (
    CASES,
    DTYPES,
    JOINT_CASES,
    JOINT_LAWS,
    Law,
    check_laws,
    laws,
    low_rank_weight,
)
from lowrank.types import Method, Size


def lines(out_features: int, in_features: int, rng: torch.Generator) -> tuple[Tensor, Size]:
    """Rows on three lines: one coefficient each, on three atoms."""
    atoms = torch.randn(3, in_features, generator=rng, dtype=torch.float64)
    scale = torch.randn(out_features, 1, generator=rng, dtype=torch.float64)
    return scale * atoms[torch.arange(out_features) % 3], (3, 1)


def one_channel(out_features: int, in_features: int, rng: torch.Generator) -> tuple[Tensor, Size]:
    """Rank two, and one input of its own."""
    weight, _ = low_rank_weight(2)(out_features, in_features, rng)
    weight[:, 1] += torch.randn(out_features, generator=rng, dtype=torch.float64)
    return weight, (2, 1)


def one_more(out_features: int, in_features: int, rng: torch.Generator) -> tuple[Tensor, Size]:
    """Rank one, which leaves nothing to the fewest entries of a curve."""
    weight, _ = low_rank_weight(1)(out_features, in_features, rng)
    return weight, (1, max(1, round(out_features * in_features / 100)))


def half(out_features: int, in_features: int, rng: torch.Generator) -> tuple[Tensor, Size]:
    """Rank one, which leaves nothing to 2:4."""
    weight, _ = low_rank_weight(1)(out_features, in_features, rng)
    groups, rest = divmod(in_features, 4)
    return weight, (1, out_features * (2 * groups + -(-2 * rest // 4)))


def alike(out_features: int, in_features: int, rng: torch.Generator) -> tuple[Tensor, Size]:
    """Every input and every place under the kernel alike: one component, however they are split."""
    return torch.randn(out_features, 1, generator=rng, dtype=torch.float64).expand(
        -1, in_features
    ).clone(), (1,)


def blocks(out_features: int, in_features: int, rng: torch.Generator) -> tuple[Tensor, Size]:
    """Low rank is one case of shared-basis blocks."""
    weight, _ = low_rank_weight(2)(out_features, in_features, rng)
    return weight, (min(out_features, in_features) // 4, 2)


def on_a_grid(out_features: int, in_features: int, rng: torch.Generator) -> tuple[Tensor, Size]:
    """Eight numbers at even distances in every row, of which the first is as far as they go."""
    codes = torch.randint(8, (out_features, in_features), generator=rng).double()
    codes[:, 0] = 0
    sizes = 2.0 ** torch.randint(-2, 3, (out_features, 1), generator=rng)
    return sizes * (codes - 4), (3, in_features)


def two_tables(out_features: int, in_features: int, rng: torch.Generator) -> tuple[Tensor, Size]:
    """Rows that are products of a row by quotient and a row by remainder; the first few are zero,
    among them whatever is padding."""
    remainders = math.isqrt(out_features - 1) + 1
    quotient = torch.randn(-(-out_features // remainders), in_features, generator=rng).double()
    remainder = torch.randn(remainders, in_features, generator=rng).double()
    quotient[0] = 0
    ids = torch.arange(out_features)
    table = quotient[ids // remainders] * remainder[ids % remainders]
    return table, (remainders, in_features)


def three_cores(out_features: int, in_features: int, rng: torch.Generator) -> tuple[Tensor, Size]:
    """A tensor train of ranks 2; the first few rows are zero, among them whatever is padding, and
    the last where there are more than the table's."""
    (n1, n2, n3), (d1, d2, d3) = row_sides(out_features), column_sides(in_features)
    first, middle, last = (
        torch.randn(shape, generator=rng, dtype=torch.float64)
        for shape in ((n1, d1, 2), (n2, d2, 2, 2), (n3, d3, 2))
    )
    first[0] = 0
    if n1 * n2 * n3 > out_features:
        first[-1] = 0
    table = torch.einsum("ajr,bkrs,cls->abcjkl", first, middle, last)
    return table.reshape(n1 * n2 * n3, in_features)[:out_features], (2, 2)


# Sizes of two numbers are no ranks of the matrix, and `first` works at the input's positions.
OF_CONVOLUTIONS = laws(low_rank=False, plain_products=False)
OF_ONE_COMPONENT = laws(low_rank=False, plain_products=False, planted=alike)

ROSTER: dict[str, dict[str, Law]] = {
    "svd": laws(),
    "whitened": laws(),
    "two-sided": laws(),
    "asvd": laws(),
    "fwsvd": laws(),
    "snmf": laws(planted=low_rank_weight(2, positive=True)),
    "nystrom": laws(),
    "whitened-nystrom": laws(),
    "cur": laws(),
    "whitened-cur": laws(),
    "frequency": laws(),
    "head-aware": laws(),
    "tucker": OF_CONVOLUTIONS,
    "channel": OF_CONVOLUTIONS,
    "spatial": OF_CONVOLUTIONS,
    "cp": OF_ONE_COMPONENT,
    "whitened-channel": OF_CONVOLUTIONS,
    "whitened-tucker": OF_CONVOLUTIONS,
    "whitened-spatial": OF_CONVOLUTIONS,
    "whitened-conv": OF_CONVOLUTIONS,
    "tubal": OF_ONE_COMPONENT,
    "whitened-tubal": OF_ONE_COMPONENT,
    "two-sided-tucker": OF_CONVOLUTIONS,
    "two-sided-conv": OF_CONVOLUTIONS,
    "two-sided-stored": OF_CONVOLUTIONS,
    "quotient-remainder": laws(low_rank=False, planted=two_tables),
    "tensor-train": laws(low_rank=False, planted=three_cores),
    "random": laws(planted=None),  # it gives the trained weight up
    "dense-sparse": laws(low_rank=False, planted=lines, plain_products=False),  # it gathers too
    "lowrank-sparse": laws(low_rank=False, planted=one_channel),
    "auto": laws(),  # of the forms in QUICK
    "blast": laws(low_rank=False, planted=blocks),
    "lowrank-masked": laws(low_rank=False, planted=one_more),
    "lowrank-2:4": laws(low_rank=False, planted=half),
    "spectral-masked": laws(low_rank=False, planted=one_more),
    "quantized": laws(low_rank=False, planted=on_a_grid),
}

JOINT_ROSTER = {"basis-sharing": JOINT_LAWS}

# Methods that draw what they make at random, so that a seed changes it.
DRAWN = {"random", "nystrom", "whitened-nystrom"}

# Options that the laws are run with, where those of the registry take long.
QUICK: dict[str, dict[str, Any]] = {
    "snmf": {"iterations": 8},
    "blast": {"sweeps": 4},
    "dense-sparse": {"iterations": 4},
    "lowrank-masked": {"iterations": 8},
    "lowrank-2:4": {"iterations": 8},
    "spectral-masked": {"iterations": 8},
    "auto": {"forms": ("factors", "pivoted")},
    "quantized": {"bits": (3,), "groups": (0,), "factor_bits": (8,), "rounds": 0},
}

KINDS = {name: make(dtype=torch.float64).site.kind for name, make in CASES.items()}


def method_of(name: str) -> Method:
    """As the laws are run with it."""
    return METHODS[name](**QUICK.get(name, {}))


def cases_of(name: str) -> list[str]:
    """The cases of the kinds that a method takes."""
    return [case for case, kind in KINDS.items() if kind in METHODS[name]().kinds]


# One test each, for all laws of its method: everything is made once for them.
ROWS = [(name, case, dtype) for name in ROSTER for case, dtype in product(cases_of(name), DTYPES)]
JOINT_ROWS = list(product(JOINT_ROSTER, JOINT_CASES, DTYPES))


def hold(name: str, case: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """A method against all its laws on one case."""
    check_laws(method_of(name), CASES[case](dtype=dtype, device=device), ROSTER[name])


def hold_joint(name: str, case: str, dtype: torch.dtype) -> None:
    check_laws(JOINT[name](), JOINT_CASES[case](dtype=dtype), JOINT_ROSTER[name])


def combinations() -> int:
    """Of law, method, case and dtype, in all rows."""
    single = sum(len(ROSTER[name]) for name, _, _ in ROWS)
    return single + sum(len(JOINT_ROSTER[name]) for name, _, _ in JOINT_ROWS)


if __name__ == "__main__":
    print(f"{combinations()} combinations of law, method, case and dtype")
