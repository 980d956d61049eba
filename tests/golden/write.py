"""Writes the golden files of the present checkpoint format: `python tests/golden/write.py DIRECTORY`.

Files are written once, when a format is new, into a directory of the format's version (of later versions only what is
new in them), and never again: what earlier
versions of the library wrote is what later ones must read. All numbers are small multiples of 1/8, so that every
product, sum and update of them is exact and has the same bits on every machine.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import shfl_jax
from shfl_jax import TVW, TW, VW, LayerSpec, Mask, Masks, ShflBW, ShflTVW, pruning

SAVED_AT, RESUMED_TO = 6, 12


def eighths(seed: int, shape: tuple[int, ...], dtype: Any = "float32") -> jax.Array:
    """Distinct magnitudes with random signs, multiples of 1/8, none of them zero."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    numbers = (rng.permutation(size) + 1) * rng.choice([-1, 1], size) / 8
    return jnp.asarray(numbers.reshape(shape), dtype)


def mask(seed: int, spec: LayerSpec) -> Mask:
    """A mask in the spec's own pattern, of exact scores."""
    return shfl_jax.mask(jnp.abs(spec.to_matrix(eighths(seed, spec.shape))), spec.pattern)


def models() -> dict[str, dict[str, Any]]:
    """Compressed models by name, one for each form that a checkpoint holds."""
    layers = {
        "row_grouped": [
            LayerSpec("mlp/kernel", (24, 40), (), (0,), (1,), ShflBW(0.75, group_size=8)),
            LayerSpec("out/kernel", (20, 24), (), (0,), (1,), TW(0.5, tile_size=8)),
        ],
        "two_four": [
            LayerSpec("packed/kernel", (24, 40), (), (0,), (1,), ShflTVW(0.75, group_size=8)),
            LayerSpec("tiles/kernel", (24, 32), (), (0,), (1,), TVW(0.75, tile_size=8)),
        ],
        "unchosen": [LayerSpec("packed/kernel", (24, 40), (), (0,), (1,), ShflTVW(0.75, group_size=8))],
        "stacked": [LayerSpec("layers/kernel", (3, 16, 24), (0,), (1,), (2,), VW(0.5, group_size=8))],
        "convolution": [LayerSpec("conv/kernel", (3, 3, 8, 16), (), (0, 1, 2), (3,), VW(0.75, group_size=8), True)],
    }
    compressed = {}
    for name, specs in layers.items():
        params: dict[str, Any] = {}
        for i, spec in enumerate(specs):
            dtype = "bfloat16" if name == "stacked" else "float32"
            params[spec.path.split("/")[0]] = {"kernel": eighths(i, spec.shape, dtype), "bias": eighths(i + 10, (8,))}
        masks = Masks({spec.path: mask(i + 20, spec) for i, spec in enumerate(specs)}, tuple(specs))
        if name == "unchosen":  # rows that keep one of a four, or none
            chosen = masks["packed/kernel"]
            assert chosen.choice is not None
            choice = chosen.choice & (eighths(40, chosen.choice.shape) > 0)
            masks = Masks({"packed/kernel": dataclasses.replace(chosen, choice=choice)}, masks.specs)
        compressed[name] = {**shfl_jax.compress(params, masks), "batch_stats": {"mean": eighths(30, (4,))}}
    return compressed


def training_run() -> tuple[Any, dict[str, jax.Array]]:
    """An optimizer with masks of two kinds, and the parameters it begins with."""
    specs = [
        LayerSpec("a", (24, 32), (), (0,), (1,), VW(0.75, group_size=8)),
        LayerSpec("b", (2, 24, 32), (0,), (1,), (2,), TVW(0.75, tile_size=8)),
    ]
    schedule = pruning.linear(begin=0, end=8, every=4)
    tx = pruning.prune(optax.sgd(0.5, momentum=0.5), specs, schedule)
    return tx, {"a": eighths(1, (24, 32)), "b": eighths(2, (2, 24, 32)), "bias": eighths(3, (32,))}


def steps(tx: Any, params: Any, state: Any, first: int, last: int) -> tuple[Any, Any]:
    """Updates with exact gradients of their own for every step."""
    update = jax.jit(tx.update)
    for step in range(first, last):
        gradients = {name: jnp.sign(eighths(100 + step, leaf.shape)) / 4 for name, leaf in params.items()}
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Arrays by path; bfloat16 as the uint16 that NumPy can store."""
    arrays = {path: np.asarray(leaf) for path, leaf in shfl_jax.path_leaves(tree).items()}
    return {path: a.view(np.uint16) if a.dtype == jnp.bfloat16 else a for path, a in arrays.items()}


def main() -> None:
    """Writes the checkpoints, the state and what is expected of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", help="checkpoints to write, and no optimizer state")
    options = parser.parse_args()
    directory = options.directory.absolute()
    for name, sparse in models().items():
        if name not in (options.only or models()):
            continue
        shfl_jax.save(directory / name, sparse)
        np.savez_compressed(directory / f"{name}.npz", **flat(shfl_jax.decompress(sparse)))
    if options.only:
        return
    tx, params = training_run()
    params, state = steps(tx, params, tx.init(params), 0, SAVED_AT)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "optax", {"params": params, "opt_state": state})
    resumed = steps(tx, params, state, SAVED_AT, RESUMED_TO)
    np.savez_compressed(directory / "optax.npz", **flat(dict(zip(("params", "opt_state"), resumed, strict=True))))


if __name__ == "__main__":
    main()
