"""The registry of policies: (curves, budget, probe) -> one option for every site."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import LowrankError, unknown
from ..types import Judging, Policy
from .energy import Energy as Energy
from .evbmf import EVBMF as EVBMF
from .lossaware import LossAware as LossAware
from .spectrum import Spectrum as Spectrum
from .uniform import Uniform as Uniform
from .welore import WeLore as WeLore

POLICIES: dict[str, Callable[[], Policy]] = {
    "uniform": Uniform,
    "energy": Energy,
    "welore": WeLore,
    "spectrum": Spectrum,
    "lossaware": LossAware,
    "evbmf": EVBMF,
}


def policy_of(given: str | Policy) -> Policy:
    """The policy that a name stands for; a callable is returned as it is."""
    if isinstance(given, str):
        if given not in POLICIES:
            raise unknown("policy", given, POLICIES)
        return POLICIES[given]()
    if not callable(given):
        raise LowrankError(f"a policy is a name or a callable, got {type(given).__name__}")
    return given


def judges(given: str | Policy) -> bool:
    """Whether a policy compares allocations by the model's predictions: a callable that does not
    say so may."""
    policy = policy_of(given)
    return policy.judges if isinstance(policy, Judging) else True
