"""Compressing trained models, timing them against the dense one, and telling the result."""

import dataclasses
import datetime
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.table import Table

import shfl_jax
from pallas_kernels import implementations, timing
from shfl_jax import Pattern
from training.gpt import GPT

TIMED_BATCH, TIMED_RUNS = 16, 20


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
        label: how tables call it.
        seed: of initialisation, data and dropout.
        pattern: None if dense.
        params: trained parameters, on the device.
        masks: None if dense.
        bits: validation bits per character.
        curve: (step, validation bits per character on a part of the text).
    """

    label: str
    seed: int
    pattern: Pattern | None
    params: Any
    masks: shfl_jax.Masks | None
    bits: float
    curve: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A compressed model that was saved and loaded, or the dense one: bytes of its pruned layers, and forward time.

    Attributes:
        nbytes: values and integers of the pruned layers.
        time_us: median time of a forward pass.
        error: largest difference of logits to those of the masked dense model, relative to the largest logit.
        dense: path -> why that pruned layer was left dense.
    """

    nbytes: int
    time_us: float
    error: float
    dense: dict[str, str] = dataclasses.field(default_factory=dict)


def measure(runs: list[Run], model: GPT, out: Path) -> dict[str, Measurement]:
    """Compresses the pruned models, saves and loads them, compares their logits, and times all of them in turn.

    Args:
        runs: of one seed; one of them is the dense model.
        model: their architecture.
        out: where checkpoints go, one folder a pattern.
    """
    tokens = (TIMED_BATCH, model.context)
    exact = model.clone(dtype=jnp.float32)
    dense = next(run for run in runs if run.pattern is None)
    inputs = jax.random.randint(jax.random.key(1), tokens, 0, model.vocab)
    dense_forward = jax.jit(lambda params, x: model.apply({"params": params}, x))
    forwards: dict[str, Callable[[], Any]] = {"dense": functools.partial(dense_forward, dense.params, inputs)}
    kernels = shfl_jax.path_leaves(dense.params)
    masked = next(run.masks for run in runs if run.masks is not None)
    dense_bytes = sum(kernels[path].nbytes for path in masked)
    stored: dict[str, tuple[int, float, dict[str, str]]] = {"dense": (dense_bytes, 0.0, {})}
    for run in runs:
        if run.pattern is None or run.masks is None or run.pattern.group_size == 1:
            continue
        sparse = shfl_jax.compress(run.params, run.masks, tokens=int(np.prod(tokens)), dtype=model.dtype)
        path = out / run.label.lower().replace(", ", "_").replace(" ", "_").replace("-", "_")
        shfl_jax.save(path, sparse)
        loaded = shfl_jax.load(path)
        ready = shfl_jax.prepare(loaded)
        with jax.default_matmul_precision("highest"):
            wanted = jnp.asarray(exact.apply({"params": run.params}, inputs))
            got = jax.jit(functools.partial(shfl_jax.linen.apply, exact))(ready, inputs)
        error = float(jnp.abs(got - wanted).max() / jnp.abs(wanted).max())
        report = shfl_jax.report(loaded)
        stored[run.label] = (report.nbytes, error, {x.path: x.why for x in report.layers if x.route == "dense"})
        sparse_forward = jax.jit(functools.partial(shfl_jax.linen.apply, model))
        forwards[run.label] = functools.partial(sparse_forward, ready, inputs)
    times = timing.interleaved_us(forwards, TIMED_RUNS)
    return {label: Measurement(nbytes, times[label], error, why) for label, (nbytes, error, why) in stored.items()}


