"""Products with row-grouped matrices: arrays in, arrays out. Knows no patterns and no network library."""

from pallas_kernels._backend import Backend, register
from pallas_kernels._conv import conv2d
from pallas_kernels._cost import Prediction, predict, predict_convolution
from pallas_kernels._layout import MatrixLayout, Prepared, join, to_dense
from pallas_kernels._matrix import RowGrouped, Topology, from_dense, row_grouped
from pallas_kernels._op import matmul, prepare
from pallas_kernels._two_four import from_dense_two_four

__all__ = [
    "Backend",
    "MatrixLayout",
    "Prediction",
    "Prepared",
    "RowGrouped",
    "Topology",
    "conv2d",
    "from_dense",
    "from_dense_two_four",
    "join",
    "matmul",
    "predict",
    "predict_convolution",
    "prepare",
    "register",
    "row_grouped",
    "to_dense",
]
