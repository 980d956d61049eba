"""What became of every layer: sizes, the path taken and why, and times measured on this machine."""

import dataclasses
import io
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import pallas_kernels
from pallas_kernels import Matrix
from shfl_jax._paths import path_leaves
from shfl_jax.sparse._compress import CompressedLayer, layers, matrices

MEASURED_US = 2e5
"""How long `report` measures a layer at one token count, unless a single call takes longer."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """One layer at one token count, forward, token-major, without bias; medians in microseconds."""

    tokens: int
    time_us: float
    dense_time_us: float

    @property
    def speedup(self) -> float:
        """How many times faster than dense."""
        return self.dense_time_us / self.time_us


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One masked layer.

    Attributes:
        path: the kernel's path.
        pattern: the pattern's name.
        batch: number of stacked matrices, 1 if not stacked.
        m: output features M.
        k: input features K.
        group_size: V, or None if left dense.
        sparsity: the fraction of weights that are pruned.
        counts: "equal" or "ragged" kept columns per group, "-" if left dense.
        nbytes: bytes stored now, values and integers.
        dense_nbytes: bytes of the dense kernel.
        route: "row-grouped", "2:4" (packed, inside row groups) or "dense".
        why: the reason for the route.
        timings: one for each token count asked for; none for a layer left dense.
    """

    path: str
    pattern: str
    batch: int
    m: int
    k: int
    group_size: int | None
    sparsity: float
    counts: str
    nbytes: int
    dense_nbytes: int
    route: str
    why: str
    timings: tuple[Timing, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a compressed model; print it, or read its `layers`."""

    layers: tuple[LayerReport, ...]
    device: str

    @property
    def nbytes(self) -> int:
        """Bytes of all masked layers, as stored."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of all masked layers, if dense."""
        return sum(layer.dense_nbytes for layer in self.layers)

    def __rich__(self) -> Table:
        """A table for the terminal."""
        saved = (
            f"{self.nbytes / 1024:,.1f} of {self.dense_nbytes / 1024:,.1f} KiB" if self.layers else "no masked layer"
        )
        table = Table(title=f"Compressed layers on {self.device}: {saved}")
        table.add_column("layer", overflow="fold")
        table.add_column("pattern")
        for name in ("M x K", "V", "sparsity", "counts", "bytes / dense"):
            table.add_column(name, justify="right")
        table.add_column("runs as")
        counts = sorted({timing.tokens for layer in self.layers for timing in layer.timings})
        for tokens in counts:
            table.add_column(f"N={tokens}: dense / sparse", justify="right")
        for layer in self.layers:
            by_tokens = {timing.tokens: timing for timing in layer.timings}
            table.add_row(
                layer.path,
                layer.pattern,
                f"{f'{layer.batch} x ' if layer.batch > 1 else ''}{layer.m} x {layer.k}",
                "-" if layer.group_size is None else str(layer.group_size),
                f"{layer.sparsity:.1%}",
                layer.counts,
                f"{layer.nbytes / layer.dense_nbytes:.2f}",
                f"{layer.route}: {layer.why}",
                *(_cell(by_tokens.get(tokens)) for tokens in counts),
            )
        return table

    def __str__(self) -> str:
        """The same table as plain text."""
        text = io.StringIO()
        Console(file=text, width=180, no_color=True).print(self)
        return text.getvalue()


def report(sparse: Mapping[str, Any], tokens: int | Sequence[int] | None = None) -> Report:
    """Describes every masked layer of a compressed model. On the host.

    Args:
        sparse: what `compress`, `prepare` or `load` returned.
        tokens: token counts at which every compressed layer is measured against its dense form on the default device
            (its first slice, if stacked; this makes that dense weight), but no convolution, whose images could have any
            sizes. None measures nothing.

    Returns:
        The report.

    Raises:
        ValueError: this is no compressed model, or a token count is below 1.
    """
    counts = [int(n) for n in np.atleast_1d(np.asarray([] if tokens is None else tokens, int))]
    if any(n < 1 for n in counts):
        raise ValueError(f"tokens are counts of at least 1, got {tokens}")
    params, compressed = path_leaves(sparse["params"]), matrices(sparse)
    rows = []
    for path, layer in layers(sparse).items():
        matrix = compressed.get(path)
        described = _dense(path, layer, params[path]) if matrix is None else _compressed(path, layer, matrix)
        if matrix is not None and counts and not layer.spec.convolution:
            first = matrix
            for _ in layer.spec.batch_axes:
                first = jax.tree.map(operator.itemgetter(0), first)
            described = dataclasses.replace(described, timings=tuple(_timed(first, n) for n in counts))
        rows.append(described)
    return Report(tuple(rows), jax.devices()[0].device_kind)


def _dense(path: str, layer: CompressedLayer, kernel: jax.Array) -> LayerReport:
    m, k = layer.spec.matrix_shape
    sparsity = float(np.mean(np.asarray(kernel) == 0))
    size, batch = kernel.nbytes, kernel.size // (m * k)
    why = layer.dense_because
    return LayerReport(path, layer.spec.pattern.name, batch, m, k, None, sparsity, "-", size, size, "dense", why)


def _compressed(path: str, layer: CompressedLayer, matrix: Matrix) -> LayerReport:
    integers, (m, k) = matrix.integers, matrix.shape
    counts = np.asarray(integers.real_counts).reshape(-1, integers.num_groups)
    rows = (np.asarray(integers.rows) < m).reshape(*counts.shape, integers.group_size).sum(-1)
    dense = counts.shape[0] * m * k
    equal, packed = (counts == counts[:, :1]).all(), integers.pairs is not None
    stored = float((counts * rows).sum()) / (2 if packed else 1)
    if integers.chosen is not None:  # some values are padding, and zero
        stored = np.count_nonzero(np.asarray(matrix.values))
    return LayerReport(
        path,
        layer.spec.pattern.name,
        counts.shape[0],
        m,
        k,
        integers.group_size,
        1 - stored / dense,
        "equal" if equal else "ragged",
        matrix.nbytes,
        dense * matrix.dtype.itemsize,
        "2:4" if packed else "row-grouped",
        "two of every four in groups that share every index" if packed else "V rows share every index",
    )


def _timed(matrix: Matrix, tokens: int) -> Timing:
    from pallas_kernels import timing  # imports Mosaic GPU, which only measurements need

    x = jax.random.normal(jax.random.key(0), (tokens, matrix.shape[1]), matrix.dtype)
    kernel = pallas_kernels.to_dense(matrix).T  # (K, M), as Flax keeps it
    sparse_fun, dense_fun = jax.jit(pallas_kernels.matmul), jax.jit(jnp.matmul)
    functions = {"sparse": lambda: sparse_fun(matrix, x), "dense": lambda: dense_fun(x, kernel)}
    once = timing.interleaved_us(functions, 1)
    runs = min(max(round(MEASURED_US / sum(once.values())), 5), 1000)
    times = timing.interleaved_us(functions, runs)
    return Timing(tokens, times["sparse"], times["dense"])


def _cell(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    text = f"{timing.dense_time_us:,.0f} / {timing.time_us:,.0f} µs ({timing.speedup:.2f}x)"
    return text if timing.speedup >= 1 else f"[red]{text}[/red]"
