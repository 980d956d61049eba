"""LayerSpec: how the kernel of one layer is read as a matrix."""

import dataclasses
import math
from typing import Any, TypeVar

import jax
import numpy as np

Array = TypeVar("Array", jax.Array, np.ndarray)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """A kernel that is to be pruned: where it is, which of its axes contract, and the pattern it gets.

    The matrix is M x K, outputs by inputs: a `Dense` kernel (in, out) is transposed.

    Attributes:
        path: the kernel's path, keys joined by '/'.
        shape: shape of the kernel.
        batch_axes: axes that number independent matrices (`nn.scan`, `nn.vmap`), ascending.
        in_axes: axes that the layer contracts, ascending; their product is K.
        out_axes: the others, ascending; their product is M.
        pattern: the sparsity pattern; frozen and hashable.
        convolution: whether it is a convolution's kernel, whose `in_axes` are the filter's places and the channels.
    """

    path: str
    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    pattern: Any
    convolution: bool = False

    def __post_init__(self) -> None:
        """Checks the axes.

        Raises:
            ValueError: the axes are not each of the kernel's axes once.
        """
        for name in ("shape", "batch_axes", "in_axes", "out_axes"):
            object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))
        if sorted(self._order) != list(range(len(self.shape))):
            raise ValueError(
                f"{self.path}: batch_axes {self.batch_axes}, in_axes {self.in_axes} and out_axes {self.out_axes} must "
                f"name each axis of the shape {self.shape} once"
            )
        if math.prod(self.shape) == 0:
            raise ValueError(f"{self.path}: a kernel of shape {self.shape} has no weights; keep it dense with None")

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[a] for a in self.batch_axes)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(M, K) of each matrix."""
        return math.prod(self.shape[a] for a in self.out_axes), math.prod(self.shape[a] for a in self.in_axes)

    def to_matrix(self, kernel: Array) -> Array:
        """Reads a kernel (or a mask, or scores, of its shape) as matrices: (*batch, M, K). NumPy stays NumPy.

        Raises:
            ValueError: the array does not have the kernel's shape.
        """
        if tuple(kernel.shape) != self.shape:
            raise ValueError(f"{self.path}: expected an array of shape {self.shape}, got {tuple(kernel.shape)}")
        return kernel.transpose(self._order).reshape(*self.batch_shape, *self.matrix_shape)

    def from_matrix(self, matrix: Array) -> Array:
        """Undoes `to_matrix`: (*batch, M, K) -> the kernel's shape.

        Raises:
            ValueError: the array is not (*batch, M, K).
        """
        if tuple(matrix.shape) != (*self.batch_shape, *self.matrix_shape):
            expected = (*self.batch_shape, *self.matrix_shape)
            raise ValueError(f"{self.path}: expected matrices of shape {expected}, got {tuple(matrix.shape)}")
        inverse = sorted(range(len(self.shape)), key=lambda axis: self._order[axis])
        return matrix.reshape(*(self.shape[a] for a in self._order)).transpose(inverse)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.batch_axes, *self.out_axes, *self.in_axes)
