"""Schedules: when masks are updated, and how far towards the target sparsity."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp


class Schedule(Protocol):
    """How a pruning run proceeds. Steps count the updates of the optimizer from 0; all methods are jit-able.

    A schedule is a frozen, hashable object, so that the transformation that holds it can be a static argument. One that
    says when row permutations are searched anew is also a `RowSchedule`, one with turns of layers a `LayerSchedule`.
    """

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """The fraction of every pattern's own sparsity that is due at a step: float32 scalar in [0, 1]."""

    def is_update(self, step: jax.Array | int) -> jax.Array:
        """Whether the masks are computed anew at a step: bool scalar."""


@runtime_checkable
class RowSchedule(Protocol):
    """A schedule that has row permutations searched anew, not only when a layer is first pruned."""

    def is_search(self, step: jax.Array | int) -> jax.Array:
        """Whether an update of the masks at this step searches the rows anew, from those in force: bool scalar."""


class Turn(NamedTuple):
    """How far one layer is.

    Attributes:
        fraction: of its pattern's own sparsity, float32 scalar in [0, 1].
        due: whether its mask is computed anew, bool scalar; otherwise it stays as it is.
    """

    fraction: jax.Array
    due: jax.Array


@runtime_checkable
class LayerSchedule(Protocol):
    """A schedule that treats layers differently."""

    def turns(self, step: jax.Array | int, paths: Sequence[str]) -> Mapping[str, Turn]:
        """How far every layer is at a step that updates the masks.

        Args:
            step: the step.
            paths: of all layers that are pruned.

        Returns:
            path -> `Turn`.
        """


