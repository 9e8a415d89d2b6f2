"""What an engine's quantization plug-in says and does, whatever the engine.

Nothing is quantized: like transformers, engines let a checkpoint's `quant_method` choose what its
layers are. vllm.py and sglang.py mix these classes with those of their engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import LowrankError, listed
from ..io.specs import check_specs, check_version
from .fused import Arriving, Part, Spec, cut_of, parts_of, placeholders, put_fused, refusal

SOURCE = "config.json: quantization_config"


class Declared:
    """Which layers of a checkpoint are factored, as `config.json` declares it.

    Attributes:
        modules: name -> spec, under the engine's names once it has mapped them.
        packed_modules_mapping: the engine's: name of a fused layer -> those of its parts.
    """

    ENGINE: ClassVar[str]
    LINEAR: ClassVar[type]  # the engine's class of linear layers
    METHOD: ClassVar[Any]  # the plug-in's class of how they compute, from (arriving, config)
    DENSE: ClassVar[Any]  # the engine's own, of dense layers

    packed_modules_mapping: Mapping[str, list[str]]

    def __init__(self, modules: Mapping[str, Spec]) -> None:
        super().__init__()
        self.modules: dict[str, Spec] = dict(modules)
        self._claimed: set[str] = set()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """
        Raises:
            LowrankError: the format is unknown or damaged, or weights are quantized.
        """
        check_version(config.get("version"), SOURCE)
        if quantized := config.get("quantized"):
            raise LowrankError(
                f"{cls.ENGINE} is given {len(quantized)} weights that torchao quantized, which "
                "the plug-in does not read: serve the factored model from before it was quantized"
            )
        return cls(check_specs(config.get("modules", {}), SOURCE))

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_name(self) -> str:
        return "lowrank"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    def rename(self, renamed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Rename modules as the engine renames the tensors of this architecture.

        Args:
            renamed: changes the keys of a dict.
        """
        names = {old: new for new, old in renamed({name: name for name in self.modules}).items()}
        self.modules = {
            name: {**spec, **({"shared": names[spec["shared"]]} if "shared" in spec else {})}
            for name, spec in renamed(self.modules).items()
        }

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer computes; None: as the engine does without a config.

        Raises:
            LowrankError: its form is not served.
        """
        if not isinstance(layer, self.LINEAR):
            if prefix in self.modules:
                raise LowrankError(refusal(Part(prefix, self.modules[prefix]), self.ENGINE))
            return None
        parent, _, leaf = prefix.rpartition(".")
        packed = self.packed_modules_mapping.get(leaf, [leaf])
        fused = [f"{parent}.{name}" if parent else name for name in packed]
        names = [prefix] if prefix in self.modules else fused
        self._claimed.update(names)
        parts = parts_of(names, self.modules, self.ENGINE)
        self._claimed.update(part.name for part in parts)
        return self.METHOD(Arriving(prefix, parts), self) if parts else self.DENSE()

    def check_claimed(self, staged: bool) -> None:
        """Check that no factored layer was left out; called once all layers are built.

        Args:
            staged: other processes hold other layers (pipeline parallel).

        Raises:
            LowrankError: the engine's model has no layer for some of them.
        """
        left = [name for name in self.modules if name not in self._claimed]
        if left and not staged:
            raise LowrankError(
                f"{self.ENGINE}'s model has no layer for {len(left)} factored ones: "
                f"{listed(left, 3)}: serve the dense model that `lowrank merge` writes"
            )


class FactoredMethod:
    """Computes one of an engine's linear layers from the parts that it fuses."""

    DISTRIBUTED: ClassVar[Any]  # the engine's module of process groups

    def __init__(self, arriving: Arriving, config: Declared) -> None:
        self._arriving, self._config = arriving, config

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Give the layer empty parameters under the names in the checkpoint."""
        self._inputs = input_size_per_partition, input_size
        self._outputs, self._whole = list(output_partition_sizes), output_size
        placeholders(layer, self._arriving, params_dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make the layer of what was loaded.

        Raises:
            LowrankError: parts of it are missing or do not fit.
        """
        if hasattr(layer, "lowrank"):
            return
        self._config.check_claimed(self._is_staged())
        groups = self.DISTRIBUTED
        rank, world = getattr(layer, "tp_rank", None), getattr(layer, "tp_size", None)
        cut = cut_of(
            len(self._arriving.parts), self._inputs, self._outputs, self._whole,
            rank=groups.get_tensor_model_parallel_rank() if rank is None else rank,
            world=groups.get_tensor_model_parallel_world_size() if world is None else world,
            replicas=getattr(layer, "num_kv_head_replicas", 1),
        )  # fmt: skip
        dense = self._config.DENSE()
        put_fused(layer, self._arriving, cut, self._inputs[0], self._outputs, dense)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, in) -> (tokens, out)."""
        y: Tensor = layer.lowrank(x)
        return y if bias is None else y + bias

    def _is_staged(self) -> bool:
        """Whether other processes hold other layers (pipeline parallel)."""
        try:
            return bool(self.DISTRIBUTED.get_pp_group().world_size > 1)
        except AssertionError:  # layers outside of an engine: there are no groups
            return False
