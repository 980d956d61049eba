"""The Triton backend of `matmul`."""

from pallas_kernels._matrix import RowGrouped
from pallas_kernels.gpu import _layout as layout
from pallas_kernels.triton._forward import forward as forward
from pallas_kernels.triton._grad import grad_input as grad_input
from pallas_kernels.triton._grad import grad_values as grad_values
from pallas_kernels.triton._tiles import check
from pallas_kernels.triton._two_four import forward_two_four as forward_two_four
from pallas_kernels.triton._two_four import grad_values_two_four as grad_values_two_four


def prepare(matrix: RowGrouped) -> RowGrouped:
    """Arranges a matrix for the GPU; see `pallas_kernels.gpu`.

    Raises:
        NotImplementedError: a group size or dtype not supported by the kernels.
    """
    check(matrix.topology, matrix.dtype)
    return layout.prepare(matrix)
