"""What `DenseGeneral` does, with a compressed kernel; Linen and NNX share it."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import RowGrouped
from shfl_jax.layers import LayerSpec


def contract(
    matrix: RowGrouped,
    x: jax.Array,
    bias: jax.Array | None,
    spec: LayerSpec,
    *,
    axis: Sequence[int],
    features: Sequence[int],
    batch_dims: Sequence[int] = (),
    precision: Any = None,
) -> jax.Array:
    """Contracts axes of x with the inputs of a matrix.

    Args:
        matrix: the kernel; one leading axis for each of `batch_dims`.
        x: the input, of the matrix's dtype.
        bias: (*batch, *features) or None.
        spec: the layer's spec, whose kernel axes are (inputs, outputs) beside its batch axes.
        axis: axes of x that contract; in ascending order they are the kernel's inputs.
        features: shape of the outputs; their product is M.
        batch_dims: axes of x that number independent matrices.
        precision: as in `jax.lax.dot_general`.

    Returns:
        (*batch, *the other axes of x, *features).

    Raises:
        ValueError: x does not fit, or the matrix has leading axes that the layer does not know.
        NotImplementedError: the kernel's outputs come before its inputs.
    """
    m, k = spec.matrix_shape
    if min(spec.out_axes, default=0) < max(spec.in_axes, default=0):
        raise NotImplementedError(
            f"{spec.path} {spec.shape}: a compressed layer reads its kernel as (inputs, outputs), but the spec has "
            f"in_axes {spec.in_axes} and out_axes {spec.out_axes}. Map it to None in the plan to keep it dense"
        )
    axis, batch_dims = (sorted(a % x.ndim for a in axes) for axes in (axis, batch_dims))  # as Flax does
    if matrix.values.ndim - 2 != len(batch_dims):
        raise ValueError(
            f"{spec.path}: a stack of matrices (values {matrix.values.shape}) reached a layer that runs "
            f"{len(batch_dims)} batch axes; run stacked layers under the same scan or vmap that made them"
        )
    x = jnp.moveaxis(x, batch_dims + axis, [*range(len(batch_dims)), *range(-len(axis), 0)])
    tokens = x.shape[: x.ndim - len(axis)]
    if x.size != k * math.prod(tokens):
        raise ValueError(f"{spec.path}: expected inputs with {k} features (M={m}), got {x.shape[x.ndim - len(axis) :]}")

    def multiply(matrix: RowGrouped, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        return pallas_kernels.matmul(matrix, x, bias=bias, precision=precision)

    for _ in batch_dims:
        multiply = jax.vmap(multiply)
    if bias is not None:
        bias = bias.reshape(*bias.shape[: len(batch_dims)], m)
    return multiply(matrix, x.reshape(*tokens, k), bias).reshape(*tokens, *features)


def moved_batch_axes(matrix: RowGrouped, spec: LayerSpec) -> RowGrouped:
    """Puts the leading axes of a stacked matrix where the kernel had them, for scan and vmap to slice.

    Raises:
        NotImplementedError: the index arrays of a slice have too few axes for that.
    """
    axes = spec.batch_axes
    if max(axes, default=-1) > len(axes):
        raise NotImplementedError(
            f"{spec.path} {spec.shape}: layers stacked along axes {axes} cannot be compressed; stack them along axis 0 "
            "or 1 (`variable_axes={'params': 0}`), or map the kernel to None in the plan"
        )
    return jax.tree.map(lambda array: jnp.moveaxis(array, range(len(axes)), axes), matrix)
