"""What a task of the accuracy record is: a model, its data, its recipe and its measure."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from shfl_jax import pruning
from training.loop import adamw

Arrays = Mapping[str, Any]
"""Name -> array; all with the same leading axis, the examples."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How every model of a task is trained, dense or pruned to any pattern.

    Attributes:
        batch: examples a step.
        dense_steps: steps of the dense model before pruning.
        prune_steps: further steps of every model, the dense one included.
        every: steps between mask updates; it divides both.
        learning_rate: peak of AdamW's.
        weight_decay: of AdamW.
        b2: of AdamW.
        dropout: rate on every residual branch, for models that have it.
    """

    batch: int
    dense_steps: int
    prune_steps: int
    every: int
    learning_rate: float
    weight_decay: float = 0.05
    b2: float = 0.98
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.dense_steps % self.every or self.prune_steps % self.every or self.prune_steps < self.every:
            raise ValueError(
                f"every={self.every} must divide dense_steps={self.dense_steps} and prune_steps={self.prune_steps}, "
                "which must not be zero"
            )

    @property
    def steps(self) -> int:
        """Steps of every model in total."""
        return self.dense_steps + self.prune_steps

    @property
    def fractions(self) -> tuple[float, ...]:
        """Of the target sparsity: what is due at every `every`-th step of pruning, cubic over the first 60% of it."""
        updates = max(1, round(0.6 * self.prune_steps / self.every))
        return tuple(pruning.cubic_fraction(i / updates) for i in range(1, updates + 1))

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW: warm-up, a constant rate, and from the middle of the pruning window a linear decay to zero."""
        decay = self.dense_steps + round(0.3 * self.prune_steps)
        return adamw(
            self.learning_rate,
            self.dense_steps // 20 + 1,
            decay,
            self.steps,
            b2=self.b2,
            weight_decay=self.weight_decay,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One task.

    Attributes:
        name: how tables call it.
        measure: the key of `evaluate`'s result that claims are judged by.
        higher: whether more of it is better.
        model: the module, as it is compressed.
        example: what `model.apply` gets after the variables.
        pruned: regular expression of the layers that are pruned.
        recipe: how all models are trained.
        train: the training data.
        test: the test data; `test_batch` divides its size.
        test_batch: examples in one call of `evaluate`.
        draw: (training data, key, batch) -> a batch.
        loss: (params, batch, key) -> float32 scalar.
        evaluate: (apply, a batch of the test data) -> name -> arrays. `apply` stands for `model.apply` without its
            first argument: that of a dense, masked or compressed model. Scalars are averaged over the batches.
        finish: those means, and the arrays of the other names joined over the batches, to name -> number.
        compressed: whether the compressed model is evaluated too.
    """

    name: str
    measure: str
    higher: bool
    model: nn.Module
    example: tuple[Any, ...]
    pruned: str
    recipe: Recipe
    train: Arrays
    test: Arrays
    test_batch: int
    draw: Callable[[Arrays, jax.Array, int], Arrays]
    loss: Callable[[Any, Arrays, jax.Array], jax.Array]
    evaluate: Callable[[Callable[..., Any], Arrays], Mapping[str, jax.Array]]
    finish: Callable[[Mapping[str, np.ndarray]], dict[str, float]] = lambda found: {
        name: float(value) for name, value in found.items()
    }
    compressed: bool = False


def draw_examples(data: Arrays, key: jax.Array, batch: int) -> dict[str, jax.Array]:
    """Random examples, with replacement: arrays (n, ...) to (batch, ...)."""
    size = next(iter(data.values())).shape[0]
    chosen = jax.random.randint(key, (batch,), 0, size)
    return {name: jnp.asarray(array)[chosen] for name, array in data.items()}


def classification(apply: Callable[..., Any], batch: Arrays) -> dict[str, jax.Array]:
    """Accuracy and cross entropy (nats) of a classifier on {'image', 'label'}: float32 scalars."""
    logits = apply(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return {"accuracy": (logits.argmax(-1) == batch["label"]).mean(dtype=jnp.float32), "loss": loss}


def classification_loss(model: nn.Module, params: Any, batch: Arrays, key: jax.Array) -> jax.Array:
    """The cross entropy of `classification`, as `Task.loss` once the model is bound."""
    del key
    return classification(lambda image: jnp.asarray(model.apply({"params": params}, image)), batch)["loss"]


def unfolded_convolution(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **arguments: Any,
) -> jax.Array:
    """A 2-D convolution as one matrix product, for models that are stacked by `jax.vmap`.

    There a convolution becomes a grouped one, which is slow everywhere, but a matrix product becomes a batched one.
    It is what `nn.Conv(conv_general_dilated=...)` takes.

    Args:
        x: (B, H, W, C) floating.
        kernel: (h, w, C, F).
        strides: two.
        padding: as `jax.lax.conv_general_dilated`.
        **arguments: the others of it, none of which may change the result.

    Returns:
        (B, H', W', F).

    Raises:
        ValueError: dilations or feature groups, which it does not know.
    """
    if arguments.get("feature_group_count", 1) != 1 or any(
        step != 1 for name in ("lhs_dilation", "rhs_dilation") for step in arguments.get(name) or ()
    ):
        raise ValueError(
            f"a kernel of shape {kernel.shape} with dilations or feature groups cannot be unfolded; train this model "
            "with the convolution of `nn.Conv`"
        )
    height, width = kernel.shape[:2]
    sides = (
        jax.lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding)
        if isinstance(padding, str)
        else padding
    )
    (top, bottom), (left, right) = sides
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    rows, columns = ((x.shape[i + 1] - kernel.shape[i]) // strides[i] + 1 for i in range(2))
    parts = [
        x[:, i : i + (rows - 1) * strides[0] + 1 : strides[0], j : j + (columns - 1) * strides[1] + 1 : strides[1]]
        for i in range(height)
        for j in range(width)
    ]
    unfolded = jnp.concatenate(parts, axis=-1)
    return jnp.dot(unfolded, kernel.reshape(-1, kernel.shape[-1]), precision=arguments.get("precision"))
