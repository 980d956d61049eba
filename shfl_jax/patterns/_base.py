"""What all patterns share: their interface, and the checks of their fields and shapes."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from shfl_jax.patterns._groups import Vectors
from shfl_jax.patterns._mask import Mask
from shfl_jax.patterns._ranking import ALWAYS, Limits, normalised, rank_keys, rank_together, scaled


@dataclasses.dataclass(frozen=True)
class Pattern(abc.ABC):
    """Which units of a layer may be pruned together.

    One of your own is a frozen dataclass with a `name`, a `group_size` and a `mask`, decorated with
    `shfl_jax.patterns.register`; its units are single weights unless it says otherwise.

    Attributes:
        sparsity: target fraction of pruned weights, in [0, 1).
        name: the pattern's name in checkpoints, tables and results files.
        group_size: V of the masks.
    """

    sparsity: float
    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is the fraction of pruned weights and must lie in [0, 1), got {self.sparsity}")

    @property
    @abc.abstractmethod
    def group_size(self) -> int:
        """V, rows of a group of the masks."""

    @abc.abstractmethod
    def mask(self, scores: jax.Array, count: jax.Array | int, previous: Mask | None = None) -> Mask:
        """Chooses the kept units of one layer. Pure, of fixed shapes, jit-able and vmap-able.

        Args:
            scores: (M, K) floating, non-negative and finite.
            count: int32 scalar, the number of kept units; may be traced.
            previous: an earlier mask of the layer, from which patterns that search may start.

        Returns:
            The mask. Ties go to the lower index.
        """

    @property
    def searches_rows(self) -> bool:
        """Whether `mask` searches a row permutation, which costs much more than `mask_of_rows` for a given one."""
        return False

    def mask_of_rows(
        self, scores: jax.Array, rows: jax.Array, count: jax.Array | int, previous: Mask | None = None
    ) -> Mask:
        """The mask for a given row permutation: scores (M, K), rows (R * V,) int32 with sentinels M.

        The other arguments are those of `mask`.
        """
        raise NotImplementedError(f"{self!r} takes no row permutation")

    @property
    def vectors(self) -> Vectors | None:
        """How columns of row groups are chosen, if these are the units; None for units of another kind."""
        return None

    @property
    def min_sparsity(self) -> float:
        """The lowest sparsity of a layer that is pruned to this pattern."""
        return 0.0

    @property
    def max_sparsity(self) -> float:
        """No layer can be pruned beyond it; 1 itself is out of reach."""
        return 1.0

    def units(self, shape: tuple[int, ...]) -> int:
        """The number of units in a layer of shape (M, K): its weights unless a pattern says otherwise."""
        return shape[0] * shape[1]

    def least(self, shape: tuple[int, ...]) -> int:
        """The smallest number of units that a mask keeps, whatever the sparsity."""
        return min(1, self.units(shape))

    def step(self, shape: tuple[int, ...]) -> int:
        """The number that counts of kept units are multiples of."""
        return 1

    def unit_keys(self, scores: jax.Array) -> jax.Array:
        """What `rank` ranks the units of one layer by, comparable between all layers of this pattern.

        Args:
            scores: (M, K) floating, non-negative and finite.

        Returns:
            int32 rank keys, flat: one for every `step` units. Weight by weight unless a pattern says otherwise.
        """
        return rank_keys(scores).reshape(-1)

    def rank(self, scores: Sequence[jax.Array], limits: Sequence[Limits]) -> list[Any]:
        """How many units each of several layers keeps when the units of all are ranked together.

        Args:
            scores: (B, M, K) of each layer, of B slices that are ranked as layers of their own.
            limits: of each layer.

        Returns:
            For each layer, the counts of its slices (B,) as `mask` takes them. Their sum is that of the layers' own
            counts, less at most one unit (`step` units), unless the limits prevent it.
        """
        keys = [jax.vmap(self.unit_keys)(s) for s in normalised(list(scores))]
        return rank_together(keys, [self.step(s.shape[1:]) for s in scores], limits)

    def count(
        self,
        shape: tuple[int, ...],
        sparsity: float | jax.Array | None = None,
        fraction: float | jax.Array = 1.0,
    ) -> jax.Array:
        """The number of kept units, to the nearest multiple of `step`, for every size below 2^31 and without x64.

        Args:
            shape: (M, K) of the layer.
            sparsity: target sparsity, the pattern's own unless given; may be traced.
            fraction: scales the sparsity (the progress of a schedule), in [0, 1]; may be traced. 0 keeps everything, 1
                prunes exactly as many units as no fraction at all.

        Returns:
            int32 scalar. At least one unit is kept.

        Raises:
            ValueError: the layer has no weights, or too many for 32-bit indices.
        """
        check_shape(self, shape)
        units = self.units(shape)
        pruned = scaled(scaled(units, self.sparsity if sparsity is None else sparsity), fraction)
        kept = jnp.maximum(units - jnp.asarray(pruned, jnp.int32), self.least(shape))
        return (kept + self.step(shape) // 2) // self.step(shape) * self.step(shape)


def check_sizes(pattern: Pattern, *names: str) -> None:
    """Raises ValueError unless the named fields of the pattern are integers of at least 1."""
    for name in names:
        value = getattr(pattern, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(pattern).__name__}'s {name} must be an integer of at least 1, got {value!r}")


def check_share(pattern: Pattern, name: str) -> None:
    """Raises ValueError unless the named field of the pattern is a fraction."""
    if not 0 <= getattr(pattern, name) <= 1:
        raise field_error(pattern, name, "lie in [0, 1]")


def check_choice(pattern: Pattern, name: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the named field of the pattern is one of the choices."""
    if getattr(pattern, name) not in choices:
        raise field_error(pattern, name, f"be one of {', '.join(map(repr, choices))}")


def check_shape(pattern: Pattern, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the shape is that of a non-empty matrix with 32-bit indices."""
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{type(pattern).__name__} prunes a non-empty (M, K) matrix, got shape {tuple(shape)}")
    if math.prod(shape) > ALWAYS:
        raise ValueError(f"a layer of shape {tuple(shape)} has 2^31 weights or more; split it")


def field_error(pattern: Pattern, field: str, rule: str) -> ValueError:
    """The error for a field of a pattern that breaks a rule."""
    return ValueError(f"{type(pattern).__name__}'s {field} must {rule}, got {getattr(pattern, field)!r}")
