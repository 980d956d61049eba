"""What a backend is asked, and the backends there are."""

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels._devices import GPU
from pallas_kernels._layout import MatrixLayout, Prepared, as_prepared
from pallas_kernels._matrix import RowGrouped
from pallas_kernels._window import Window

Op = Literal["forward", "grad_values", "grad_input"]
Layout = Literal["token_major", "feature_major"]
FEW_TOKENS = 256
"""Up to this many tokens a product is bound by reading its weights: other kernels, other configs, other entries."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One kernel's task, in sizes: what questions to a backend are about, and the key of the measured tables.

    Attributes:
        op: the product itself or one of its derivatives.
        m: output features.
        k: input features.
        n: tokens; of a convolution output pixels times images.
        slots: kept columns over all groups, padding included.
        group_size: rows of a group.
        dtype: name of the dtype of values and activations.
        equal: whether all groups have one count, known when tracing.
        packed: whether the values are packed under 2:4.
        window: the geometry of a convolution, None for a product.
        multiple: what every segment is known to be a multiple of when tracing; 0 where all are empty.
        exact: whether no slot is padding and no stored row a sentinel.
        for_cpu: whether the matrix is arranged for XLA on a CPU.
    """

    op: Op
    m: int
    k: int
    n: int
    slots: int
    group_size: int
    dtype: str
    equal: bool = True
    packed: bool = False
    window: Window | None = None
    multiple: int = 64
    exact: bool = True
    for_cpu: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def groups(self) -> int:
        """Row groups that hold weights."""
        return -(-self.m // self.group_size)

    @property
    def density(self) -> float:
        """Stored share of the weights."""
        return self.slots * self.group_size / (self.m * self.k)

    @property
    def is_symbolic(self) -> bool:
        """Whether the number of tokens is not known when tracing (`jax.export` with symbolic shapes)."""
        return not isinstance(self.n, int)

    @property
    def few_tokens(self) -> bool:
        """Whether reading the weights is what takes the time."""
        return self.n <= FEW_TOKENS

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by which measured problems are compared."""
        return {"m": self.m, "k": self.k, "n": self.n, "slots": self.slots}

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Problem":
        """The problem of a table's entry."""
        return cls(**{field.name: entry[field.name] for field in dataclasses.fields(cls) if field.name in entry})

    @classmethod
    def of_layout(
        cls, op: Op, layout: MatrixLayout, n: int, dtype: DTypeLike, window: Window | None = None
    ) -> "Problem":
        """The problem of a matrix as it is arranged, with N tokens."""
        segments = layout.segments
        equal = segments is not None and len(segments) == 1
        exact = equal and layout.counts is None and layout.num_groups * layout.group_size == layout.m
        sizes = layout.m, layout.k, n, layout.num_slots, layout.group_size
        return cls(
            op, *sizes, jnp.dtype(dtype).name, equal, layout.pairs is not None, window, layout.multiple, exact,
            layout.for_cpu,
        )  # fmt: skip

    def __str__(self) -> str:
        """What an error says of it."""
        what = "product" if self.window is None else "convolution"
        what = {"forward": what, "grad_values": f"{what}'s dValues", "grad_input": f"{what}'s dX"}[self.op]
        packed = ", 2:4" if self.packed else ""
        return f"{what} (M={self.m}, K={self.k}, N={self.n}, V={self.group_size}{packed}, {self.dtype})"


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a product or, with a window, of a convolution, whose output is (M, N) too.

    Attributes:
        activation: the name of an activation, or None.
        layout: of the activations of a product and of its output; a convolution has x as (C, H, W, B).
        precision: as in `jax.lax.dot_general`.
        window: the geometry of a convolution.
    """

    activation: str | None = None
    layout: Layout = "feature_major"
    precision: lax.PrecisionLike = None
    window: Window | None = None

    def tokens(self, x: jax.Array) -> int:
        """N, of the activations x."""
        if self.window is not None:
            return self.window.output_pixels * x.shape[-1]
        return x.shape[0 if self.layout == "token_major" else 1]

    def as_product(self, x: jax.Array) -> tuple["Call", jax.Array]:
        """The product that a convolution with one tap, unit strides and no border is, and its x; others as they are."""
        if self.window is None or not self.window.is_matmul:
            return self, x
        return dataclasses.replace(self, window=None), x.reshape(self.window.channels, -1)


class Backend(Protocol):
    """A set of kernels. Subclass it: what a method here does is what a backend without one would do.

    Its functions take 2-D activations in the call's layout, or images (C, H, W, B).

    Attributes:
        name: what `implementation=` calls it.
        platforms: the platforms of JAX on which `implementation=None` considers it.
    """

    name: ClassVar[str]
    platforms: ClassVar[tuple[str, ...]]

    def missing(self, gpu: GPU | None) -> str:
        """Why it cannot run at all, with this version of JAX or on a GPU (None: there is none); "" where it can."""
        return ""

    @abc.abstractmethod
    def why_not(self, problem: Problem) -> list[str]:
        """Every reason why it has no kernel for a problem; empty where it has one."""

    def pays(self, problem: Problem, gpu: GPU | None) -> bool:
        """Whether its kernel for a problem is faster than those of the backends that are considered after it."""
        return True

    def config(self, problem: Problem, gpu: GPU | None) -> Any:
        """The config that a kernel runs with: the nearest measured one of the device, else the heuristic's."""
        return None

    def configs(self, problem: Problem, gpu: GPU | None) -> tuple[Any, ...]:
        """The configs worth measuring, the heuristic's first; empty where there is nothing to choose."""
        return ()

    def prepare(self, matrix: RowGrouped, window: Window | None) -> Prepared:
        """Arranges a canonical matrix, maybe stacked, for its kernels. On the host."""
        return as_prepared(matrix)

    @abc.abstractmethod
    def forward(
        self, call: Call, matrix: Prepared, x: jax.Array, bias: jax.Array | None, addend: jax.Array | None,
        config: Any = None,
    ) -> jax.Array:  # fmt: skip
        """Computes activation(W x + bias + addend), (M, N) or (N, M), of x's dtype, which all arrays have."""

    def grad_values(
        self, call: Call, layout: MatrixLayout, x: jax.Array, dy: jax.Array, config: Any = None
    ) -> jax.Array:
        """Computes dValues in the arrangement of the values, zero on padding and on sentinel rows."""
        raise NotImplementedError(f"{self.name} has no kernel for dValues")

    def grad_input(self, call: Call, matrix: Prepared, dy: jax.Array, config: Any = None) -> jax.Array:
        """Computes dX, in the shape of x."""
        raise NotImplementedError(f"{self.name} has no kernel for dX")


BACKENDS: dict[str, Backend] = {}
"""By name, in the order in which `implementation=None` considers them; the last one does everything everywhere."""


def register(backend: Backend) -> None:
    """Makes a backend known to `matmul`, `conv2d` and `prepare`, before those known already; see docs/extending.md.

    Args:
        backend: hashable, since it is static under jit: a module-level object or a frozen dataclass.

    Raises:
        ValueError: its name is taken.
    """
    if BACKENDS.get(backend.name, backend) != backend:
        raise ValueError(f"there is a backend called {backend.name!r} already: give yours a name of its own")
    others = {name: known for name, known in BACKENDS.items() if name != backend.name}
    BACKENDS.clear()
    BACKENDS.update({backend.name: backend} | others)


def implementations(platform: str) -> tuple[str, ...]:
    """What `implementation=None` considers on a platform of JAX ("cpu", "cuda", ...), in that order; names."""
    named = tuple(backend.name for backend in BACKENDS.values() if platform in backend.platforms)
    return *named, list(BACKENDS)[-1]


def choose(problem: Problem, backends: Iterable[Backend], gpu: GPU | None) -> Backend | None:
    """The first of some backends that has a kernel for a problem and pays."""
    for backend in backends:
        if not backend.missing(gpu) and not backend.why_not(problem) and backend.pays(problem, gpu):
            return backend
    return None


def check(backend: Backend, problem: Problem, gpu: GPU | None) -> None:
    """Checks that a backend asked for by name can do a problem.

    Raises:
        NotImplementedError: it cannot; the text has every reason, and which of the others could.
    """
    missing = backend.missing(gpu)
    reasons = ([missing] if missing else []) + backend.why_not(problem)
    if reasons:
        others = [
            other.name
            for other in BACKENDS.values()
            if other != backend and not other.missing(gpu) and not other.why_not(problem)
        ]
        able = f"; {', '.join(others)} can" if others else ""
        raise NotImplementedError(f"{backend.name} cannot compute this {problem}: {'; '.join(reasons)}{able}")
