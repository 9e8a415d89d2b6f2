"""The registry of policies: (curves, budget, probe) -> one option for every site."""

from __future__ import annotations

from .common import POLICIES as POLICIES
from .common import judges as judges
from .common import policy_of as policy_of
from .energy import Energy as Energy
from .evbmf import EVBMF as EVBMF
from .lossaware import LossAware as LossAware
from .mixed_dimensions import MixedDimensions as MixedDimensions
from .spectrum import Spectrum as Spectrum
from .uniform import Uniform as Uniform
from .welore import WeLore as WeLore

POLICIES.update(
    {
        "uniform": Uniform,
        "energy": Energy,
        "welore": WeLore,
        "spectrum": Spectrum,
        "lossaware": LossAware,
        "evbmf": EVBMF,
        "mixed-dimensions": MixedDimensions,
    }
)
