"""The convolution of images with filters kept as a row-grouped matrix: validation, layouts, the way to `matmul`."""

from typing import Literal

from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _window as windows
from pallas_kernels._backend import Call
from pallas_kernels._layout import Matrix
from pallas_kernels._op import check_added, checked_matrix, checked_route, run
from pallas_kernels._window import Padding, Pair

ConvLayout = Literal["CHWN", "NHWC", "NCHW"]
# From a layout to the native one, channels first and the batch innermost, and back.
TO_NATIVE: dict[str, tuple[int, ...]] = {"CHWN": (0, 1, 2, 3), "NHWC": (3, 1, 2, 0), "NCHW": (1, 2, 3, 0)}
FROM_NATIVE: dict[str, tuple[int, ...]] = {"CHWN": (0, 1, 2, 3), "NHWC": (3, 1, 2, 0), "NCHW": (3, 0, 1, 2)}


def conv2d(
    filters: Matrix,
    x: Float[Array, "_ _ _ _"],
    *,
    kernel_size: Pair,
    strides: int | Pair = 1,
    padding: Padding = "SAME",
    dilation: int | Pair = 1,
    groups: int = 1,
    bias: Float[Array, " C_out"] | None = None,
    addend: Float[Array, "..."] | None = None,
    activation: str | None = None,
    layout: ConvLayout = "CHWN",
    implementation: str | None = None,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "_ _ _ _"]:
    """Computes activation(filters * x + bias + addend), the convolution of deep learning (a correlation).

    Row o of the filter matrix is output channel o. Its column (i * kw + j) * C + c is tap (i, j) of input channel c, so
    the matrix of a Flax kernel (kh, kw, C, C_out) is `kernel.reshape(-1, C_out).T`.

    The native layout is "CHWN", channels first and the batch innermost: a column then meets contiguous runs of the
    batch. Other layouts are transposed on the way in and out, and where only elementwise operations and reductions
    stand between two convolutions under one `jit`, XLA cancels what stands between them: a network's images are moved
    once. A 1 x 1 convolution with stride 1 is the feature-major product of `matmul`.
    Differentiable in the filters' values, `x`, `bias` and `addend`; `vmap` also maps over stacked filters. Accumulates
    in float32. Forward mode and second derivatives need `implementation="xla"`, as in `matmul`.

    Args:
        filters: (C_out, kh * kw * C), canonical or from `prepare`.
        x: images, floating: (C, H, W, B) in "CHWN", (B, H, W, C) in "NHWC", (B, C, H, W) in "NCHW".
        kernel_size: (kh, kw).
        strides: of both axes or of each.
        padding: "SAME", "SAME_LOWER", "VALID", or ((top, bottom), (left, right)) pixels of zeros.
        dilation: distance of neighbouring taps, of both axes or of each.
        groups: 1; a grouped convolution has no row-grouped form.
        bias: (C_out,) floating.
        addend: floating, of the result's shape: the other branch of a residual connection.
        activation: as in `matmul`.
        layout: of the input and of the output.
        implementation: as in `matmul`.
        precision: as in `jax.lax.conv_general_dilated`.

    Returns:
        The images (C_out, H', W', B), (B, H', W', C_out) or (B, C_out, H', W'), in the promoted dtype of the values
        and `x`.

    Raises:
        ValueError: a shape, a dtype, a size or a name is wrong.
        NotImplementedError: `groups` is not 1 (run that convolution dense), or the implementation asked for by name
            cannot do this convolution.
    """
    if groups != 1:
        raise NotImplementedError(f"a convolution in {groups} groups of channels has no sparse kernel: run it dense")
    if layout not in TO_NATIVE:
        raise ValueError(f"layout must be one of {tuple(TO_NATIVE)}, got {layout!r}")
    route = checked_route(implementation)
    prepared = checked_matrix(filters, {"x": x, "bias": bias, "addend": addend}, activation)
    if x.ndim != 4:
        raise ValueError(f"x must have four axes, {layout}, got shape {x.shape}")
    c, h, w, b = (x.shape[axis] for axis in TO_NATIVE[layout])
    window = windows.window((h, w), c, kernel_size, strides, padding, dilation)
    m, k = filters.shape
    if k != window.features:
        kh, kw = window.kernel
        raise ValueError(
            f"filters must have {kh} * {kw} * {c} = {window.features} columns (taps times channels) for {layout} "
            f"images of shape {x.shape}, got a matrix of shape {filters.shape}"
        )
    result = tuple((m, *window.outputs, b)[axis] for axis in FROM_NATIVE[layout])
    check_added(filters, bias, addend, result)
    addend = None if addend is None else addend.transpose(TO_NATIVE[layout]).reshape(m, -1)
    call = Call(activation, precision=precision, window=window)
    y = run(call, route, prepared, x.transpose(TO_NATIVE[layout]), bias, addend)
    return y.reshape(m, *window.outputs, b).transpose(FROM_NATIVE[layout])
