"""The same plug-in for SGLang: written against its source (0.5), and not run there yet.

Found by the entry point `sglang.srt.plugins`. Only SGLang imports this file.
"""

from __future__ import annotations

from typing import Any

from sglang.srt import distributed
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from .plugin import Declared, FactoredMethod


def register() -> None:
    """Make "lowrank" known to SGLang; called by it, perhaps more than once in a process."""
    QUANTIZATION_METHODS.setdefault("lowrank", LowRankConfig)


class LowRankMethod(FactoredMethod, LinearMethodBase):
    """The plug-in's linear method."""

    DISTRIBUTED = distributed


class LowRankConfig(Declared, QuantizationConfig):
    """The plug-in's config."""

    ENGINE, LINEAR, METHOD, DENSE = "SGLang", LinearBase, LowRankMethod, UnquantizedLinearMethod

    def get_scaled_act_names(self) -> list[str]:
        return []

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Called with how SGLang renames the tensors of this architecture."""
        self.rename(hf_to_sglang_mapper.apply_dict)
