"""ResNet-50 as a Flax model, and its inference form: normalisation folded into the convolutions, dense or compressed.

The inference form is one function over units, a unit being a convolution's filters and bias. With dense filters images
lie as XLA likes them (NHWC); with row-grouped ones they lie channels first and the batch innermost from the stem to the
last mean, and no layer transposes them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

import pallas_kernels
from benchmarks.workers import holding_gpu, on_host
from pallas_kernels import _window as windows
from pallas_kernels import timing, tune

STAGES = (3, 4, 6, 3)
EPSILON = 1e-5


class Conv(NamedTuple):
    """One convolution of the network."""

    name: str
    features: int
    kernel: int
    stride: int = 1

    @property
    def padding(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """That keeps an image's size up to the stride."""
        return ((self.kernel // 2, self.kernel // 2),) * 2


STEM = Conv("stem", 64, 7, 2)


@dataclasses.dataclass(frozen=True)
class Block:
    """A bottleneck: three convolutions beside a shortcut, which has one of its own where the shape changes."""

    convs: tuple[Conv, Conv, Conv]
    shortcut: Conv | None


def blocks(stages: tuple[int, ...] = STAGES, width: int = 64) -> Iterator[Block]:
    """The blocks in order; strides are in the 3 x 3 convolutions."""
    for i, count in enumerate(stages):
        for j in range(count):
            name, stride, wide = f"stage_{i}_block_{j}", 2 if i and not j else 1, width * 2**i
            yield Block(
                (
                    Conv(f"{name}_conv_0", wide, 1),
                    Conv(f"{name}_conv_1", wide, 3, stride),
                    Conv(f"{name}_conv_2", 4 * wide, 1),
                ),
                None if j else Conv(f"{name}_shortcut", 4 * wide, 1, stride),
            )


def convolutions(
    image: int = 224, stages: tuple[int, ...] = STAGES, width: int = 64
) -> Iterator[tuple[Conv, int, int]]:
    """Every convolution in order, with the channels and the side of the images that it gets."""
    yield STEM._replace(features=width), 3, image
    channels, image = width, -(-image // 4)  # the stem's stride and the pooling's
    for block in blocks(stages, width):
        if block.shortcut is not None:
            yield block.shortcut, channels, image
        for conv in block.convs:
            yield conv, channels, image
            channels, image = conv.features, -(-image // conv.stride)


class ResNet(nn.Module):
    """The network for training and as it is loaded.

    Attributes:
        stages: blocks of each stage.
        width: features of the first block's first convolution.
        classes: number of classes.
    """

    stages: tuple[int, ...] = STAGES
    width: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images (B, H, W, 3) to logits (B, classes)."""

        def unit(conv: Conv, x: jax.Array, shortcut: jax.Array | None, relu: bool) -> jax.Array:
            size = (conv.kernel, conv.kernel)
            y = nn.Conv(conv.features, size, conv.stride, conv.padding, use_bias=False, name=conv.name)(x)
            norm = nn.BatchNorm(use_running_average=not train, epsilon=EPSILON, name=f"{conv.name}_norm")
            y = norm(y) if shortcut is None else norm(y) + shortcut
            return nn.relu(y) if relu else y

        x = _network(unit, x, self.stages, self.width)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def _network(unit: Callable, x: jax.Array, stages: tuple[int, ...], width: int) -> jax.Array:
    """The network up to its last mean; `unit(conv, x, shortcut, relu)` is what differs between its forms."""
    x = unit(STEM._replace(features=width), x, None, True)
    # In both layouts the two axes in the middle are the image's.
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for block in blocks(stages, width):
        shortcut = x if block.shortcut is None else unit(block.shortcut, x, None, False)
        for conv in block.convs[:2]:
            x = unit(conv, x, None, True)
        x = unit(block.convs[2], x, shortcut, True)
    return x


def fold(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Folds every normalisation into the convolution before it.

    Args:
        variables: 'params' and 'batch_stats' of a `ResNet`.

    Returns:
        {name of a convolution: {'kernel': (features, kh, kw, channels), 'bias': (features,)}, 'head': as it was}.
    """
    params, stats = variables["params"], variables["batch_stats"]
    folded: dict[str, Any] = {"head": params["head"]}
    for name in params:
        if f"{name}_norm" in params:
            norm, seen = params[f"{name}_norm"], stats[f"{name}_norm"]
            scale = norm["scale"] * lax.rsqrt(seen["var"] + EPSILON)
            bias = norm["bias"] - seen["mean"] * scale
            # Outputs first is how the fastest dense kernels of a GPU read filters: none is transposed in a call.
            folded[name] = {"kernel": (params[name]["kernel"] * scale).transpose(3, 0, 1, 2), "bias": bias}
    return folded


def space_to_depth(units: Mapping[str, Any]) -> dict[str, Any]:
    """The same network with a stem of 4 x 4 filters, stride 1, over images whose 2 x 2 blocks are pixels.

    Three channels fill no tensor core's operand; twelve do better. For images with even sides.
    """
    kernel = jnp.pad(units["stem"]["kernel"], ((0, 0), (1, 0), (1, 0), (0, 0)))
    return {**units, "stem": {"kernel": _blocks(kernel), "bias": units["stem"]["bias"]}}


def _blocks(x: jax.Array) -> jax.Array:
    """(B, H, W, C) as (B, H / 2, W / 2, 4 C)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)


def dense(units: Mapping[str, Any], x: jax.Array, stages: tuple[int, ...] = STAGES, width: int = 64) -> jax.Array:
    """Logits (B, classes) of images (B, H, W, 3), NHWC throughout, of what `fold` or `space_to_depth` returns."""

    def unit(conv: Conv, x: jax.Array, shortcut: jax.Array | None, relu: bool) -> jax.Array:
        kernel, bias = units[conv.name]["kernel"], units[conv.name]["bias"]
        stride, padding = conv.stride, conv.padding
        if conv.name == "stem" and kernel.shape[-1] == 4 * x.shape[-1]:
            x, stride, padding = _blocks(x), 1, ((2, 1), (2, 1))
        y = lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "OHWI", "NHWC"))
        y = y + bias if shortcut is None else y + bias + shortcut
        return jax.nn.relu(y) if relu else y

    x = _network(unit, x, stages, width)
    return _head(units["head"], x.mean((1, 2)))


def channels_first(
    units: Mapping[str, Any], x: jax.Array, stages: tuple[int, ...] = STAGES, width: int = 64
) -> jax.Array:
    """Logits (B, classes) of images (B, H, W, 3), channels first throughout.

    Args:
        units: as `fold` returns them, with row-grouped filters (a `pallas_kernels.Matrix`, of
            `kernel.reshape(features, -1)`) in place of some kernels.
        x: images.
        stages: as in `ResNet`.
        width: as in `ResNet`.
    """

    def unit(conv: Conv, x: jax.Array, shortcut: jax.Array | None, relu: bool) -> jax.Array:
        kernel, bias = units[conv.name]["kernel"], units[conv.name]["bias"]
        if isinstance(kernel, pallas_kernels.Matrix):
            return pallas_kernels.conv2d(
                kernel, x, kernel_size=(conv.kernel, conv.kernel), strides=conv.stride, padding=conv.padding,
                bias=bias, addend=shortcut, activation="relu" if relu else None,
            )  # fmt: skip
        if conv.kernel == 1:
            x = x[:, :: conv.stride, :: conv.stride]
            y = jnp.tensordot(kernel[:, 0, 0], x, 1)
        else:
            y = lax.conv_general_dilated(
                x, kernel, (conv.stride,) * 2, conv.padding, dimension_numbers=("CHWN", "OHWI", "CHWN")
            )
        y = y + bias[:, None, None, None]
        y = y if shortcut is None else y + shortcut
        return jax.nn.relu(y) if relu else y

    x = _network(unit, x.transpose(3, 1, 2, 0), stages, width)
    return _head(units["head"], x.mean((1, 2)).T)


def random_units(
    sparsity: float, group_size: int, dtype: str = "bfloat16",
    image: int = 224, stages: tuple[int, ...] = STAGES, width: int = 64, classes: int = 1000,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Random units of a network pruned but for its stem, with dense filters and all row-grouped.

    The stem keeps all of its columns: as row-grouped filters it runs channels first like the others.
    """
    masked: dict[str, Any] = {}
    compressed: dict[str, Any] = {}
    expand = jax.jit(pallas_kernels.to_dense)
    for i, (conv, channels, side) in enumerate(convolutions(image, stages, width)):
        m, size = conv.features, (conv.kernel, conv.kernel)
        window = windows.window((side, side), channels, size, conv.stride, conv.padding, 1)
        share = 0.0 if i == 0 else sparsity
        filters = tune.random_matrix(m, window.features, share, min(group_size, m), dtype=dtype, seed=i)
        kernel = expand(filters).reshape(m, *size, channels)
        bias = 0.1 * jax.random.normal(jax.random.key(i), (m,), dtype)
        masked[conv.name] = {"kernel": kernel, "bias": bias}
        compressed[conv.name] = {"kernel": pallas_kernels.prepare(filters, None, window), "bias": bias}
    features = 4 * width * 2 ** (len(stages) - 1)
    kernel = jax.random.normal(jax.random.key(0), (features, classes), dtype) * features**-0.5
    masked["head"] = compressed["head"] = {"kernel": kernel, "bias": jnp.zeros(classes, dtype)}
    return masked, compressed


def model_key(batch: int, sparsity: float = 0.75, group_size: int = 64) -> str:
    """The whole network as one word, by which a results file is resumed."""
    return f"resnet50/batch{batch}/{sparsity:g}/V{group_size}"


def measure(
    batch: int, sparsity: float = 0.75, group_size: int = 64, *, time_us: Callable, image: int = 224, **size
) -> list[dict]:
    """The records of the whole network, forward, dense and compressed.

    Args:
        batch: images.
        sparsity: of every convolution but the stem.
        group_size: V, or as many rows as a layer has.
        time_us: the time and the number of kernels of a compiled function, and of sets of its arguments.
        image: side of the images.
        **size: stages, width and classes.
    """
    with on_host():
        masked, compressed = random_units(sparsity, group_size, image=image, **size)
        x = jax.random.normal(jax.random.key(1), (batch, image, image, 3), "bfloat16")
        forms = (
            ("dense", "NHWC", "dense", masked),
            ("dense, stem by space to depth", "NHWC", "dense", space_to_depth(masked)),
            ("row groups", "CHWN", "channels_first", compressed),
        )
    run = {name: functools.partial(f, **{k: v for k, v in size.items() if k != "classes"})
           for name, f in (("dense", dense), ("channels_first", channels_first))}  # fmt: skip
    gpu = jax.devices()[0]
    with holding_gpu():
        x = jax.device_put(x, gpu)
        single = jax.tree.map(lambda a: a.astype(jnp.float32), jax.device_put(masked, gpu))
        wanted = run["dense"](single, x[:8].astype(jnp.float32))
    base: dict[str, Any] = {"op": "model", "case": model_key(batch, sparsity, group_size), "batch": batch}
    records: list[dict[str, Any]] = []
    for form, layout, name, units in forms:
        with holding_gpu():  # to compile too: XLA tries its convolutions and products
            units = jax.device_put(units, gpu)
            function = jax.jit(run[name]).lower(units, x).compile()
            y = jax.block_until_ready(function(units, x))
            call = functools.partial(function, units, x)
            call_us, queued_us = timing.interleaved_us({"": call}, runs=10)[""], timing.queued_us(call, runs=10)
            found, kernels = time_us(function, [(units, x), (units, x)])
            error = jnp.linalg.norm(y[:8].astype(jnp.float32) - wanted) / jnp.linalg.norm(wanted)
        sparse = [unit for unit in units.values() if isinstance(unit["kernel"], pallas_kernels.Matrix)]
        records.append(base | {
            "form": form, "layout": layout, "pattern": "shfl_bw" if sparse else "dense",
            "sparsity": sparsity if sparse else 0.0, "group_size": group_size if sparse else 0,
            "compressed_layers": len(sparse),
            "time_us": found, "call_us": call_us, "queued_us": queued_us, "kernels": kernels,
            "relative_error": float(error),
        })  # fmt: skip
    fastest = min(record["time_us"] for record in records if record["pattern"] == "dense")
    return [record | {"dense_time_us": fastest, "speedup": fastest / record["time_us"]} for record in records]


def _head(head: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    return x @ head["kernel"] + head["bias"]
