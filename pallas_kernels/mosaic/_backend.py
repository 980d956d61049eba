"""The Mosaic backend: what its kernels can do on a Hopper GPU, when they pay, and the way to each of them."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from pallas_kernels import _tables as tables
from pallas_kernels._activations import activate
from pallas_kernels._backend import FEW_TOKENS, Backend, Call, Problem
from pallas_kernels._devices import GPU, MULTIPROCESSORS, gpu, missing_module
from pallas_kernels._layout import MatrixLayout, Prepared
from pallas_kernels._matrix import RowGrouped
from pallas_kernels._window import Window
from pallas_kernels.gpu import _layout as gpu_layout
from pallas_kernels.mosaic import _configs as configs
from pallas_kernels.mosaic._configs import BLOCK_K, GROUP_SIZES, SHARED_MEMORY, Config, GradConfig

BUSY = 0.9  # of the multiprocessors with a tile are enough
DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Mosaic(Backend):
    """Pallas-Mosaic kernels for Hopper GPUs: products, convolutions and dValues. They have no kernel for dX.

    Their modules are imported where they are called: other versions of JAX may lack what they import. `precision` is
    ignored: products of two-byte numbers are exact in the float32 sums.
    """

    name: ClassVar[str] = "mosaic_gpu"
    platforms: ClassVar[tuple[str, ...]] = ("cuda",)

    @override
    def missing(self, gpu: GPU | None) -> str:
        """See `Backend.missing`."""
        if error := missing_module("pallas_kernels.mosaic._forward"):
            return f"it needs another version of JAX ({error})"
        if gpu is None or not gpu.is_hopper:
            return f"it needs a Hopper GPU{'' if gpu is None else f', got {gpu.kind}'}"
        return ""

    @override
    def why_not(self, problem: Problem) -> list[str]:
        """See `Backend.why_not`."""
        if problem.op == "grad_input":
            return ["it has no kernel for dX"]
        if problem.is_symbolic:
            return ["it needs a number of tokens that is known when tracing"]
        reasons: list[str] = []
        window = problem.window
        if problem.group_size not in GROUP_SIZES:
            reasons.append(f"its groups have {', '.join(map(str, GROUP_SIZES))} rows, got {problem.group_size}")
        if problem.dtype not in DTYPES:
            reasons.append(f"it computes in {' and '.join(DTYPES)}, got {problem.dtype}")
        if problem.for_cpu:
            reasons.append("the matrix was prepared for another implementation")
        if problem.slots == 0:
            reasons.append("it needs at least one slot")
        if problem.op == "grad_values":
            return reasons + _why_no_grad_values(problem)
        if problem.multiple % BLOCK_K:
            reasons.append(f"it takes steps of {BLOCK_K} slots: `prepare` the matrix")
        if problem.packed:
            if problem.n == 0:
                reasons.append("it needs at least one token")
            if window is not None and not window.is_matmul:
                reasons.append("it does no convolutions with 2:4 filters of several taps or steps")
        elif window is not None:
            images = problem.n // window.output_pixels
            if images == 0 or images % gpu_layout.VECTOR:
                reasons.append(f"it needs images in multiples of {gpu_layout.VECTOR}, got {images}")
            reasons += gpu_layout.why_no_window(window)
        elif problem.few_tokens or problem.n % gpu_layout.VECTOR:
            needs = f"more than {FEW_TOKENS} tokens, in multiples of {gpu_layout.VECTOR}"
            reasons.append(f"it needs {needs}, got {problem.n}")
        return reasons

    @override
    def pays(self, problem: Problem, gpu: GPU | None) -> bool:
        """Whether a kernel here is faster than Triton's."""
        count = _multiprocessors(gpu)
        if problem.packed:  # few tokens in groups of 64 are the exception: their tiles are too wide
            return problem.group_size > 64 or problem.n > 128
        if problem.window is not None:
            # With a tile for every fourth multiprocessor or more.
            return 4 * problem.groups * -(-problem.n // 128) >= count
        entry = tables.nearest_product(None if gpu is None else gpu.kind, self.name, problem)
        if entry is not None:
            return entry["time_us"] < entry["triton_time_us"]
        # With fewer tiles than (nearly) every multiprocessor has, Triton's smaller ones keep more of them busy.
        return configs.tiles(problem, self.configs(problem, gpu)[0]) >= BUSY * count

    @override
    def config(self, problem: Problem, gpu: GPU | None) -> Config | GradConfig:
        """See `Backend.config`."""
        plain = problem.window is None and not problem.packed
        entry = tables.nearest_product(None if gpu is None else gpu.kind, self.name, problem) if plain else None
        if entry is None:
            return configs.heuristic(problem, _multiprocessors(gpu))
        fields = entry["config"] | {"registers": tuple(entry["config"]["registers"])}
        return (GradConfig if problem.op == "grad_values" else Config)(**fields)

    @override
    def configs(self, problem: Problem, gpu: GPU | None) -> tuple[Config | GradConfig, ...]:
        """See `Backend.configs`."""
        return configs.search_space(problem, _multiprocessors(gpu))

    @override
    def prepare(self, matrix: RowGrouped, window: Window | None) -> Prepared:
        """See `pallas_kernels.gpu`."""
        return gpu_layout.prepare(matrix, window)

    @override
    def forward(
        self, call: Call, matrix: Prepared, x: jax.Array, bias: jax.Array | None, addend: jax.Array | None,
        config: Config | None = None,
    ) -> jax.Array:  # fmt: skip
        """See `Backend.forward`; activations of a product are those of one instruction.

        Raises:
            NotImplementedError: the config is not legal for the matrix.
        """
        from pallas_kernels.mosaic import _forward as kernel

        layout, n, window = matrix.layout, call.tokens(x), call.window
        if addend is not None and layout.pairs is not None:
            y = self.forward(dataclasses.replace(call, activation=None), matrix, x, bias, None, config)
            return activate(call.activation, y + addend)
        if config is None:
            found = self.config(Problem.of_layout("forward", layout, n, x.dtype, window), gpu())
            assert isinstance(found, Config)
            config = found
        if call.layout == "token_major":
            x, addend = x.T, None if addend is None else addend.T
        ids = layout.columns
        # Padding is not read, as a product would: where filters have few columns it is most of a step.
        if window is None or (window.is_matmul and (layout.counts is None or layout.pairs is not None)):
            x, window = x.reshape(layout.k, -1), None
        else:
            ids, x = gpu_layout.slot_places(layout, window).reshape(-1), x.reshape(-1, x.shape[-1])
        if layout.pairs is not None:
            x = jnp.pad(x, ((0, 0), (0, -n % gpu_layout.VECTOR)))
        used = config.shared_memory(layout.group_size, layout.pairs is not None, ids.size // layout.num_slots)
        if used > SHARED_MEMORY:
            raise NotImplementedError(f"{config} takes {used} bytes of shared memory")
        if config.block_k % BLOCK_K or not gpu_layout.is_aligned(layout, config.block_k):
            raise NotImplementedError(f"{config} takes steps of {config.block_k} slots: `prepare` the matrix")
        assert layout.segments is not None
        shape = kernel.Shape(
            m=layout.m,
            n=n,
            segments=layout.segments,
            activation=call.activation,
            multiprocessors=_multiprocessors(gpu()),
            sentinels=layout.pairs is not None and layout.sentinels,
            window=window,
        )
        operands = kernel.Operands(matrix.values, ids, layout.rows, x, bias, addend, layout.pairs)
        product = functools.partial(kernel.product, shape=shape, config=config)
        with jax.enable_x64(False):  # 32 bits for indices
            y = jax.custom_batching.sequential_vmap(product)(operands)  # slices of a batch: each fills the GPU
        return y.T if call.layout == "token_major" else y

    @override
    def grad_values(
        self, call: Call, layout: MatrixLayout, x: jax.Array, dy: jax.Array, config: GradConfig | None = None
    ) -> jax.Array:
        """See `Backend.grad_values`."""
        from pallas_kernels.mosaic import _grad as kernel

        if config is None:
            found = self.config(Problem.of_layout("grad_values", layout, call.tokens(x), x.dtype), gpu())
            assert isinstance(found, GradConfig)
            config = found
        if call.layout == "token_major":
            x, dy = x.T, dy.T
        count, v, multiprocessors = layout.max_count, layout.group_size, _multiprocessors(gpu())

        def product(*operands: jax.Array) -> jax.Array:
            return kernel.product(*operands, count=count, group_size=v, config=config, multiprocessors=multiprocessors)

        # Slices of a batch run one after the other: each fills the GPU.
        with jax.enable_x64(False):  # 32 bits for indices
            return jax.custom_batching.sequential_vmap(product)(layout.columns, layout.rows, x, dy.astype(x.dtype))


def _why_no_grad_values(problem: Problem) -> list[str]:
    if problem.window is not None or problem.packed:
        return ["it has no kernel for dValues of convolutions and of 2:4"]
    reasons = []
    if not problem.exact:
        reasons.append("for dValues it takes equal counts without padding, and whole groups")
    if problem.few_tokens or problem.n % configs.GRAD_TOKENS:
        needs = f"more than {FEW_TOKENS} tokens, in multiples of {configs.GRAD_TOKENS}"
        reasons.append(f"for dValues it needs {needs}, got {problem.n}")
    return reasons


def _multiprocessors(gpu: GPU | None) -> int:
    return MULTIPROCESSORS if gpu is None or gpu.multiprocessors is None else gpu.multiprocessors
