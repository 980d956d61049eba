"""Schedules: when masks are updated, and how far towards the target sparsity."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp


class Schedule(Protocol):
    """How a pruning run proceeds. Steps count the updates of the optimizer from 0; all methods are jit-able.

    A schedule is a frozen, hashable object, so that the transformation that holds it can be a static argument.
    """

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """The fraction of every pattern's own sparsity that is due at a step: float32 scalar in [0, 1]."""
        ...

    def is_update(self, step: jax.Array | int) -> jax.Array:
        """Whether the masks are computed anew at a step: bool scalar."""
        ...


@dataclasses.dataclass(frozen=True)
class OneShot:
    """The whole target at one step. Build it with `one_shot`.

    Attributes:
        step: the step that prunes, 0 or later.
    """

    step: int = 0

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"a pruning step must be 0 or later, got step={self.step}")

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        return (jnp.asarray(step) >= self.step).astype(jnp.float32)

    def is_update(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        return jnp.asarray(step) == self.step


@dataclasses.dataclass(frozen=True)
class Cubic:
    """Gradual pruning, fast at first and slow near the target. Build it with `cubic`.

    Attributes:
        begin: the first step that updates the masks; nothing is pruned at it yet.
        end: the last one; the target is reached at it.
        every: steps between updates. Where it does not divide `end - begin`, the last interval is shorter.
    """

    begin: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ValueError(f"a schedule needs 0 <= begin < end, got begin={self.begin}, end={self.end}")
        if self.every < 1:
            raise ValueError(f"masks are updated every 1 or more steps, got every={self.every}")

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        passed = jnp.clip(jnp.asarray(step) - self.begin, 0, self.end - self.begin)
        left = 1 - passed.astype(jnp.float32) / (self.end - self.begin)
        return 1 - left**3

    def is_update(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        passed = jnp.asarray(step) - self.begin
        due = (passed % self.every == 0) | (passed == self.end - self.begin)
        return due & (passed >= 0) & (passed <= self.end - self.begin)


def one_shot(step: int = 0) -> OneShot:
    """Prunes to the target at one step.

    Raises:
        ValueError: a negative step.
    """
    return OneShot(step)


def cubic(begin: int, end: int, every: int = 1) -> Cubic:
    """Prunes gradually: at a step t of the way from `begin` to `end`, the sparsity is 1 - (1 - t)^3 of the target.

    The schedule of Zhu and Gupta, "To prune, or not to prune" (2017, arXiv 1710.01878), from an initial sparsity of 0.

    Args:
        begin: the first step that updates the masks.
        end: the last one, at which the target is reached.
        every: steps between updates.

    Raises:
        ValueError: not 0 <= begin < end, or every < 1.
    """
    return Cubic(begin, end, every)
