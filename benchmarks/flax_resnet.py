"""ResNet-50 as Flax users have it, dense and compressed: `python -m benchmarks.flax_resnet`.

The model of `benchmarks.resnet` in evaluation mode, through `model.apply` and `shfl_jax.linen.apply`: normalisation and
ReLU stand between the convolutions as the model says, images are NHWC, and nobody tells it of another layout. Beside
the times of all kernels by CUPTI stands how often XLA moves images from one layout to another.
"""

import concurrent.futures
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import shfl_jax
from benchmarks import records as files
from benchmarks import resnet
from pallas_kernels import timing
from shfl_jax import LayerSpec, Mask, Masks, Plan, ShflBW

SPARSITY, GROUP_SIZE = 0.75, 64
STEM = 0.1
"""Sparsity of the stem where it is compressed too: XLA has no fast kernel for filters of three channels."""


def random_masks(specs: dict[str, LayerSpec]) -> Masks:
    """Masks of Shfl-BW with random rows and columns, as many in every group."""
    rng, found = np.random.default_rng(0), {}
    for path, spec in specs.items():
        (m, k), v = spec.matrix_shape, spec.pattern.group_size
        groups = -(-m // v)
        rows = np.full(groups * v, m, np.int32)
        rows[:m] = rng.permutation(m)
        order = rng.permuted(np.broadcast_to(np.arange(k), (groups, k)), axis=1)
        found[path] = Mask(jnp.asarray(rows), jnp.asarray(order < round(k * (1 - spec.pattern.sparsity))), m)
    return Masks(found, tuple(specs.values()))


def transpositions(text: str, pixels: int) -> int:
    """How many arrays of images a compiled program moves to another layout.

    Args:
        text: the optimised program.
        pixels: of all images in the network's last stage; arrays of a multiple of as many numbers are images.
    """
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* (?:transpose|copy)\(", text)
    return sum(math.prod(map(int, shape.split(","))) % pixels == 0 for shape in shapes)


def forms(model: resnet.ResNet, x: jax.Array, group_size: int) -> dict[str, tuple[Callable, Any, int]]:
    """Form of the network -> function of (variables, images), its variables, and the number of compressed layers."""
    variables = jax.tree.map(lambda a: a.astype(x.dtype), jax.jit(model.init)(jax.random.key(0), x[:1]))
    rules = {r"head/.*": None, r"stem/.*": STEM, ".*": SPARSITY}
    plan = Plan({rule: share and ShflBW(share, group_size=group_size) for rule, share in rules.items()})
    specs = shfl_jax.linen.resolve(plan, model, x[:1])
    masks = random_masks(specs)
    params = jax.jit(masks.apply)(variables["params"])
    found: dict[str, tuple[Callable, Any, int]] = {"dense": (model.apply, {**variables, "params": params}, 0)}
    others = {path: mask for path, mask in masks.items() if path != "stem/kernel"}
    without = Masks(others, tuple(specs[path] for path in others))
    for form, chosen in (("compressed but for the stem", without), ("compressed", masks)):
        sparse = shfl_jax.prepare(shfl_jax.compress(params, chosen))

        # Closed over, integers are constants: where filters point is then worked out when compiling.
        found[form] = (
            _with_topology(model, sparse["topology"]),
            {**variables, "params": sparse["params"]},
            len(chosen),
        )
    return found


def _with_topology(model: resnet.ResNet, topology: Any) -> Callable:
    return lambda variables, x: shfl_jax.linen.apply(model, {**variables, "topology": topology}, x)


def measure(
    batch: int, image: int = 224, group_size: int = GROUP_SIZE, model: resnet.ResNet | None = None
) -> list[dict[str, Any]]:
    """The records of the network's forms, forward, in bfloat16; the dense one's first."""
    model = resnet.ResNet() if model is None else model
    x = jax.random.normal(jax.random.key(1), (batch, image, image, 3), jnp.bfloat16)
    found = forms(model, x, group_size)
    pixels = batch * math.ceil(image / 2 ** (len(model.stages) + 1)) ** 2
    single = jax.tree.map(lambda a: a.astype(jnp.float32), found["dense"][1])
    wanted = jax.jit(model.apply)(single, x[:8].astype(jnp.float32))

    def compiled(form: str) -> Any:
        function, variables, _ = found[form]
        return jax.jit(function).lower(variables, x).compile()

    with concurrent.futures.ThreadPoolExecutor() as pool:  # all are compiled before the first is timed
        programs = dict(zip(found, pool.map(compiled, found), strict=True))
    records: list[dict[str, Any]] = []
    for form, (_, variables, layers) in found.items():
        program, arguments = programs[form], (variables, x)
        y = jax.block_until_ready(program(*arguments))
        call = functools.partial(program, *arguments)
        call_us, queued_us = timing.interleaved_us({"": call}, runs=10)[""], timing.queued_us(call, runs=10)
        on_gpu = jax.default_backend() == "gpu"
        time_us, kernels = timing.median_us(program, [arguments, arguments]) if on_gpu else (call_us, 0)
        records.append({
            "op": "model", "case": f"resnet50/flax/batch{batch}/{SPARSITY:g}/V{group_size}", "batch": batch,
            "form": form, "pattern": "shfl_bw" if layers else "dense", "dtype": "bfloat16",
            "sparsity": SPARSITY if layers else 0.0, "group_size": group_size if layers else None,
            "compressed_layers": layers, "transpositions": transpositions(program.as_text(), pixels),
            "time_us": time_us, "call_us": call_us, "queued_us": queued_us, "kernels": kernels,
            "dense_time_us": records[0]["time_us"] if records else time_us,
            "relative_error": float(jnp.linalg.norm(y[:8].astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)),
        })  # fmt: skip
    return [record | {"speedup": record["dense_time_us"] / record["time_us"]} for record in records]


def main(argv: list[str] | None = None) -> None:
    """Runs the program."""
    parser = files.command_line("flax_resnet", __doc__, smoke="a tiny network")
    parser.add_argument("--batch", type=int, default=64, help="images (default: %(default)s)")
    options = parser.parse_args(argv)
    path = files.output(parser, options, "flax_resnet")
    records = measure(2, 32, 16, resnet.ResNet((1, 1), 16, 5)) if options.smoke else measure(options.batch)
    files.write(path, records)
    for r in records:
        print(
            f"{r['form']}: {r['time_us']:.0f} us in {r['kernels']} kernels ({r['speedup']:.2f}), {r['call_us']:.0f} us "
            f"a call, {r['transpositions']} transpositions of images, error {r['relative_error']:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
