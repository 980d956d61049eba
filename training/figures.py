"""The demo's picture: loss curves, and one layer's mask before and after the row permutation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shfl_jax.patterns import Mask

COLOURS = ("#444444", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The Okabe-Ito colours, told apart by colour-blind readers too."""


def draw(
    path: Path,
    curves: Mapping[str, Sequence[tuple[int, float]]],
    *,
    pruning: tuple[int, int],
    baseline: float,
    mask: Mask,
    layer: str,
) -> None:
    """Draws the picture and writes it.

    Args:
        path: where to; the suffix decides the format.
        curves: label -> (step, validation bits per character).
        pruning: first and last step of the pruning window.
        baseline: bits per character of the Markov model.
        mask: a mask without leading axes.
        layer: name of the mask's layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.4), dpi=120, layout="constrained")
    top, bottom = np.ravel(figure.subfigures(2, 1, height_ratios=(1, 1.15), squeeze=False))
    losses = top.subplots(1, 2, width_ratios=(1.5, 1))
    _curves(losses[0], curves, pruning, baseline, "Whole run", 0)
    _curves(losses[1], curves, pruning, baseline, "Pruning and recovery", pruning[0])
    losses[0].legend(frameon=False)

    (m, k), v = mask.shape, mask.group_size
    before = np.asarray(mask.elements())
    rows = np.asarray(mask.rows)
    after = before[rows[rows < m]]
    bottom.suptitle(f"{layer}: kept weights (dark), {1 - before.mean():.0%} pruned, {m} x {k}, V={v}")
    for axis, picture, title, label in zip(
        bottom.subplots(1, 2),
        (before, after),
        ("Rows in their own order", "Rows as stored: V rows share their columns"),
        ("output feature (row of W)", "stored row"),
        strict=True,
    ):
        axis.imshow(picture, cmap="Blues", vmin=0, vmax=1.15, interpolation="nearest", aspect="auto")
        axis.set(title=title, xlabel="input feature (column of W)", ylabel=label)
    for boundary in range(v, m, v):
        axis.axhline(boundary - 0.5, color=COLOURS[2], linewidth=1)
    figure.savefig(path)


def _curves(axis: Any, curves: Mapping, pruning: tuple[int, int], baseline: float, title: str, start: int) -> None:
    axis.axvspan(*pruning, color="#eeeeee", label="masks are updated")
    values = [baseline]
    for (label, points), colour in zip(curves.items(), (COLOURS * (1 + len(curves) // len(COLOURS))), strict=False):
        steps, bits = zip(*((step, value) for step, value in points if step >= start), strict=True)
        axis.plot(steps, bits, color=colour, label=label, linewidth=1.6, marker="o", markersize=2.5)
        values.extend(bits)
    axis.axhline(baseline, color="black", linestyle=":", linewidth=1, label="order-3 Markov model")
    axis.set(title=title, xlabel="training step", ylabel="validation bits per character")
    # Early losses would flatten everything else.
    axis.set_ylim(top=min(max(values) + 0.05, 2 * min(values)))
    axis.grid(color="#dddddd", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
