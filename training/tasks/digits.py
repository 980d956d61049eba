"""Handwritten digits of scikit-learn under noise, and a small convolutional network."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from training.tasks.task import Recipe, Task, classification, classification_loss, draw_examples, unfolded_convolution

NOISE = 0.25
"""Standard deviation of the noise on pixels in [0, 1], and of that which training adds to its images."""
TEST = 600
"""Images kept for the test."""
DRAWS = 20
"""How often every test image is there, each with other noise and another shift: a finer measure of accuracy."""
RECIPE = Recipe(64, 4000, 6000, 100, 2e-3)
"""How all models are trained; see docs/accuracy.md for how it was chosen."""


class CNN(nn.Module):
    """Three convolutions and two dense layers.

    Attributes:
        widths: features of the three convolutions and of the dense layer.
        classes: number of classes.
        convolution: in place of the convolution of JAX, or None.
    """

    widths: tuple[int, int, int, int] = (32, 128, 256, 256)
    classes: int = 10
    convolution: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (B, 8, 8, 1) float32 to logits (B, classes)."""
        stem, *convolutions, dense = self.widths
        x = nn.relu(nn.Conv(stem, (3, 3), conv_general_dilated=self.convolution, name="stem")(x))
        for i, width in enumerate(convolutions):
            conv = nn.Conv(width, (3, 3), strides=2, conv_general_dilated=self.convolution, name=f"conv_{i}")
            x = nn.relu(conv(x))
        x = nn.relu(nn.Dense(dense, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes, name="head")(x)


def data(seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Training images without noise, and test images with it, as a function of the seed.

    Returns:
        Two times {'image': (n, 8, 8, 1) float32, about 0 to 1, 'label': (n,) int32}. The test holds `DRAWS` versions of
        each of `TEST` images, none of which is in the training data.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; the text says how to install it.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install 'shfl-jax[accuracy]'", name=error.name) from error
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = (pixels / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    held, rest = order[:TEST], order[TEST:]
    repeated = np.repeat(images[held], DRAWS, axis=0)
    shifts = rng.integers(-1, 2, (len(repeated), 2))
    moved = np.stack([np.roll(image, tuple(shift), (0, 1)) for image, shift in zip(repeated, shifts, strict=True)])
    noisy = (moved + NOISE * rng.standard_normal(moved.shape)).astype(np.float32)
    train = {"image": images[rest], "label": labels[rest].astype(np.int32)}
    return train, {"image": noisy, "label": np.repeat(labels[held], DRAWS).astype(np.int32)}


def task(smoke: bool = False) -> Task:
    """The task; `smoke` makes a tiny one of it, to try the program.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    train, test = data()
    model = CNN((8, 16, 16, 16)) if smoke else CNN()
    trained = model.clone(convolution=unfolded_convolution)

    def draw(data: Any, key: jax.Array, batch: int) -> dict[str, jax.Array]:
        chosen, shift, noise = jax.random.split(key, 3)
        examples = draw_examples(data, chosen, batch)
        shifts = jax.random.randint(shift, (batch, 2), -1, 2)
        image = jax.vmap(lambda one, by: jnp.roll(one, (by[0], by[1]), (0, 1)))(examples["image"], shifts)
        return {**examples, "image": image + NOISE * jax.random.normal(noise, image.shape)}

    return Task(
        name="digits",
        measure="accuracy",
        higher=True,
        model=model,
        example=(jnp.zeros((1, 8, 8, 1)),),
        pruned=r"(conv_\d|dense)/.*",
        recipe=Recipe(16, 8, 8, 4, 1e-3) if smoke else RECIPE,
        train=train,
        test={name: array[:200] for name, array in test.items()} if smoke else test,
        test_batch=200 if smoke else 1000,
        draw=draw,
        loss=functools.partial(classification_loss, trained),
        evaluate=classification,
        compressed=True,
    )
