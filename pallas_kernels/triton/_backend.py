"""The Triton backend: what its kernels can do, and the way to each of them."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from typing_extensions import override

from pallas_kernels import _layout as layouts
from pallas_kernels._activations import activate
from pallas_kernels._backend import FEW_TOKENS, Backend, Call, Op, Problem
from pallas_kernels._devices import GPU, gpu, missing_module
from pallas_kernels._layout import MatrixLayout, Prepared
from pallas_kernels._matrix import RowGrouped
from pallas_kernels._window import Window
from pallas_kernels.gpu import _layout as gpu_layout
from pallas_kernels.triton import _configs as configs
from pallas_kernels.triton._configs import Config
from pallas_kernels.xla._conv import dense_grad_input

DTYPES = ("bfloat16", "float16", "float32")
MOST_PACKED_TOKENS = 128  # beyond it the expanded matrix is faster
SHORTEST = 16  # what the matrix unit contracts at least of two-byte numbers: shorter products come out wrong


@dataclasses.dataclass(frozen=True)
class Triton(Backend):
    """Pallas-Triton kernels for NVIDIA GPUs, interpreted elsewhere.

    Their modules are imported where they are called: JAX has deprecated Pallas-Triton, and may come without it.
    """

    name: ClassVar[str] = "triton"
    platforms: ClassVar[tuple[str, ...]] = ("cuda",)

    @override
    def missing(self, gpu: GPU | None) -> str:
        """See `Backend.missing`."""
        if error := missing_module("jax.experimental.pallas.triton"):
            return f"this version of JAX has no Pallas-Triton ({error})"
        if gpu is not None and not gpu.runs_triton:
            return f"this version of JAX compiles no Triton kernels for {gpu.kind}"
        return ""

    @override
    def why_not(self, problem: Problem) -> list[str]:
        """See `Backend.why_not`."""
        if problem.is_symbolic:
            return ["it needs a number of tokens that is known when tracing"]
        reasons: list[str] = []
        v = problem.group_size
        if v < 16 or v & (v - 1):
            reasons.append(f"its groups have 16, 32, 64, ... rows, got {v}")
        if problem.dtype not in DTYPES:
            reasons.append(f"it computes in {', '.join(DTYPES)}, got {problem.dtype}")
        if problem.for_cpu:
            reasons.append("the matrix was prepared for another implementation")
        if problem.slots == 0:
            reasons.append("it needs at least one slot")
        if problem.window is not None and not problem.window.is_matmul and problem.op != "grad_input":
            reasons += gpu_layout.why_no_window(problem.window)
        return reasons

    @override
    def config(self, problem: Problem, gpu: GPU | None) -> Config:
        """See `Backend.config`; a convolution has the config of the product of its size."""
        return configs.config(problem, None if gpu is None else gpu.kind)

    @override
    def configs(self, problem: Problem, gpu: GPU | None) -> tuple[Config, ...]:
        """See `Backend.configs`."""
        space = configs.search_space(problem)
        # Above so many tokens dX is a dense product, and no config matters.
        return space[:1] if problem.op == "grad_input" and not problem.few_tokens else space

    @override
    def prepare(self, matrix: RowGrouped, window: Window | None) -> Prepared:
        """See `pallas_kernels.gpu`."""
        return gpu_layout.prepare(matrix, window)

    @override
    def forward(
        self, call: Call, matrix: Prepared, x: jax.Array, bias: jax.Array | None, addend: jax.Array | None,
        config: Config | None = None,
    ) -> jax.Array:  # fmt: skip
        """See `Backend.forward`; an addend is added behind the kernel.

        Raises:
            NotImplementedError: the config is not legal for the kernel.
        """
        if addend is not None:
            y = self.forward(dataclasses.replace(call, activation=None), matrix, x, bias, None, config)
            return activate(call.activation, y + addend)
        call, x = call.as_product(x)
        if call.tokens(x) == 0:
            m = matrix.layout.m
            return jnp.zeros((0, m) if call.layout == "token_major" else (m, 0), x.dtype)
        if call.window is not None:
            return self._convolve(call.window, call, matrix, x, bias, config)
        from pallas_kernels.triton import _forward, _two_four

        flat = _feature_major(call, x)
        n = flat.shape[1]
        few = n <= MOST_PACKED_TOKENS or config is not None
        packed = matrix.layout.pairs is not None and few and gpu_layout.is_aligned(matrix.layout, gpu_layout.WORD)
        if not packed and matrix.layout.pairs is not None:
            matrix, config = _two_four.expanded(matrix), None
        flat = gpu_layout.pad_tokens(flat)
        config = config or self._looked_up("forward", matrix.layout, n if packed else flat.shape[1], x)
        if packed and x.dtype.itemsize == 2 and config.block_k < SHORTEST * gpu_layout.WORD:
            least = SHORTEST * gpu_layout.WORD
            raise NotImplementedError(f"the packed kernel takes steps of {least} slots or more, got {config}")
        kernel = _two_four.forward if packed else _forward.forward
        y = kernel(matrix, flat, bias, activation=call.activation, precision=call.precision, config=config)[:, :n]
        return y.T if call.layout == "token_major" else y

    def _convolve(
        self, window: Window, call: Call, matrix: Prepared, x: jax.Array, bias: jax.Array | None,
        config: Config | None,
    ) -> jax.Array:  # fmt: skip
        from pallas_kernels.triton import _conv

        if matrix.layout.pairs is not None:
            matrix = Prepared(layouts.expand(matrix).values, layouts.filled(matrix.layout))
        n = window.output_pixels * _conv.padded_batch(x.shape[-1])
        config = config or self._looked_up("forward", matrix.layout, n, x)
        options = {"window": window, "activation": call.activation, "precision": call.precision}
        return _conv.forward(matrix, x, bias, config=config, **options)

    @override
    def grad_values(
        self, call: Call, layout: MatrixLayout, x: jax.Array, dy: jax.Array, config: Config | None = None
    ) -> jax.Array:
        """See `Backend.grad_values`. Under 2:4 those of all kept columns, of which the stored slots are taken."""
        if layout.pairs is not None:
            return layouts.select(layout, self.grad_values(call, layouts.filled(layout), x, dy, config))
        if x.size == 0:
            return jnp.zeros((layout.num_slots, layout.group_size), x.dtype)
        from pallas_kernels.triton import _conv, _grad

        call, x = call.as_product(x)
        dy = dy.astype(x.dtype)
        if call.window is not None:
            n = call.window.output_pixels * _conv.padded_batch(x.shape[-1])
            config = config or self._looked_up("grad_values", layout, n, x)
            return _conv.grad_values(layout, x, dy, window=call.window, precision=call.precision, config=config)
        flat, dy = (gpu_layout.pad_tokens(_feature_major(call, a)) for a in (x, dy))
        config = config or self._looked_up("grad_values", layout, flat.shape[1], flat)
        return _grad.grad_values(layout, flat, dy, precision=call.precision, config=config)

    @override
    def grad_input(self, call: Call, matrix: Prepared, dy: jax.Array, config: Config | None = None) -> jax.Array:
        """See `Backend.grad_input`. No (M, K) array is made for a product of up to `FEW_TOKENS` tokens."""
        from pallas_kernels.triton import _grad

        window, matrix = call.window, layouts.expand(matrix)
        layout = matrix.layout
        if window is not None and not window.is_matmul:
            return dense_grad_input(_grad.decompress(matrix), dy, window, call.precision)
        token_major = call.layout == "token_major"
        n = dy.shape[0 if token_major else 1]
        if n == 0:
            dx = jnp.zeros((0, layout.k) if token_major else (layout.k, 0), dy.dtype)
        elif n > FEW_TOKENS:
            weight = _grad.decompress(matrix)
            axes = ((1,), (0,)) if token_major else ((0,), (0,))
            pair = (dy, weight) if token_major else (weight, dy)
            dx = lax.dot_general(*pair, (axes, ((), ())), precision=call.precision, preferred_element_type=jnp.float32)
            dx = dx.astype(dy.dtype)
        else:
            flat = gpu_layout.pad_tokens(dy.T if token_major else dy)
            config = config or self._looked_up("grad_input", layout, flat.shape[1], flat)
            dx = _grad.grad_input(matrix, flat, precision=call.precision, config=config)[:, :n]
            dx = dx.T if token_major else dx
        return dx if window is None else dx.reshape(window.channels, *window.image, -1)

    def _looked_up(self, op: Op, layout: MatrixLayout, n: int, x: jax.Array) -> Config:
        return self.config(Problem.of_layout(op, layout, n, x.dtype), gpu())


def _feature_major(call: Call, x: jax.Array) -> jax.Array:
    return x.T if call.layout == "token_major" else x
