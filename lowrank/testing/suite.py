"""Which laws a method has to keep, and all of them in one call.

Every law is a function of its own, `law(method, case)`, to be run singly; `laws(…)` are those that
a method's traits call for, and `CASES` the layers that they are crossed with. All laws of one case
read the same modules. The oracles are NumPy in float64 and know nothing of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch

from ..types import Method
from .cases import (
    CASES,
    DTYPES,
    Case,
    Planted,
    low_rank_weight,
    require,
)
from .crossing import check_laws
from .error_laws import check_bound, check_curve, check_exact, check_planted
from .modules import (
    check_cost,
    check_dtype,
    check_forward,
    check_gradients,
    check_macs,
    check_nested,
    check_rebuilt,
)
from .purity import check_deterministic, check_untouched

Law = Callable[[Method, Case], None]
PLANTED = low_rank_weight(2)


def laws(
    *,
    low_rank: bool = True,
    planted: Planted | None = PLANTED,
    tolerance: float = 1e-9,
    plain_products: bool = True,
) -> dict[str, Law]:
    """The laws that hold for a method with these traits; arguments as for `check_method`."""
    chosen: dict[str, Law] = {
        "curve": check_curve,
        "exact": check_exact,
        "cost": check_cost,
        "forward": check_forward,
        "nested": check_nested,
        "dtype": check_dtype,
        "rebuilt": check_rebuilt,
        "gradients": check_gradients,
        "untouched": check_untouched,
        "deterministic": check_deterministic,
    }
    if planted is not None:
        chosen["planted"] = partial(check_planted, planted=planted, tolerance=tolerance)
    if low_rank:
        chosen["bound"] = check_bound
    if plain_products:
        chosen["macs"] = check_macs
    return chosen


def check_method(
    method: Method,
    *,
    low_rank: bool = True,
    planted: Planted | None = PLANTED,
    tolerance: float = 1e-9,
    plain_products: bool = True,
    dtypes: Sequence[torch.dtype] = DTYPES,
    device: torch.device | str = "cpu",
) -> None:
    """Hold a method against all laws on all cases.

    Args:
        low_rank: its results have at most the rank `size[0]`, so that no error can be below the
            Eckart–Young bound of that rank.
        planted: (out, in, generator) -> a weight and the size at which the method must reproduce
            it; None for a method that reproduces nothing.
        tolerance: of that reproduction: relative, in the method's norm; rounding comes on top.
        plain_products: its modules compute by matrix products alone, so that they can be counted.

    Raises:
        AssertionError: on a case, laws are broken; each is named with case, dtype and size.
    """
    chosen = laws(
        low_rank=low_rank, planted=planted, tolerance=tolerance, plain_products=plain_products
    )
    kinds = {make: make(dtype=torch.float64).site.kind for make in CASES.values()}
    cases = [make for make, kind in kinds.items() if kind in method.kinds]
    require(bool(cases), f"the suite has no case for the kinds {sorted(method.kinds)}")
    for make, dtype in product(cases, dtypes):
        check_laws(method, make(dtype=dtype, device=device), chosen)