@dataclasses.dataclass(frozen=True)
class Once:
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
class _Window:
    """Updates of the masks from one step to another.

    Attributes:
        begin: the first step that updates the masks.
        end: the last one.
        every: steps between updates. Where it does not divide `end - begin`, the last interval is shorter.
        search_every: steps between new searches of the row permutations, a multiple of `every`; None for none but the
            first.
    """

    begin: int
    end: int
    every: int = 1
    search_every: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end:
            raise ValueError(f"a schedule needs 0 <= begin < end, got begin={self.begin}, end={self.end}")
        if self.every < 1:
            raise ValueError(f"masks are updated every 1 or more steps, got every={self.every}")
        if self.search_every is not None and (self.search_every < 1 or self.search_every % self.every):
            raise ValueError(
                f"rows are searched at updates of the masks: search_every={self.search_every} must be a multiple of "
                f"every={self.every}"
            )

    def is_update(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        passed = jnp.asarray(step) - self.begin
        due = (passed % self.every == 0) | (passed == self.end - self.begin)
        return due & (passed >= 0) & (passed <= self.end - self.begin)

    def is_search(self, step: jax.Array | int) -> jax.Array:
        """See `RowSchedule`."""
        if self.search_every is None:
            return jnp.zeros((), bool)
        return self.is_update(step) & ((jnp.asarray(step) - self.begin) % self.search_every == 0)

    def _passed(self, step: jax.Array | int) -> jax.Array:
        """How much of the way from `begin` to `end` is done: float32 in [0, 1]."""
        passed = jnp.clip(jnp.asarray(step) - self.begin, 0, self.end - self.begin)
        return passed.astype(jnp.float32) / (self.end - self.begin)


@dataclasses.dataclass(frozen=True)
class Cubic(_Window):
    """Gradual pruning, fast at first and slow near the target. Build it with `cubic`."""

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        return cubic_fraction(self._passed(step))


@dataclasses.dataclass(frozen=True)
class Linear(_Window):
    """Gradual pruning at an even pace. Build it with `linear`."""

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        return self._passed(step)


@dataclasses.dataclass(frozen=True)
class Constant(_Window):
    """The whole target from `begin` on, the masks computed anew until `end`. Build it with `constant`."""

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        return (jnp.asarray(step) >= self.begin).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Stages:
    """Pruning in a few larger steps with training between them. Build it with `stages`.

    Attributes:
        steps: the step at which each stage prunes, ascending.
        fractions: of the target that each stage reaches, in [0, 1].
        search: whether every stage searches the row permutations anew.
    """

    steps: tuple[int, ...]
    fractions: tuple[float, ...]
    search: bool = False

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        fractions = jnp.asarray((0.0, *self.fractions), jnp.float32)
        return fractions[jnp.sum(jnp.asarray(step) >= jnp.asarray(self.steps, jnp.int32))]

    def is_update(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        return jnp.any(jnp.asarray(step) == jnp.asarray(self.steps, jnp.int32))

    def is_search(self, step: jax.Array | int) -> jax.Array:
        """See `RowSchedule`."""
        return self.is_update(step) & self.search


@dataclasses.dataclass(frozen=True)
class GrowAndPrune:
    """Cyclic grow-and-prune: partitions of the layers take turns being dense. Build it with `grow_and_prune`.

    Attributes:
        partitions: a regular expression of paths for each.
        begin: the step at which all layers but those of the first partition are pruned.
        turn: steps of a turn.
        rounds: turns of every partition.
    """

    partitions: tuple[str, ...]
    begin: int
    turn: int
    rounds: int

    def __post_init__(self) -> None:
        if not self.partitions:
            raise ValueError("grow-and-prune needs at least one partition, such as '.*'")
        for regex in self.partitions:
            try:
                re.compile(regex)
            except re.error as error:
                raise ValueError(f"partition {regex!r} is no regular expression: {error}") from error
        if self.begin < 0 or self.turn < 1 or self.rounds < 1:
            raise ValueError(
                f"grow-and-prune needs begin >= 0, turn >= 1 and rounds >= 1, got begin={self.begin}, "
                f"turn={self.turn}, rounds={self.rounds}"
            )

    @property
    def end(self) -> int:
        """The last step that updates masks; every layer is pruned from then on."""
        return self.begin + self.turn * self.rounds * len(self.partitions)

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`: the fraction for layers that are not having their dense turn."""
        return (jnp.asarray(step) >= self.begin).astype(jnp.float32)

    def is_update(self, step: jax.Array | int) -> jax.Array:
        """See `Schedule`."""
        step = jnp.asarray(step)
        return (step >= self.begin) & (step <= self.end) & ((step - self.begin) % self.turn == 0)

    def turns(self, step: jax.Array | int, paths: Sequence[str]) -> dict[str, Turn]:
        """See `LayerSchedule`. A layer belongs to the first partition that matches its whole path, or to none.

        Raises:
            ValueError: a partition without a layer.
        """
        owner = {
            path: next((i for i, regex in enumerate(self.partitions) if re.fullmatch(regex, path)), None)
            for path in paths
        }
        for i, regex in enumerate(self.partitions):
            if i not in owner.values():
                raise ValueError(
                    f"partition {regex!r} owns no pruned layer; it must match whole paths that no earlier partition "
                    f"does, and the layers are {list(paths)}"
                )
        number = (jnp.asarray(step) - self.begin) // self.turn
        dense, before = number % len(self.partitions), (number - 1) % len(self.partitions)
        growing = number < self.rounds * len(self.partitions)
        first = number == 0
        found = {}
        for path, i in owner.items():
            mine = jnp.zeros((), bool) if i is None else growing & (dense == i)
            ends = jnp.zeros((), bool) if i is None else before == i
            found[path] = Turn((~mine).astype(jnp.float32), mine | ends | first)
        return found


def one_shot(step: int = 0) -> Once:
    """Prunes to the target at one step.

    Raises:
        ValueError: a negative step.
    """
    return Once(step)


def cubic_fraction(passed: Any) -> Any:
    """1 - (1 - passed)^3: the fraction of a sparsity that is due when this fraction of the time has passed."""
    return 1 - (1 - passed) ** 3


def cubic(begin: int, end: int, every: int = 1, search_every: int | None = None) -> Cubic:
    """Prunes gradually: at a step t of the way from `begin` to `end`, the sparsity is 1 - (1 - t)^3 of the target.

    The schedule of Zhu and Gupta, "To prune, or not to prune" (2017, arXiv 1710.01878), from an initial sparsity of 0.

    Args:
        begin: the first step that updates the masks, which prunes nothing yet.
        end: the last one, at which the target is reached.
        every: steps between updates.
        search_every: steps between new searches of row permutations, which start from those in force; None searches
            when a layer is first pruned, and never again.

    Raises:
        ValueError: not 0 <= begin < end, every < 1, or search_every is no multiple of it.
    """
    return Cubic(begin, end, every, search_every)


def linear(begin: int, end: int, every: int = 1, search_every: int | None = None) -> Linear:
    """As `cubic`, but at a step t of the way from `begin` to `end`, the sparsity is t of the target."""
    return Linear(begin, end, every, search_every)


def constant(begin: int, end: int, every: int = 1, search_every: int | None = None) -> Constant:
    """As `cubic`, but with the whole target from `begin` on: for methods whose pruned weights can come back.

    The masks follow the weights until `end`, and stay as they are from then on.
    """
    return Constant(begin, end, every, search_every)


def stages(steps: Sequence[int], sparsities: Sequence[float], search: bool = False) -> Stages:
    """Prunes in stages, such as to 25%, 35%, 50%, 60%, 70% and 75%, and trains in between.

    Args:
        steps: the step at which each stage prunes, ascending.
        sparsities: the sparsity of each stage, not falling. The last stands for each pattern's own sparsity, the others
            for proportionally less of it: 25% in a list that ends with 75% is a third of the target.
        search: whether every stage searches the row permutations anew, starting from those in force.

    Raises:
        ValueError: no stage, lists of different lengths, steps that do not ascend from 0 or later, or sparsities that
            fall or do not lie in (0, 1].
    """
    steps, sparsities = tuple(map(int, steps)), tuple(map(float, sparsities))
    if not steps or len(steps) != len(sparsities):
        raise ValueError(
            f"stages need one sparsity for each step, got {len(steps)} steps, {len(sparsities)} sparsities"
        )
    if steps[0] < 0 or any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"the steps of stages must ascend from 0 or later, got {steps}")
    falling = any(a > b for a, b in itertools.pairwise(sparsities))
    if falling or not (sparsities[0] > 0 and sparsities[-1] <= 1) or not all(map(math.isfinite, sparsities)):
        raise ValueError(f"the sparsities of stages must lie in (0, 1] and not fall, got {sparsities}")
    return Stages(steps, tuple(s / sparsities[-1] for s in sparsities), search)


def grow_and_prune(partitions: Sequence[str], begin: int, turn: int, rounds: int = 1) -> GrowAndPrune:
    """Cyclic grow-and-prune: partitions of the layers take turns being dense.

    GaP (Ma et al., "Effective Model Sparsification by Scheduled Grow-and-Prune Methods", ICLR 2022, arXiv 2106.09857).

    At `begin` all layers but those of the first partition are pruned. After each turn that partition is pruned, by its
    weights at that time, and the next one is grown to dense, its pruned weights from zero. Every partition has `rounds`
    turns; after the last, all layers are pruned. A layer whose turn neither begins nor ends keeps its mask. Row
    permutations are searched whenever a dense layer is pruned.

    Args:
        partitions: a regular expression each, as in `shfl_jax.Plan`: the first that matches a layer's whole path owns
            it. A layer that none owns is pruned at `begin` for good.
        begin: the first step that updates masks.
        turn: steps of a turn.
        rounds: turns of every partition.

    Raises:
        ValueError: no partition, one that is no regular expression, or a number that is too small.
    """
    return GrowAndPrune(tuple(partitions), begin, turn, rounds)
