"""The registry of policies: (curves, budget, probe) -> one option for every site."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import LowrankError, unknown
from ..types import Policy
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


def policy(named: str | Policy) -> Policy:
    """The policy that a name stands for; a callable is returned as it is."""
    if isinstance(named, str):
        if named not in POLICIES:
            raise unknown("policy", named, POLICIES)
        return POLICIES[named]()
    if not callable(named):
        raise LowrankError(f"a policy is a name or a callable, got {type(named).__name__}")
    return named
