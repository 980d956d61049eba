"""Train a small Transformer, prune it to 75%, compress it and run it faster.

The text is that of Python's own help topics. A dense model is trained; every pattern then goes on from it, gradually
pruned, while the dense model trains on for as many steps. The pruned models are compressed, saved, loaded and timed.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import shfl_jax
from shfl_jax import BW, VW, Pattern, ShflBW, Unstructured, pruning
from shfl_jax.pruning import bits_per_token
from training import compare, figures, loop, text
from training.gpt import GPT

PRUNED = r"(.*/)?(mlp|attn)/.*"
"""The layers that are pruned: all projections of attention and MLP."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """A size of the demo.

    Attributes:
        model: the model; its vocabulary is set later.
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
        return loop.adamw(self.learning_rate, self.dense_steps // 20 + 1, decay, self.steps, b2=0.98, weight_decay=0.05)


def _equal(sparsity: float, v: int) -> tuple[tuple[str, Pattern], ...]:
    return (
        ("Shfl-BW", ShflBW(sparsity, group_size=v, balanced=True)),
        ("VW", VW(sparsity, group_size=v, balanced=True)),
    )


PRESETS = {
    "cpu": Preset(GPT(0), 8, 1000, 400, 40, 10, 2e-3, _equal(0.75, 64)),
    "smoke": Preset(GPT(0, 32, 64, 1, 2, 64), 8, 60, 60, 12, 20, 3e-3, _equal(0.75, 16)),
    "gpu": Preset(
        GPT(0, 256, 512, 6, 8, 2048, 0.2, jnp.bfloat16),
        32,
        320,
        600,
        20,
        20,
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


def main(argv: list[str] | None = None) -> int:
    """Runs the demo.

    Args:
        argv: the arguments, `sys.argv[1:]` unless given.

    Returns:
        0, or 1 if a compressed model does not compute what the masked dense one does.
    """
    parser = argparse.ArgumentParser(
        prog="python -m training.demo", description=__doc__, epilog="Example: python -m training.demo --preset gpu"
    )
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
        f"A GPT of {preset.model.layers} layers, d_model {preset.model.d_model}, on {compare.device()}; "
        f"{len(data.train):,} characters to train on, {len(data.validation):,} to validate; {preset.steps} steps for "
        "every model."
    )
    seeds = range(options.seed, options.seed + preset.seeds)
    runs = []
    with _progress(console) as progress:
        for run in (run for seed in seeds for run in train_all(preset, data, seed, progress)):
            runs.append(run)
            if not console.is_terminal:  # a log has no bars
                seconds = time.monotonic() - start
                console.print(f"{seconds:.0f} s: {run.label}, seed {run.seed}: {run.bits:.3f} bits per character")
    measured = compare.measure([run for run in runs if run.seed == options.seed], preset.model, options.out)
    console.print(compare.table(runs, measured))
    console.print(
        f"An add-delta order-3 character model needs {baseline:.3f} bits. Speed-up: forward pass of "
        f"{compare.TIMED_BATCH} x {preset.model.context} characters under jit, timings interleaved, "
        f"median of {compare.TIMED_RUNS}. "
        "Every row group of a pattern keeps as many columns, unless it says ragged."
    )
    errors = {label: m.error for label, m in measured.items() if label != "dense"}
    for label, error in errors.items():
        console.print(f"{label}: logits of the compressed model differ from the masked dense ones by {error:.1e}")
    for label, m in measured.items():
        for path, why in list(m.dense.items())[:1]:
            console.print(f"{label}: {len(m.dense)} layers stay dense, where sparse would not pay; {path}: {why}")
    record = {"preset": options.preset, **compare.results(runs, measured, preset.model, preset.steps, baseline)}
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
        return bits_per_token(jnp.asarray(logits), windows[:, 1:]).mean()

    @jax.jit
    def validation_losses(params: Any, windows: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, windows[:, :-1])
        return bits_per_token(jnp.asarray(logits), windows[:, 1:])

    example = jnp.zeros((1, model.context), jnp.int32)
    specs = {
        label: shfl_jax.linen.resolve(shfl_jax.Plan({PRUNED: pattern}), model, example)
        for label, pattern in preset.patterns
    }
    base = preset.optimizer()
    schedule = pruning.cubic(*preset.window, preset.every)
    pruners = {label: pruning.prune(base, specs[label], schedule) for label in specs}
    return loss, validation_losses, {"dense": base, **pruners}, specs


def train_all(preset: Preset, data: text.Text, seed: int, progress: Progress) -> Iterator[compare.Run]:
    """Trains the dense model and, from its state after `dense_steps`, every pattern: all see the same batches."""
    loss, validation_losses, optimizers, _ = _training(preset)
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
                curve.append((int(state.step), loop.evaluate(validation_losses, state.params, part, 64)))
        return state

    bars = {"": progress.add_task(f"dense{suffix}", total=preset.dense_steps, loss="")}
    patterns: dict[str, Pattern | None] = {"dense": None, **dict(preset.patterns)}
    for label in patterns:
        name = "dense, trained on" if label == "dense" else f"{label}, pruning"
        bars[label] = progress.add_task(f"{name}{suffix}", total=preset.prune_steps, loss="", start=False)
    params = jax.jit(preset.model.init)(init_key, jnp.zeros((1, context), jnp.int32))["params"]
    shared: list[tuple[int, float]] = []
    state = loop.train_state(params, optimizers["dense"])
    state = go(state, "dense", preset.dense_steps, bars[""], shared)
    for label, pattern in patterns.items():
        begin, curve = jax.tree.map(jnp.copy, state), list(shared)
        if pattern is not None:
            fresh = optimizers[label].init(begin.params)
            assert isinstance(fresh, pruning.PruneState)
            begin = begin._replace(opt_state=fresh._replace(inner_state=begin.opt_state))
        progress.start_task(bars[label])
        end = go(begin, label, preset.prune_steps, bars[label], curve)
        masks = None if pattern is None else pruning.masks(end.opt_state)
        final = end.params if masks is None else masks.apply(end.params)
        bits = loop.evaluate(validation_losses, final, validation, 64)
        yield compare.Run(label, seed, pattern, final, masks, bits, tuple(curve))


def _draw(path: Path, runs: list[compare.Run], preset: Preset, baseline: float) -> None:
    first = [run for run in runs if run.seed == runs[0].seed]
    curves = {run.label: run.curve for run in first}
    masks = next(run.masks for run in first if run.pattern and run.pattern.searches_rows and run.masks is not None)
    layer = next(path for path in masks if "/attn/query/" in path)
    begin, end = (preset.dense_steps + step for step in preset.window)
    figures.draw(path, curves, pruning=(begin, end), baseline=baseline, mask=masks[layer], layer=layer)


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
