"""The XLA backend: every problem, on every platform."""

import dataclasses
from typing import Any, ClassVar

import jax
from typing_extensions import override

from pallas_kernels import _layout as layouts
from pallas_kernels._activations import ACTIVATIONS
from pallas_kernels._backend import Backend, Call, Problem
from pallas_kernels._layout import MatrixLayout, Prepared
from pallas_kernels._matrix import RowGrouped
from pallas_kernels._window import Window
from pallas_kernels.xla import _conv, _layout, _matmul


@dataclasses.dataclass(frozen=True)
class XLA(Backend):
    """Plain XLA, in the forms that are fastest on a CPU. It is asked last, on every platform."""

    name: ClassVar[str] = "xla"
    platforms: ClassVar[tuple[str, ...]] = ()

    @override
    def why_not(self, problem: Problem) -> list[str]:
        """There is nothing that it cannot do."""
        return []

    @override
    def prepare(self, matrix: RowGrouped, window: Window | None) -> Prepared:
        """See `pallas_kernels.xla._layout`; nothing depends on a window."""
        return _layout.prepare(matrix)

    @override
    def forward(
        self, call: Call, matrix: Prepared, x: jax.Array, bias: jax.Array | None, addend: jax.Array | None,
        config: Any = None,
    ) -> jax.Array:  # fmt: skip
        """See `Backend.forward`. A 2:4 matrix is expanded."""
        call, x = call.as_product(x)
        matrix = layouts.expand(matrix)
        values, layout = matrix.values, _layout.as_cpu(matrix.layout)
        token_major = call.layout == "token_major"
        if call.window is not None:
            y = _conv.forward(values, layout, x, call.window, call.precision)
        else:
            y = (_matmul.token_major if token_major else _matmul.feature_major)(values, layout, x, call.precision)
        if bias is not None:
            y = y + (bias if token_major else bias[:, None])
        if addend is not None:
            y = y + addend
        return ACTIVATIONS[call.activation](y).astype(x.dtype)

    @override
    def grad_values(
        self, call: Call, layout: MatrixLayout, x: jax.Array, dy: jax.Array, config: Any = None
    ) -> jax.Array:
        """See `Backend.grad_values`. Under 2:4 those of all kept columns, of which the stored slots are taken."""
        if layout.pairs is not None:
            expanded = dataclasses.replace(layout, pairs=None, chosen=None)
            return layouts.select(layout, self.grad_values(call, expanded, x, dy))
        call, x = call.as_product(x)
        if call.window is not None:
            return _conv.grad_values(_layout.as_cpu(layout), x, dy, call.window, call.precision)
        token_major = call.layout == "token_major"
        return _matmul.grad_values(_layout.as_cpu(layout), x, dy, call.precision, token_major=token_major)

    @override
    def grad_input(self, call: Call, matrix: Prepared, dy: jax.Array, config: Any = None) -> jax.Array:
        """See `Backend.grad_input`; that of a convolution is a dense convolution with the decompressed filters."""
        window = call.window
        if window is not None and not window.is_matmul:
            return _conv.dense_grad_input(layouts.to_dense(matrix), dy, window, call.precision)
        dx = _matmul.grad_input(layouts.expand(matrix), dy, call.precision, token_major=call.layout == "token_major")
        return dx if window is None else dx.reshape(window.channels, *window.image, -1)
