"""Train a small Transformer, prune it to 75%, compress it and run it faster.

The text is that of Python's own help topics. A dense model is trained; every pattern then goes on from it, gradually
pruned, while the dense model trains on for as many steps. The pruned models are compressed, saved, loaded and timed.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import shfl_jax
import training
from shfl_jax import BW, VW, Pattern, ShflBW, Unstructured
from training import figures, loop, text
from training.gpt import GPT
from training.losses import bits_per_token

PRUNED = r"(.*/)?(mlp|attn)/.*"
"""The layers that are pruned: all projections of attention and MLP."""
TIMED_BATCH, TIMED_RUNS = 16, 20


@dataclasses.dataclass(frozen=True)
class Preset:
    """A size of the demo.

    Attributes:
        model: the model, but for its vocabulary.
        batch: windows a step.
        dense_steps: steps of the dense model before pruning.
        prune_steps: further steps of every model, the dense one included.
        every: steps between mask updates, over the first 60% of `prune_steps`.
        block: steps in one compiled call; it divides the steps.
        learning_rate: peak of AdamW's.
        patterns: what to prune to, by label.
        seeds: number of runs.
    """

    model: GPT
    batch: int
    dense_steps: int
    prune_steps: int
    every: int
    block: int
    learning_rate: float
    patterns: tuple[tuple[str, Pattern], ...]
    seeds: int = 1

    @property
    def steps(self) -> int:
        """Steps of every model in total."""
        return self.dense_steps + self.prune_steps

    @property
    def window(self) -> tuple[int, int]:
        """First and last step that updates the masks, counted from the start of pruning."""
        return 0, round(0.6 * self.prune_steps)

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW: warm-up, a constant rate, and from the middle of the pruning window a linear decay to zero."""
        decay = self.dense_steps + self.window[1] // 2
        rate = optax.join_schedules(
            [
                optax.linear_schedule(0, self.learning_rate, self.dense_steps // 20 + 1),
                optax.linear_schedule(self.learning_rate, 0, self.steps - decay),
            ],
            [decay],
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))


def _equal(sparsity: float, v: int) -> tuple[tuple[str, Pattern], ...]:
    return (
        ("Shfl-BW", ShflBW(sparsity, group_size=v, balanced=True)),
        ("VW", VW(sparsity, group_size=v, balanced=True)),
    )


PRESETS = {
    "cpu": Preset(GPT(0), 8, 1800, 750, 30, 10, 1e-3, _equal(0.75, 64)),
    "smoke": Preset(GPT(0, 32, 64, 1, 2, 128), 8, 60, 60, 12, 20, 3e-3, _equal(0.75, 16)),
    "gpu": Preset(
        GPT(0, 256, 512, 6, 8, 2048, 0.2, jnp.bfloat16),
        32,
        1200,
        800,
        40,
        40,
        1e-3,
        (
            *_equal(0.75, 64),
            ("Shfl-BW, ragged", ShflBW(0.75, group_size=64, min_share=0.25)),
            ("VW, ragged", VW(0.75, group_size=64, min_share=0.25)),
            ("BW 32", BW(0.75, block_size=32)),
            ("EW", Unstructured(0.75)),
        ),
        seeds=3,
    ),
}


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
        sparsity: fraction of pruned weights.
    """

    nbytes: int
    time_us: float
    error: float
    sparsity: float


def main(argv: list[str] | None = None) -> int:
    """Runs the demo.

    Args:
        argv: the arguments, `sys.argv[1:]` unless given.

    Returns:
        0, or 1 if a compressed model does not compute what the masked dense one does.
    """
    parser = argparse.ArgumentParser(prog="shfl-jax demo", description=__doc__, epilog="Example: shfl-jax demo")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="cpu: minutes on two cores; gpu: 3 seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where results go (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first run (default: %(default)s)")
    options = parser.parse_args(argv)
    console, start = Console(), time.monotonic()
    preset, data = PRESETS[options.preset], text.topics()
    preset = dataclasses.replace(preset, model=preset.model.clone(vocab=len(data.alphabet)))
    options.out.mkdir(parents=True, exist_ok=True)
    baseline = text.markov_bits(data)
    console.print(
        f"A GPT of {preset.model.layers} layers, d_model {preset.model.d_model}, on {_device()}; {len(data.train):,} "
        f"characters to train on, {len(data.validation):,} to validate; {preset.steps} steps for every model."
    )
    seeds = range(options.seed, options.seed + preset.seeds)
    with _progress(console) as progress:
        runs = [run for seed in seeds for run in train_all(preset, data, seed, progress)]
    measured = measure([run for run in runs if run.seed == options.seed], preset, options.out)
    console.print(table(runs, measured))
    console.print(
        f"An add-delta order-3 character model needs {baseline:.3f} bits. Speed-up: forward pass of {TIMED_BATCH} x "
        f"{preset.model.context} characters under jit, timings interleaved, median of {TIMED_RUNS}. "
        "'equal': every row group keeps as many columns, in Shfl-BW and VW alike."
    )
    errors = {label: m.error for label, m in measured.items() if label != "dense"}
    for label, error in errors.items():
        console.print(f"{label}: logits of the compressed model differ from the masked dense ones by {error:.1e}")
    record = results(runs, measured, preset, options.preset, baseline)
    (options.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    drawn = "demo.json and demo.png"
    if importlib.util.find_spec("matplotlib") is None:
        drawn = "demo.json (no demo.png: matplotlib is not installed; pip install 'shfl-jax[plot]')"
    else:
        _draw(options.out / "demo.png", runs, preset, baseline)
    console.print(f"{options.out}: {drawn}; {time.monotonic() - start:.0f} s in all")
    return 0 if all(error <= 1e-4 for error in errors.values()) else 1


@functools.cache
def _training(preset: Preset) -> tuple[Callable, Callable, dict[str, optax.GradientTransformation], dict]:
    """The loss with dropout, the one without, and every model's optimizer and specs: made once, compiled once."""
    model = preset.model

    def loss(params: Any, windows: jax.Array, key: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, windows[:, :-1], True, rngs={"dropout": key})
        return bits_per_token(logits, windows[:, 1:])

    @jax.jit
    def validation_loss(params: Any, windows: jax.Array) -> jax.Array:
        return bits_per_token(model.apply({"params": params}, windows[:, :-1]), windows[:, 1:])

    example = jnp.zeros((1, model.context), jnp.int32)
    specs = {
        label: shfl_jax.linen.resolve(shfl_jax.Plan({PRUNED: pattern}), model, example)
        for label, pattern in preset.patterns
    }
    base = preset.optimizer()
    schedule = training.cubic(*preset.window, preset.every)
    pruners = {label: training.prune(base, specs[label], schedule) for label in specs}
    return loss, validation_loss, {"dense": base, **pruners}, specs


