"""Textured shapes on clutter, drawn from a seed, and a small residual network: the stand-in for a ResNet."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from training.tasks.task import Recipe, Task, classification, classification_loss, draw_examples, unfolded_convolution

SIDE = 32
"""Pixels of an image's side."""
OUTLINES, TEXTURES = 5, 4
"""A class is an outline and a texture: 20 classes."""
NOISE = 0.25
"""Standard deviation of the noise on pixels of about -1 to 1."""
RECIPE = Recipe(64, 2000, 2400, 80, 1e-3)
"""How all models are trained; see docs/accuracy.md for how it was chosen."""


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    width: int
    stride: int
    convolution: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, H, W, C) to (B, H / stride, W / stride, width)."""

        def conv(name: str, size: int, stride: int) -> nn.Conv:
            return nn.Conv(
                self.width,
                (size, size),
                stride,
                use_bias=False,
                conv_general_dilated=self.convolution,
                name=name,
            )

        y = nn.relu(nn.GroupNorm(8, name="norm_0")(conv("conv_0", 3, self.stride)(x)))
        y = nn.GroupNorm(8, name="norm_1")(conv("conv_1", 3, 1)(y))
        if x.shape != y.shape:
            x = conv("shortcut", 1, self.stride)(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network whose normalisation keeps no statistics.

    Attributes:
        stem: features of the first convolution.
        widths: features of every block; all but the first halve the sides.
        classes: number of classes.
        convolution: in place of the convolution of JAX, or None.
    """

    stem: int = 64
    widths: tuple[int, ...] = (128, 256, 512)
    classes: int = OUTLINES * TEXTURES
    convolution: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (B, 32, 32, 3) float32 to logits (B, classes)."""
        x = nn.relu(nn.Conv(self.stem, (3, 3), 2, conv_general_dilated=self.convolution, name="stem")(x))
        for i, width in enumerate(self.widths):
            x = Block(width, 1 if i == 0 else 2, self.convolution, name=f"block_{i}")(x)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def data(count: int, seed: int) -> dict[str, np.ndarray]:
    """Draws images, as a function of their number and the seed.

    One shape of random place, size, turn and colours stands on a grating under noise, among three small shapes with
    outlines and textures of their own. What to tell is the large one's outline (disc, square, triangle, cross, ring)
    and texture (stripes, fine stripes, checks, circles).

    Returns:
        {'image': (count, 32, 32, 3) float32, about -1 to 1, 'label': (count,) int32 below 20}.
    """
    rng = np.random.default_rng([seed, count])
    label = rng.integers(0, OUTLINES * TEXTURES, count)
    image = np.zeros((count, SIDE, SIDE, 3), np.float32)
    angle, waves = rng.uniform(0, np.pi, count), rng.uniform(1, 5, count)
    grid = np.linspace(-1, 1, SIDE, dtype=np.float32)
    x, y = (np.broadcast_to(axis, (count, SIDE, SIDE)) for axis in np.meshgrid(grid, grid, indexing="ij"))
    wave = np.sin(_each(waves) * np.pi * (x * _each(np.cos(angle)) + y * _each(np.sin(angle))))
    image += 0.4 * wave[..., None] * rng.uniform(-1, 1, (count, 1, 1, 3))
    for small in (True, True, True, False):
        kinds = rng.integers(0, OUTLINES * TEXTURES, count) if small else label
        size = rng.uniform(0.12, 0.25, count) if small else rng.uniform(0.4, 0.6, count)
        reach = 0.9 if small else 0.35
        place, turn = rng.uniform(-reach, reach, (2, count)), rng.uniform(0, 2 * np.pi, count)
        u, v = x - _each(place[0]), y - _each(place[1])
        cos, sin = _each(np.cos(turn)), _each(np.sin(turn))
        u, v = (u * cos + v * sin) / _each(size), (v * cos - u * sin) / _each(size)
        inside, light = _draw(u, v, _each(kinds // TEXTURES), _each(kinds % TEXTURES))
        dark, bright = rng.uniform(-1, 0.1, (count, 1, 1, 3)), rng.uniform(-0.1, 1, (count, 1, 1, 3))
        image = np.where(inside[..., None], np.where(light[..., None], bright, dark), image)
    image += NOISE * rng.standard_normal(image.shape)
    return {"image": image.astype(np.float32), "label": label.astype(np.int32)}


def _each(values: np.ndarray) -> np.ndarray:
    """One value an image, to be combined with pixels (n, 32, 32)."""
    return values[:, None, None].astype(np.float32) if values.dtype.kind == "f" else values[:, None, None]


def _draw(u: np.ndarray, v: np.ndarray, outline: np.ndarray, texture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels lie inside the outline, and which of them are bright, in coordinates relative to the shape."""
    r = np.hypot(u, v)
    largest, least = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    triangle = (v > -0.6) & (1.7 * abs(u) + v < 1.1)
    cross = (least < 0.35) & (largest < 1)
    outlines = [r < 1, largest < 0.85, triangle, cross, (r > 0.45) & (r < 1)]
    stripes, fine = np.sin(6 * u) > 0, np.sin(12 * u) > 0
    textures = [stripes, fine, (np.sin(6 * u) > 0) ^ (np.sin(6 * v) > 0), np.sin(9 * r) > 0]
    return np.choose(outline, outlines), np.choose(texture, textures)


def task(smoke: bool = False) -> Task:
    """The task; `smoke` makes a tiny one of it, to try the program."""
    model = ResNet(8, (16,)) if smoke else ResNet()
    trained = model.clone(convolution=unfolded_convolution)

    def draw(data: Any, key: jax.Array, batch: int) -> dict[str, jax.Array]:
        chosen, flips, noise = jax.random.split(key, 3)
        examples = draw_examples(data, chosen, batch)
        flip = jax.random.bernoulli(flips, shape=(3, batch, 1, 1, 1))
        image = examples["image"]
        for axis in (1, 2):
            image = jnp.where(flip[axis - 1], jnp.flip(image, axis), image)
        image = jnp.where(flip[2], image.swapaxes(1, 2), image)
        return {**examples, "image": image + 0.1 * jax.random.normal(noise, image.shape)}

    return Task(
        name="shapes",
        measure="accuracy",
        higher=True,
        model=model,
        example=(jnp.zeros((1, SIDE, SIDE, 3)),),
        pruned=r"block_\d/conv_\d/.*",
        recipe=Recipe(8, 4, 4, 2, 1e-3) if smoke else RECIPE,
        train=data(64 if smoke else 16_000, seed=0),
        test=data(50 if smoke else 4_000, seed=1),
        test_batch=50 if smoke else 250,
        draw=draw,
        loss=functools.partial(classification_loss, trained),
        evaluate=classification,
        compressed=True,
    )
