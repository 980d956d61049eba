"""The picture of the accuracy record: what every pattern costs, and how it falls with the sparsity."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.figures import COLOURS

MEASURES = {
    "accuracy": "test accuracy, %",
    "token_accuracy": "test token accuracy, %",
    "bits_per_char": "validation bits per character",
}
CURVES = ("EW", "Shfl-BW 64", "TVW 128", "BW 32")
"""The labels that have more than one sparsity."""


def draw(path: Path, document: Mapping[str, Any]) -> None:
    """Draws one row of two panels for every task of a results file, and writes the picture.

    Args:
        path: where to; the suffix decides the format.
        document: the content of an accuracy.json.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the file holds no record.
    """
    from matplotlib.figure import Figure

    records = [record for record in document["records"] if record["op"] == "accuracy"]
    tasks = list(dict.fromkeys(record["task"] for record in records))
    if not tasks:
        raise ValueError("there is nothing to draw; run `python -m training.accuracy` first")
    figure = Figure(figsize=(11, 3.9 * len(tasks)), dpi=120, layout="constrained")
    for (left, right), task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True):
        mine = [record for record in records if record["task"] == task]
        _patterns(left, mine)
        _curves(right, mine)
    figure.savefig(path)


def _values(records: list[dict[str, Any]], label: str, sparsity: float) -> np.ndarray:
    factor = 100 if records[0]["higher"] else 1
    return factor * np.asarray(
        [r[r["measure"]] for r in records if r["label"] == label and r["sparsity"] == sparsity], np.float64
    )


def _patterns(axis: Any, records: list[dict[str, Any]]) -> None:
    """Every seed of every pattern at 75%, and the means."""
    means = {r["label"]: _values(records, r["label"], 0.75) for r in records if r["sparsity"] == 0.75}
    dense = _values(records, "dense", 0.0)
    # The best at the top, whether higher or lower is better.
    order = sorted(means, key=lambda label: means[label].mean(), reverse=not records[0]["higher"])
    for place, label in enumerate(order):
        colour = COLOURS[2] if label.startswith("Shfl") else COLOURS[1]
        axis.plot(means[label], np.full(len(means[label]), place), "o", color=colour, alpha=0.45, markersize=4)
        axis.plot(means[label].mean(), place, "|", color=colour, markersize=14, markeredgewidth=2.2)
    if len(dense):
        axis.axvline(dense.mean(), color=COLOURS[0], linestyle=":", linewidth=1.2, label="dense, mean")
        axis.legend(frameon=False, loc="upper left" if records[0]["higher"] else "upper right")
    axis.set_yticks(range(len(order)), order)
    axis.set(title=f"{records[0]['task']}: every seed at 75%, bar: mean", xlabel=MEASURES[records[0]["measure"]])
    _tidy(axis)


def _curves(axis: Any, records: list[dict[str, Any]]) -> None:
    """The patterns that were trained at several sparsities, with the range of the seeds."""
    dense = _values(records, "dense", 0.0)
    if len(dense):
        axis.axhline(dense.mean(), color=COLOURS[0], linestyle=":", linewidth=1.2, label="dense")
    for label, colour in zip(CURVES, COLOURS[1:], strict=False):
        found = sorted({r["sparsity"] for r in records if r["label"] == label})
        if found:
            values = [_values(records, label, sparsity) for sparsity in found]
            percents = [100 * sparsity for sparsity in found]
            axis.plot(
                percents, [v.mean() for v in values], "o-", color=colour, label=label, linewidth=1.6, markersize=4
            )
            axis.fill_between(
                percents, [v.min() for v in values], [v.max() for v in values], color=colour, alpha=0.15, linewidth=0
            )
    axis.legend(frameon=False)
    title = f"{records[0]['task']}: over the sparsity, band: all seeds"
    axis.set(title=title, xlabel="sparsity, %", ylabel=MEASURES[records[0]["measure"]])
    _tidy(axis)


def _tidy(axis: Any) -> None:
    axis.grid(color="#dddddd", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
