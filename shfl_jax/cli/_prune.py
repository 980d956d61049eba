"""`shfl-jax prune`: a trained checkpoint in, a compressed checkpoint out."""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx
from rich.console import Console

from shfl_jax.models import Plan
from shfl_jax.oneshot import SCORES, prune_one_shot
from shfl_jax.patterns import ALLOCATIONS, registered
from shfl_jax.sparse import compress, save

SIZES = ("group_size", "tile_size", "block_size")


def main(argv: list[str] | None = None) -> int:
    """Runs `shfl-jax prune`.

    Args:
        argv: the arguments, `sys.argv[1:]` unless given.

    Returns:
        0, or 1 if the model cannot be pruned, which is then explained.
    """
    parser = argparse.ArgumentParser(
        prog="shfl-jax prune",
        description="Prunes a trained model in one shot, repairs it on calibration data, and saves it compressed.",
        epilog="Example: shfl-jax prune --model training.bert:load --pattern shfl_bw --sparsity 0.75 --group-size 64 "
        "--out runs/bert",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns (model, params, batches): a Flax module, its parameters (None "
        "for an NNX model's own), and calibration batches, each a tuple of the model's arguments",
    )
    parser.add_argument("--checkpoint", type=Path, help="an Orbax checkpoint of such parameters, read in their place")
    parser.add_argument("--out", type=Path, required=True, help="directory for the compressed checkpoint")
    parser.add_argument("--pattern", choices=sorted(registered()), default="shfl_bw", help="default: shfl_bw")
    parser.add_argument("--sparsity", type=float, default=0.75, help="fraction of pruned weights (default 0.75)")
    parser.add_argument("--group-size", type=int, help="V, the tile size or the block size (default: the pattern's)")
    parser.add_argument("--layers", default=".*", metavar="REGEX", help="which kernels, by whole path (default all)")
    parser.add_argument("--score", choices=[name for name in SCORES if name != "taylor"], default="wanda")
    parser.add_argument("--allocation", choices=ALLOCATIONS, default="uniform", help="of sparsity over layers")
    parser.add_argument("--no-repair", action="store_true", help="leave the kept weights as they are")
    parser.add_argument("--damping", type=float, default=0.01, help="of the repair (default 0.01)")
    options = parser.parse_args(argv)
    try:
        plan = Plan({options.layers: _pattern(options.pattern, options.sparsity, options.group_size)})
        model, params, batches = _load(options.model)
        if params is None and isinstance(model, nnx.Module):
            params = nnx.state(model, nnx.Param)
        if options.checkpoint is not None:
            params = _restore(options.checkpoint, params)
        pruned = prune_one_shot(
            model,
            params,
            plan,
            batches,
            score=options.score,
            allocation=options.allocation,
            repair=not options.no_repair,
            damping=options.damping,
            progress=True,
        )
        save(options.out, compress(pruned.params, pruned.masks))
    except (ValueError, NotImplementedError, ImportError, OSError) as error:
        print(f"shfl-jax prune: {error}", file=sys.stderr)
        return 1
    console = Console()
    console.print(pruned)
    console.print(f"saved in {options.out}; `shfl-jax report {options.out} --tokens 1024` times it", highlight=False)
    return 0


def _pattern(name: str, sparsity: float, size: int | None) -> Any:
    cls = registered()[name]
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    arguments: dict[str, Any] = {"sparsity": sparsity} if "sparsity" in fields else {}
    if size is not None:
        field = next((field for field in SIZES if field in fields), None)
        if field is None:
            raise ValueError(f"--group-size: the pattern {name!r} has none")
        arguments[field] = size
    pattern = cls(**arguments)
    if pattern.sparsity != sparsity:
        raise ValueError(f"--sparsity {sparsity}: the pattern {name!r} always prunes {pattern.sparsity:.0%}")
    return pattern


def _load(name: str) -> tuple[Any, Any, Any]:
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"--model must be MODULE:FUNCTION, such as training.bert:load, got {name!r}")
    sys.path.insert(0, "")  # like `python -m`, so that a module in the current directory is found
    try:
        loader = getattr(importlib.import_module(module), function, None)
    finally:
        sys.path.remove("")
    if not callable(loader):
        raise ValueError(f"--model: {module} has no function {function!r}")
    loaded = loader()
    if not isinstance(loaded, tuple) or len(loaded) != 3:
        raise ValueError(f"--model: {name} must return (model, params, batches), got {type(loaded).__name__}")
    return loaded


def _restore(path: Path, params: Any) -> Any:
    """Reads parameters of the same structure, shapes and dtypes."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), jax.tree.map(ocp.utils.to_shape_dtype_struct, params))