def table(runs: list[Run], measured: dict[str, Measurement]) -> Table:
    """The demo's result: one row a pattern, bits per character in the mean of the seeds."""
    seeds = sorted({run.seed for run in runs})
    dense_bits, dense = _mean_bits(runs, "dense"), measured["dense"]
    over = f", mean of {len(seeds)} seeds" if len(seeds) > 1 else ""
    title = f"Dense and pruned, all trained for as many steps{over}"
    result = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    result.add_column("pattern")
    for name in ("sparsity", "bits/char", "vs dense", "bytes", "forward", "speed-up"):
        result.add_column(name, justify="right", no_wrap=True)
    for run in (run for run in runs if run.seed == seeds[0]):
        bits, m = _mean_bits(runs, run.label), measured.get(run.label)
        sparsity = 0.0 if run.masks is None else _sparsity(run.masks)
        v = 1 if run.pattern is None else run.pattern.group_size
        measures = ("no kernel", "", "")
        if m is not None:
            share, speedup = f"{m.nbytes / dense.nbytes:.0%}", f"{dense.time_us / m.time_us:.2f}x"
            measures = (f"{m.nbytes:,} {share:>4}", f"{m.time_us / 1e3:.1f} ms", speedup)
        result.add_row(
            run.label if v == 1 else f"{run.label}, V={v}",
            f"{sparsity:.1%}",
            f"{bits:.3f}",
            f"{bits / dense_bits - 1:+.1%}",
            *measures,
        )
    return result


def results(
    runs: list[Run], measured: dict[str, Measurement], model: GPT, steps: int, baseline: float
) -> dict[str, Any]:
    """The results file: one record a run. Times and bytes were measured on the models of the first seed."""
    first, dense_us = min(run.seed for run in runs), measured["dense"].time_us
    records = []
    for run in runs:
        m = measured.get(run.label) if run.seed == first else None
        records.append(
            {
                "op": "model",
                "label": run.label,
                "pattern": "dense" if run.pattern is None else run.pattern.name,
                "implementation": _implementation(run, m),
                "m": model.mlp,
                "k": model.d_model,
                "n": TIMED_BATCH * model.context,
                "dtype": jnp.dtype(model.dtype).name,
                "sparsity": 0.0 if run.masks is None else _sparsity(run.masks),
                "group_size": None if run.pattern is None else run.pattern.group_size,
                "counts": _counts(run.pattern) or None,
                "time_us": None if m is None else m.time_us,
                "dense_time_us": None if m is None else dense_us,
                "speedup": None if m is None else dense_us / m.time_us,
                "bits_per_char": run.bits,
                "nbytes": None if m is None else m.nbytes,
                "dense_nbytes": measured["dense"].nbytes,
                "logits_error": None if m is None else m.error,
                "dense_layers": None if m is None else len(m.dense),
                "layers": model.layers,
                "steps": steps,
                "seed": run.seed,
            }
        )
    return {
        "device": device(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "markov_bits_per_char": baseline,
        "records": records,
        "curves": {run.label: run.curve for run in runs if run.seed == first},
    }


def _mean_bits(runs: list[Run], label: str) -> float:
    return statistics.mean(run.bits for run in runs if run.label == label)


def _sparsity(masks: shfl_jax.Masks) -> float:
    """Fraction of pruned weights over all masked layers."""
    sizes = np.asarray([np.prod(spec.shape) for spec in masks.specs])
    return float(1 - np.dot(sizes, [masks[spec.path].density().mean() for spec in masks.specs]) / sizes.sum())


def _counts(pattern: Pattern | None) -> str:
    if pattern is None or pattern.group_size == 1:
        return ""
    return "equal" if getattr(pattern, "balanced", False) else "ragged"


def device() -> str:
    """The default device as results files spell it, such as "cpu" or "nvidia-h200"."""
    return jax.devices()[0].device_kind.lower().replace(" ", "-")


def _implementation(run: Run, measured: Measurement | None) -> str:
    """What a model's products ran on, or may have run on where `matmul` chooses by shape."""
    if measured is None or run.masks is None or len(measured.dense) == len(run.masks):
        return "xla"
    return "+".join(implementations("cuda")[:-1]) if jax.default_backend() == "gpu" else "xla"
