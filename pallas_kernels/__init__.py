"""Products with row-grouped matrices: arrays in, arrays out. Knows no patterns and no network library."""

from pallas_kernels._backend import Backend, implementations, register
from pallas_kernels._conv import conv2d
from pallas_kernels._cost import Prediction, predict, predict_convolution
from pallas_kernels._layout import Matrix, MatrixLayout, Prepared, join, to_dense
from pallas_kernels._matrix import RowGrouped, Topology, from_dense, row_grouped
from pallas_kernels._op import matmul, prepare
from pallas_kernels._two_four import from_dense_two_four
from pallas_kernels._window import Window
from pallas_kernels.gpu._layout import ConvLayout
from pallas_kernels.xla._layout import CPULayout

__all__ = [
    "Backend",
    "CPULayout",
    "ConvLayout",
    "Matrix",
    "MatrixLayout",
    "Prediction",
    "Prepared",
    "RowGrouped",
    "Topology",
    "Window",
    "conv2d",
    "from_dense",
    "from_dense_two_four",
    "implementations",
    "join",
    "matmul",
    "predict",
    "predict_convolution",
    "prepare",
    "register",
    "row_grouped",
    "to_dense",
]
