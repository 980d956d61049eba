"""How much the loss rises when one layer alone is pruned, and the allocation of sparsity that follows from it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from shfl_jax._layers import LayerSpec
from shfl_jax._paths import path_leaves, update_paths
from shfl_jax.patterns import alike, all_units, kept_units, magnitude, to_sparsities
from shfl_jax.patterns import mask as choose


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Losses of a model with one layer pruned. Printing it shows a table.

    Attributes:
        sparsities: (S,), as asked for.
        losses: path -> (S,) float64, mean loss over the batches with that layer alone pruned to each sparsity.
        dense: the mean loss with nothing pruned.
    """

    sparsities: tuple[float, ...]
    losses: dict[str, np.ndarray]
    dense: float

    def __rich__(self) -> Table:
        """The table, one row a layer."""
        table = Table("layer", title=f"Loss with one layer pruned (dense: {self.dense:.4f})")
        for sparsity in self.sparsities:
            table.add_column(f"{sparsity:.1%}", justify="right")
        for path, losses in self.losses.items():
            table.add_row(path, *(f"{loss:.4f}" for loss in losses))
        return table

    def allocation(self, specs: Mapping[str, LayerSpec]) -> dict[str, float]:
        """Spreads sparsity over layers so that the sum of the measured rises of the loss is smallest.

        Layers are assumed not to affect each other. Losses are interpolated linearly between measured sparsities, and
        replaced by their convex hull where the curve is not convex: the best allocation then prunes first where one
        more pruned weight costs least.

        Args:
            specs: path -> spec of layers that were measured.

        Returns:
            path -> sparsity, for `allocate` and whatever takes its methods. Layers of equal patterns together keep as
            many units as their patterns say.

        Raises:
            ValueError: a layer was not measured, or not at sparsities high enough for what the patterns prune.
        """
        sparsities: dict[str, float] = {}
        for layers in alike(specs.values()):
            pattern = layers[0].pattern
            rest = sum(all_units(spec) * (1 - pattern.min_sparsity) - kept_units(spec) for spec in layers)
            pieces = sorted(
                (slope / all_units(spec), i, start, end)
                for i, spec in enumerate(layers)
                for start, end, slope in self._hull(spec)
            )
            densities = [1 - pattern.min_sparsity] * len(layers)
            for _, i, start, end in pieces:
                units, shape = all_units(layers[i]), layers[i].matrix_shape
                most = 1 - pattern.least(shape) / pattern.units(shape)
                pruned = max(0, min(rest, units * (min(end, most) - max(start, pattern.min_sparsity))))
                densities[i] -= pruned / units
                rest -= pruned
            if rest > 0.5:
                raise ValueError(
                    f"{pattern!r} prunes more than {', '.join(spec.path for spec in layers)} were measured at: up to "
                    f"{max(self.sparsities)} with a finite loss at best; measure higher sparsities"
                )
            sparsities |= to_sparsities(layers, densities)
        return {path: sparsities[path] for path in specs}

    def _hull(self, spec: LayerSpec) -> list[tuple[float, float, float]]:
        """The lower convex hull of a layer's loss from sparsity 0 on: (start, end, slope) of each straight piece."""
        if spec.path not in self.losses:
            raise ValueError(f"{spec.path}: not measured, only {', '.join(self.losses)}")
        measured = {0.0: self.dense} | dict(zip(self.sparsities, self.losses[spec.path].tolist(), strict=True))
        x, y = np.array(sorted(point for point in measured.items() if np.isfinite(point[1]))).T
        pieces: list[tuple[float, float, float]] = []
        i = 0
        while i < len(x) - 1:
            slopes = (y[i + 1 :] - y[i]) / (x[i + 1 :] - x[i])
            j = i + 1 + int(np.argmin(slopes))
            pieces.append((float(x[i]), float(x[j]), float(slopes.min())))
            i = j
        return pieces

    def plot(self, path: str | Path) -> None:
        """Draws the rise of every layer's loss over its sparsity, and writes it to an image file.

        Raises:
            ModuleNotFoundError: matplotlib, of the extra `plot`, is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.5 + 0.28 * len(self.losses)), layout="constrained")
        axes = figure.add_subplot()
        names = list(self.losses)
        rises = np.stack([self.losses[name] - self.dense for name in names])
        largest = max(float(np.abs(rises).max()), 1e-12)
        image = axes.imshow(rises, aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set_xticks(range(len(self.sparsities)), [f"{sparsity:.1%}" for sparsity in self.sparsities])
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("sparsity of this layer alone")
        for row, values in enumerate(rises):
            for column, value in enumerate(values):
                strong = abs(value) > 0.6 * largest
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", color="white" if strong else "black")
        figure.colorbar(image, label="rise of the loss")
        figure.savefig(path, dpi=120)


def sensitivity(
    loss: Callable[..., jax.Array],
    params: Any,
    specs: Mapping[str, LayerSpec],
    batches: Iterable[Any],
    sparsities: Sequence[float] = (0.5, 0.75, 0.9),
    *,
    score: Callable[[jax.Array], jax.Array] = magnitude,
    progress: bool = False,
) -> Sensitivity:
    """Measures the loss for every layer and sparsity, one layer pruned at a time.

    It takes (layers x sparsities + 1) evaluations of the loss on every batch; only one batch is held at a time if
    `batches` is a sequence that makes them as they are read.

    Args:
        loss: `loss(params, *batch)`, a scalar; jitted here.
        params: the parameter tree. It is left as it is.
        specs: path -> spec; patterns are used at the given sparsities. N:M has one of its own: the layer is
            pruned on the way there, as in a schedule, and sparsities beyond it are an error.
        batches: each a tuple of positional arguments, or one array.
        sparsities: each in [0, 1).
        score: from weights (..., M, K) to saliency scores.
        progress: whether to show a progress bar.

    Returns:
        The losses.

    Raises:
        ValueError: no batch, no layer, a sparsity that a pattern cannot have, or a loss that is not finite with
            nothing pruned.
    """
    batches = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    sparsities = tuple(float(sparsity) for sparsity in sparsities)
    if not batches or not specs or not sparsities:
        raise ValueError("sensitivity needs at least one batch, one layer and one sparsity")
    for path, spec in specs.items():
        for sparsity in sparsities:
            if not 0 <= sparsity < 1 or sparsity > spec.pattern.max_sparsity:
                raise ValueError(f"{path}: {spec.pattern!r} cannot have a sparsity of {sparsity}")
    compiled = jax.jit(loss)
    kernels = path_leaves(params)

    def mean(params: Any) -> float:
        return float(np.mean([float(compiled(params, *batch)) for batch in batches]))

    dense = mean(params)
    if not np.isfinite(dense):
        raise ValueError(f"the loss is {dense} with nothing pruned; look at the batches and the parameters")
    losses = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not progress, transient=True) as bar:
        task = bar.add_task("sensitivity", total=len(specs) * len(sparsities))
        for path, spec in specs.items():
            bar.update(task, description=path)
            rows = []
            for sparsity in sparsities:
                kernel = jnp.asarray(kernels[path])
                count = spec.pattern.count(spec.matrix_shape, sparsity)
                rows.append(mean(update_paths(params, {path: _prune(kernel, count, spec, score)})))
                bar.advance(task)
            losses[path] = np.asarray(rows)
    return Sensitivity(sparsities, losses, dense)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _prune(kernel: jax.Array, count: jax.Array, spec: LayerSpec, score: Callable[..., jax.Array]) -> jax.Array:
    weight = spec.to_matrix(kernel)
    mask = choose(score(weight), spec.pattern, count)
    return spec.from_matrix(jnp.where(mask.elements(), weight, 0))
