"""Factored modules: each holds its factors, describes itself and can be built empty."""

from .blast_linear import BlastLinear as BlastLinear
from .blast_linear import blast_cost as blast_cost
from .block_embedding import BlockEmbedding as BlockEmbedding
from .block_lowrank import BlockLowRankLinear as BlockLowRankLinear
from .block_lowrank import block_lowrank_cost as block_lowrank_cost
from .channel_conv import ChannelConv as ChannelConv
from .channel_conv import channel_cost as channel_cost
from .cp_conv import CPConv as CPConv
from .cp_conv import cp_cost as cp_cost
from .cur_linear import CURLinear as CURLinear
from .cur_linear import cur_cost as cur_cost
from .dense_sparse import DenseSparseLinear as DenseSparseLinear
from .dense_sparse import SparseDenseLinear as SparseDenseLinear
from .dense_sparse import dense_sparse_cost as dense_sparse_cost
from .dense_sparse import sparse_dense_cost as sparse_dense_cost
from .form import FACTORED as FACTORED
from .form import LAYOUTS as LAYOUTS
from .form import Form as Form
from .form import LinearForm as LinearForm
from .form import build as build
from .form import describe as describe
from .form import form_of as form_of
from .form import is_factored as is_factored
from .form import register as register
from .form import remember_layout as remember_layout
from .geometry import Geometry as Geometry
from .lowrank_embedding import LowRankEmbedding as LowRankEmbedding
from .lowrank_linear import LowRankLinear as LowRankLinear
from .lowrank_masked import LowRankMaskedLinear as LowRankMaskedLinear
from .lowrank_masked import low_rank_masked_cost as low_rank_masked_cost
from .lowrank_sparse import LowRankSparseLinear as LowRankSparseLinear
from .lowrank_sparse import low_rank_sparse_cost as low_rank_sparse_cost
from .pivoted_linear import PivotedLinear as PivotedLinear
from .pivoted_linear import pivot_layer as pivot_layer
from .pivoted_linear import pivot_side as pivot_side
from .pivoted_linear import pivoted_cost as pivoted_cost
from .quantized_linear import QuantizedFactorsLinear as QuantizedFactorsLinear
from .quantized_linear import QuantizedLinear as QuantizedLinear
from .quantized_linear import QuantizedLowRankLinear as QuantizedLowRankLinear
from .quantized_linear import quantized_cost as quantized_cost
from .quotient_remainder import QuotientRemainderEmbedding as QuotientRemainderEmbedding
from .quotient_remainder import quotient_remainder_cost as quotient_remainder_cost
from .routed_mlp import RoutedMLP as RoutedMLP
from .shared_linear import SharedLowRankLinear as SharedLowRankLinear
from .sparse_kernels import semi_structured as semi_structured
from .spatial_conv import SpatialConv as SpatialConv
from .spatial_conv import spatial_cost as spatial_cost
from .tensor_train import TensorTrainEmbedding as TensorTrainEmbedding
from .tensor_train import tensor_train_cost as tensor_train_cost
from .tied import TiedEmbedding as TiedEmbedding
from .tied import TiedHead as TiedHead
from .tubal_conv import TubalConv as TubalConv
from .tubal_conv import tubal_cost as tubal_cost
from .tucker_conv import TuckerConv as TuckerConv
from .tucker_conv import tucker_cost as tucker_cost
from .unified_table import UnifiedEmbedding as UnifiedEmbedding
from .unified_table import UnifiedReader as UnifiedReader
from .usv_linear import USVLinear as USVLinear

FACTORED.update(
    {
        "LowRankLinear": LowRankLinear,
        "PivotedLinear": PivotedLinear,
        "SharedLowRankLinear": SharedLowRankLinear,
        "ChannelConv": ChannelConv,
        "TuckerConv": TuckerConv,
        "SpatialConv": SpatialConv,
        "CPConv": CPConv,
        "TubalConv": TubalConv,
        "LowRankEmbedding": LowRankEmbedding,
        "QuotientRemainderEmbedding": QuotientRemainderEmbedding,
        "TensorTrainEmbedding": TensorTrainEmbedding,
        "BlockEmbedding": BlockEmbedding,
        "UnifiedEmbedding": UnifiedEmbedding,
        "UnifiedReader": UnifiedReader,
        "TiedEmbedding": TiedEmbedding,
        "TiedHead": TiedHead,
        "DenseSparseLinear": DenseSparseLinear,
        "SparseDenseLinear": SparseDenseLinear,
        "LowRankSparseLinear": LowRankSparseLinear,
        "LowRankMaskedLinear": LowRankMaskedLinear,
        "BlastLinear": BlastLinear,
        "BlockLowRankLinear": BlockLowRankLinear,
        "USVLinear": USVLinear,
        "CURLinear": CURLinear,
        "QuantizedLinear": QuantizedLinear,
        "QuantizedFactorsLinear": QuantizedFactorsLinear,
        "QuantizedLowRankLinear": QuantizedLowRankLinear,
        "RoutedMLP": RoutedMLP,
    }
)
