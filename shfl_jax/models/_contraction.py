"""`DenseGeneral` and `Conv` with a compressed kernel, shared by Linen and NNX."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding

import pallas_kernels
from pallas_kernels import Matrix
from shfl_jax._layers import LayerSpec


def contract(
    matrix: Matrix,
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
    _check_stack(matrix, spec, len(batch_dims))
    x = jnp.moveaxis(x, batch_dims + axis, [*range(len(batch_dims)), *range(-len(axis), 0)])
    tokens = x.shape[: x.ndim - len(axis)]
    if x.size != k * math.prod(tokens):
        raise ValueError(f"{spec.path}: expected inputs with {k} features (M={m}), got {x.shape[x.ndim - len(axis) :]}")

    def multiply(matrix: Matrix, x: jax.Array, bias: jax.Array | None) -> jax.Array:
        return pallas_kernels.matmul(matrix, x, bias=bias, precision=precision)

    for _ in batch_dims:
        multiply = jax.vmap(multiply)
    if bias is not None:
        bias = bias.reshape(*bias.shape[: len(batch_dims)], m)
    return multiply(matrix, x.reshape(*tokens, k), bias).reshape(*tokens, *features)


def convolve(
    matrix: Matrix,
    x: jax.Array,
    bias: jax.Array | None,
    spec: LayerSpec,
    *,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None,
    padding: Any,
    dilation: int | Sequence[int] | None,
    precision: Any = None,
) -> jax.Array:
    """Convolves images, channels last, with the filters of a matrix.

    Args:
        matrix: the kernel (*kernel_size, channels, features) as (features, the other axes flattened).
        x: (*batch, *spatial, channels), one or two spatial axes, of the matrix's dtype.
        bias: (features,) or None.
        spec: the layer's spec.
        kernel_size: one size for each spatial axis.
        strides: as in `flax.linen.Conv`.
        padding: as in `flax.linen.Conv`, all its names included.
        dilation: of the kernel, as in `flax.linen.Conv`.
        precision: as in `jax.lax.conv_general_dilated`.

    Returns:
        (*batch, *spatial, features).

    Raises:
        ValueError: x does not fit, or the matrix has leading axes.
        NotImplementedError: three spatial axes or more.
    """
    kernel = as_tuple(kernel_size)
    m, k = spec.matrix_shape
    _check_stack(matrix, spec, 0)
    if len(kernel) > 2:
        raise NotImplementedError(
            f"{spec.path} {spec.shape}: a convolution over {len(kernel)} spatial axes has no sparse kernel. Map it to "
            "None in the plan to keep it dense"
        )
    if x.ndim <= len(kernel) or x.shape[-1] * math.prod(kernel) != k:
        raise ValueError(
            f"{spec.path}: expected images with {k // math.prod(kernel)} channels last (M={m}, K={k} with "
            f"{' x '.join(map(str, kernel))} taps), got {x.shape}"
        )
    steps, dilations = (as_tuple(1 if a is None else a, len(kernel)) for a in (strides, dilation))
    batch, x = x.shape[: -len(kernel) - 1], x.reshape(-1, *x.shape[-len(kernel) - 1 :])
    pads = canonicalize_padding(padding, len(kernel))
    if pads in ("CIRCULAR", "REFLECT", "CAUSAL"):
        extent = [(size - 1) * d + 1 for size, d in zip(kernel, dilations, strict=True)]
        around = [(size - 1, 0) if pads == "CAUSAL" else ((size - 1) // 2, size // 2) for size in extent]
        mode = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}[pads]
        x, pads = jnp.pad(x, [(0, 0), *around, (0, 0)], mode=mode), "VALID"
    if len(kernel) == 1:  # an image of one row
        x, kernel, steps, dilations = x[:, None], (1, *kernel), (1, *steps), (1, *dilations)
        pads = pads if isinstance(pads, str) else [(0, 0), *pads]
    try:
        y = pallas_kernels.conv2d(
            matrix,
            x,
            kernel_size=(kernel[0], kernel[1]),
            strides=(steps[0], steps[1]),
            padding=pads,
            dilation=(dilations[0], dilations[1]),
            bias=bias,
            layout="NHWC",
            precision=precision,
        )
    except ValueError as error:
        raise ValueError(f"{spec.path} {spec.shape}: {error}") from error
    return y.reshape(*batch, *y.shape[3 - len(as_tuple(kernel_size)) :])


def check_convolution(layer: Any, spec: LayerSpec) -> None:
    """Checks that `convolve` supports what a Flax `Conv`, of Linen or NNX, is set to do.

    Raises:
        NotImplementedError: a mask of its own, or a dilated input; the text names the layer and the fix.
    """
    dilated = layer.input_dilation is not None and set(as_tuple(layer.input_dilation)) != {1}
    if layer.mask is not None or dilated:
        raise NotImplementedError(
            f"{spec.path} {spec.shape}: a convolution with {'input_dilation' if dilated else 'a mask of its own'} "
            "cannot run with a compressed kernel. Map it to None in the plan to keep it dense"
        )


def _check_stack(matrix: Matrix, spec: LayerSpec, batch_axes: int) -> None:
    if matrix.values.ndim - 2 != batch_axes:
        raise ValueError(
            f"{spec.path}: a stack of matrices (values {matrix.values.shape}) reached a layer that runs "
            f"{batch_axes} batch axes; run stacked layers under the same scan or vmap that made them"
        )


def as_tuple(sizes: int | Sequence[int], length: int = 1) -> tuple[int, ...]:
    """A sequence as a tuple; a number that many times."""
    return (sizes,) * length if isinstance(sizes, int) else tuple(sizes)


def moved_batch_axes(matrix: Matrix, spec: LayerSpec) -> Matrix:
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
    return jax.tree.map(functools.partial(jnp.moveaxis, source=range(len(axes)), destination=axes), matrix)