def train_all(preset: Preset, data: text.Text, seed: int, progress: Progress) -> Iterator[Run]:
    """Trains the dense model and, from its state after `dense_steps`, every pattern: all see the same batches."""
    loss, validation_loss, optimizers, _ = _training(preset)
    context = preset.model.context
    validation = text.windows(data.validation, context)
    part = validation[:: max(1, len(validation) // 64)][:64]
    codes = jnp.asarray(data.train)
    init_key, key = jax.random.split(jax.random.key(seed))
    suffix = f" (seed {seed})" if preset.seeds > 1 else ""

    def go(state: loop.TrainState, label: str, steps: int, bar: Any, curve: list) -> loop.TrainState:
        block = functools.partial(loop.train, loss=loss, tx=optimizers[label], batch=preset.batch, context=context)
        every = max(1, preset.steps // 25 // preset.block) * preset.block
        for done in range(preset.block, steps + 1, preset.block):
            state, losses = block(state, codes, key, steps=preset.block)
            progress.update(bar, advance=preset.block, loss=f"{float(losses.mean()):.2f} bits")
            if done % every == 0 or done == steps:
                curve.append((int(state.step), loop.evaluate(validation_loss, state.params, part, 64)))
        return state

    bars = {"": progress.add_task(f"dense{suffix}", total=preset.dense_steps, loss="")}
    patterns: dict[str, Pattern | None] = {"dense": None, **dict(preset.patterns)}
    for label in patterns:
        name = "dense, trained on" if label == "dense" else f"{label}, pruning"
        bars[label] = progress.add_task(f"{name}{suffix}", total=preset.prune_steps, loss="", start=False)
    params = preset.model.init(init_key, jnp.zeros((1, context), jnp.int32))["params"]
    shared: list[tuple[int, float]] = []
    state = loop.train_state(params, optimizers["dense"])
    state = go(state, "dense", preset.dense_steps, bars[""], shared)
    for label, pattern in patterns.items():
        begin, curve = jax.tree.map(jnp.copy, state), list(shared)
        if pattern is not None:
            opt_state = optimizers[label].init(begin.params)
            begin = begin._replace(opt_state=opt_state._replace(inner_state=begin.opt_state))
        progress.start_task(bars[label])
        end = go(begin, label, preset.prune_steps, bars[label], curve)
        masks = None if pattern is None else training.masks(end.opt_state)
        final = end.params if masks is None else masks.apply(end.params)
        bits = loop.evaluate(validation_loss, final, validation, 64)
        yield Run(label, seed, pattern, final, masks, bits, tuple(curve))


def measure(runs: list[Run], preset: Preset, out: Path) -> dict[str, Measurement]:
    """Compresses the pruned models, saves and loads them, compares their logits, and times all of them in turn.

    Args:
        runs: of one seed; one of them is the dense model.
        preset: their preset.
        out: where checkpoints go, one folder a pattern.
    """
    model, tokens = preset.model, (TIMED_BATCH, preset.model.context)
    exact = model.clone(dtype=jnp.float32)
    dense = next(run for run in runs if run.pattern is None)
    inputs = jax.random.randint(jax.random.key(1), tokens, 0, model.vocab)
    dense_forward = jax.jit(lambda params, x: model.apply({"params": params}, x))
    forwards = {"dense": functools.partial(dense_forward, dense.params, inputs)}
    _, _, _, specs = _training(preset)
    kernels = shfl_jax.path_leaves(dense.params)
    dense_bytes = sum(kernels[path].nbytes for path in next(iter(specs.values())))
    stored = {"dense": (dense_bytes, 0.0, 0.0)}
    for run in runs:
        if run.pattern is None or run.masks is None or run.pattern.group_size == 1:
            continue
        sparse = shfl_jax.compress(run.params, run.masks, tokens=int(np.prod(tokens)))
        path = out / run.label.lower().replace(", ", "_").replace(" ", "_").replace("-", "_")
        shfl_jax.save(path, sparse)
        loaded = shfl_jax.load(path)
        layers = shfl_jax.report(loaded).layers
        ready = shfl_jax.prepare(loaded)
        with jax.default_matmul_precision("highest"):
            wanted = exact.apply({"params": run.params}, inputs)
            got = jax.jit(functools.partial(shfl_jax.linen.apply, exact))(ready, inputs)
        error = float(jnp.abs(got - wanted).max() / jnp.abs(wanted).max())
        pruned = 1 - sum((1 - layer.sparsity) * layer.dense_nbytes for layer in layers) / dense_bytes
        stored[run.label] = (sum(layer.nbytes for layer in layers), error, pruned)
        sparse_forward = jax.jit(functools.partial(shfl_jax.linen.apply, model))
        forwards[run.label] = functools.partial(sparse_forward, ready, inputs)
    times = _interleaved(forwards)
    return {
        label: Measurement(nbytes, times[label], error, pruned) for label, (nbytes, error, pruned) in stored.items()
    }


def _interleaved(functions: dict[str, Callable[[], jax.Array]]) -> dict[str, float]:
    """Median times in microseconds; the functions take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {label: [] for label in functions}
    for i in range(TIMED_RUNS + 2):
        for label, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if i >= 2:
                times[label].append(1e6 * (time.perf_counter() - start))
    return {label: statistics.median(values) for label, values in times.items()}


def table(runs: list[Run], measured: dict[str, Measurement]) -> Table:
    """The demo's result: one row a pattern, bits per character in the mean of the seeds."""
    seeds = sorted({run.seed for run in runs})
    dense_bits, dense = _mean_bits(runs, "dense"), measured["dense"]
    over = f", mean of {len(seeds)} seeds" if len(seeds) > 1 else ""
    result = Table(title=f"Dense and pruned, all trained for as many steps{over}")
    result.add_column("pattern")
    for name in ("sparsity", "counts", "bits per character", "vs dense", "bytes", "of dense", "forward ms", "speed-up"):
        result.add_column(name, justify="right")
    for run in (run for run in runs if run.seed == seeds[0]):
        bits, m = _mean_bits(runs, run.label), measured.get(run.label)
        sparsity = 0.0 if run.masks is None else _sparsity(run.masks)
        result.add_row(
            run.label
            if run.pattern is None or run.pattern.group_size == 1
            else f"{run.label}, V={run.pattern.group_size}",
            f"{sparsity:.1%}",
            _counts(run.pattern),
            f"{bits:.3f}",
            f"{bits / dense_bits - 1:+.1%}",
            *(
                (f"{m.nbytes:,}", f"{m.nbytes / dense.nbytes:.0%}", f"{m.time_us / 1e3:.2f}")
                if m is not None
                else ("no kernel", "", "")
            ),
            f"{dense.time_us / m.time_us:.2f}x" if m is not None else "",
        )
    return result


def results(
    runs: list[Run], measured: dict[str, Measurement], preset: Preset, name: str, baseline: float
) -> dict[str, Any]:
    """The results file: one record a run. Times and bytes were measured on the models of the first seed."""
    first, dense_us = min(run.seed for run in runs), measured["dense"].time_us
    model = preset.model
    records = []
    for run in runs:
        m = measured.get(run.label) if run.seed == first else None
        records.append(
            {
                "op": "model",
                "label": run.label,
                "pattern": "dense" if run.pattern is None else run.pattern.name,
                "implementation": "xla" if run.pattern is None or m is None else _implementation(),
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
                "layers": model.layers,
                "steps": preset.steps,
                "seed": run.seed,
            }
        )
    return {
        "device": _device(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "preset": name,
        "markov_bits_per_char": baseline,
        "records": records,
        "curves": {run.label: run.curve for run in runs if run.seed == first},
    }


def _draw(path: Path, runs: list[Run], preset: Preset, baseline: float) -> None:
    first = [run for run in runs if run.seed == runs[0].seed]
    curves = {run.label: run.curve for run in first}
    masks = next(run.masks for run in first if isinstance(run.pattern, ShflBW) and run.masks is not None)
    layer = next(path for path in masks if "/attn/query/" in path)
    begin, end = (preset.dense_steps + step for step in preset.window)
    figures.draw(path, curves, pruning=(begin, end), baseline=baseline, mask=masks[layer], layer=layer)


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


def _device() -> str:
    return jax.devices()[0].device_kind.lower().replace(" ", "-")


def _implementation() -> str:
    """What `implementation=None` means in this version: XLA everywhere."""
    return "xla"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
