"""Random packed 2:4 matrices, for benchmarks and tests."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import RowGrouped, Topology

PAIRS = np.array([first | second << 2 for first in range(4) for second in range(first + 1, 4)], np.uint8)


def random_matrix(
    pattern: str, m: int, k: int, sparsity: float, group_size: int, dtype: str = "bfloat16", seed: int = 0
) -> RowGrouped:
    """A random canonical packed matrix with the counts of a pattern.

    Args:
        pattern: "shfl_tvw": all groups have as many columns; "tvw": outputs and inputs each keep the root of twice the
            density, and the pruned outputs fill groups without columns.
        m: output features.
        k: input features.
        sparsity: in total.
        group_size: rows of a group.
        dtype: of the values.
        seed: of the random numbers.
    """
    rng, v = np.random.default_rng(seed), group_size
    density, groups = 2 * (1 - sparsity), -(-m // v)
    counts = np.full(groups, round(k * density / 4) * 4)
    outputs = round(m * density**0.5)
    if pattern == "tvw":
        counts = np.where(np.arange(groups + 1) < -(-outputs // v), round(k * density**0.5 / 4) * 4, 0)
    rows = np.full(len(counts) * v, m, np.int32)
    if pattern == "tvw":
        tiles = -(-outputs // v) * v
        order = rng.permutation(m)
        rows[:outputs], rows[tiles : tiles + m - outputs] = np.sort(order[:outputs]), np.sort(order[outputs:])
    else:
        rows[:m] = rng.permutation(m)
    columns = np.concatenate([np.sort(rng.permutation(k)[:count]) for count in counts]).astype(np.int32)
    ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    two = PAIRS[rng.integers(0, 6, (2 * -(-len(columns) // 8), v))].reshape(-1, 2, v)
    pairs = two[:, 0] | two[:, 1] << 4
    values = jax.random.normal(jax.random.key(seed), (len(columns) // 2, v), dtype) * float(counts.max() / 2) ** -0.5
    topology = Topology(
        *map(jnp.asarray, (columns, ptr, rows)), m=m, k=k, group_size=v, max_count=int(counts.max()),
        pairs=jnp.asarray(pairs),
    )  # fmt: skip
    return RowGrouped(values.astype(dtype), topology)
