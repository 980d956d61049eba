"""Products with row-grouped matrices: arrays in, arrays out. Knows no patterns and no network library."""

from pallas_kernels.cost import Prediction, predict
from pallas_kernels.matmul import matmul, prepare
from pallas_kernels.row_grouped import RowGrouped, Topology, from_dense, row_grouped, to_dense

__all__ = ["Prediction", "RowGrouped", "Topology", "from_dense", "matmul", "predict", "prepare", "row_grouped", "to_dense"]
