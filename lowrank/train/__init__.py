"""Rank-adaptive training: controllers that plug into any loop.

controller = lowrank.train.DLRT(model, optimizer, tolerance=0.1)
for x, y in batches:
    loss(model(x), y).backward()
    controller.before_step()
    optimizer.step()
    controller.after_step()
    optimizer.zero_grad()
model = controller.finish()  # plain factored modules, ready to save

`lost` needs no controller: it replaces layers before the first step, and any optimizer trains them.
How to write a controller is shown in docs/training.md.
"""

from typing import Any

from .condlr import CondLR as CondLR
from .cuttlefish import Cuttlefish as Cuttlefish
from .dlrt import DLRT as DLRT
from .dnis import DNIS as DNIS
from .dsl import DSL as DSL
from .frobenius import FrobeniusDecay as FrobeniusDecay
from .gblr import GBLR as GBLR
from .inrank import InRank as InRank
from .intrinsic import IntrinsicDimension as IntrinsicDimension
from .intrinsic import intrinsic_dimension as intrinsic_dimension
from .loqt import LoQT as LoQT
from .lost_pretraining import lost as lost
from .maestro import Maestro as Maestro
from .nm import NM as NM
from .parts.attachment import Attachment as Attachment
from .pufferfish import Pufferfish as Pufferfish
from .smmf import SMMF as SMMF
from .stf import STF as STF
from .subspace import Subspace as Subspace
from .tucker import TuckerDLRT as TuckerDLRT


def __getattr__(name: str) -> Any:
    if name == "LowRankCallback":  # transformers is imported only now
        from .callback import LowRankCallback

        return LowRankCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
