"""The mask of one layer: what is kept, in compact arrays of fixed shapes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["rows", "kept", "order", "choice"], meta_fields=["m"])
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which weights of one layer are kept. Every pattern yields one; element-wise patterns have groups of one row.

    All arrays may have the same leading axes (stacked layers).

    Attributes:
        rows: (R * V,) int32, the row permutation: stored row i is row `rows[i]` of W; each of 0..M-1 once, every other
            slot the sentinel M.
        kept: (R, K) bool, the kept columns of every row group.
        m: output features M.
        order: with 2:4 inside the groups, (R, 4 * ceil(K / 4)) int32: the kept columns of every group, four after four,
            the sentinel K in every slot that holds none. None without.
        choice: with 2:4 inside the groups, (M, K) bool: the kept weights; at most two of a row in every four, except
            partway through a schedule. None where every weight of a kept column is kept.
    """

    rows: jax.Array
    kept: jax.Array
    m: int
    order: jax.Array | None = None
    choice: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K) of the weight it belongs to."""
        return self.m, self.kept.shape[-1]

    @property
    def group_size(self) -> int:
        """V, rows of a group."""
        return self.rows.shape[-1] // self.kept.shape[-2]

    def elements(self) -> jax.Array:
        """Expands the mask: (..., M, K) bool, True where a weight is kept."""
        if self.choice is not None:
            return self.choice
        return _elements(self)

    def density(self) -> jax.Array:
        """Fraction of kept weights of every slice: (...,) float32."""
        if self.choice is not None:
            return self.choice.mean((-2, -1), dtype=jnp.float32)
        live = (self.rows.reshape(*self.kept.shape[:-1], self.group_size) < self.m).sum(-1)
        kept = (self.kept.sum(-1) * live.astype(jnp.float32)).sum(-1)
        return kept / (self.m * self.kept.shape[-1])


@jax.jit
def _elements(mask: Mask) -> jax.Array:
    if mask.rows.ndim > 1:
        return jax.vmap(_elements)(mask)
    groups = jnp.zeros(mask.m, jnp.int32)
    slot_group = jnp.arange(mask.rows.shape[-1], dtype=jnp.int32) // mask.group_size
    groups = groups.at[mask.rows].set(slot_group, mode="drop")
    return mask.kept[groups]
