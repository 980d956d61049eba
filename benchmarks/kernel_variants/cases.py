"""What the study of the Triton kernels measures: variants of a kernel, cases, operands and references."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kernel of the study. The defaults are the plain kernel: one program per group and token tile."""

    op: str = "forward"
    values: str = "pv"  # (P, V), or "vk": (R, V, kept)
    bounds: str = "static"  # or "dynamic": read from group_ptr
    tail: str = "none"  # or "mask": every load masked by the segment's end
    prefetch: bool = False  # load the next step's column ids one step ahead
    order: str = "groups"  # which program index runs fastest: "groups" or "tokens"
    block_rows: int = 128
    block_tokens: int = 128
    block_k: int = 64
    num_warps: int = 4
    num_stages: int = 3
    evict: str | None = None
    split: int = 1  # splits of the contraction, f32 partials summed by XLA
    store: str = "rows"  # or "token_major": y is (N, M)
    flip: bool = False  # compute the transposed product
    ids: str = "inline"  # or "none": no column ids at all, the rows 0, 1, ... (wrong result, shows what the ids cost)
    unroll: int = 1  # steps in a loop body
    ahead: int = 1  # with prefetch: how many steps ahead
    touch: int = 0  # steps ahead at which one id of a step is read, to bring its cache line to the L1 cache
    x: str = "rows"  # or "tiles": x as (tokens / 128, K, 128), a token tile in one piece
    early_rows: bool = False  # load the output rows before the loop
    transpose: str = "xla"  # op "token_major": who transposes x and y, "xla" or "triton"


@dataclasses.dataclass(frozen=True)
class Case:
    """One matrix shape with equal counts."""

    m: int
    k: int
    n: int
    sparsity: float = 0.75
    group_size: int = 128

    @property
    def groups(self) -> int:
        """Number of row groups."""
        return self.m // self.group_size

    @property
    def kept(self) -> int:
        """Kept columns of every group."""
        return round(self.k * (1 - self.sparsity))


def arrays(case: Case, seed: int, n_sets: int) -> list[dict[str, jax.Array]]:
    """Random operands of one case."""
    rng = np.random.default_rng(seed)
    columns = np.stack([np.sort(rng.permutation(case.k)[: case.kept]) for _ in range(case.groups)]).astype(np.int32)
    rows = rng.permutation(case.m).astype(np.int32)
    group_ptr = np.arange(case.groups + 1, dtype=np.int32) * case.kept
    sets = []
    for key in jax.random.split(jax.random.key(seed), n_sets):
        keys = jax.random.split(key, 3)
        normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        values = normal(keys[0], (case.groups * case.kept, case.group_size)) * (case.kept**-0.5)
        sets.append(
            {
                "values": values,
                "values_vk": values.reshape(case.groups, case.kept, -1).swapaxes(1, 2).copy(),
                "columns": jnp.asarray(columns.reshape(-1)),
                "group_ptr": jnp.asarray(group_ptr),
                "rows": jnp.asarray(rows),
                "x": (x := normal(keys[1], (case.k, case.n))),
                "x_tokens": x.T.copy(),
                "x_tiles": x.reshape(case.k, -1, min(case.n, 128)).swapaxes(0, 1).copy(),
                "dy": normal(keys[2], (case.m, case.n)),
            }
        )
    return sets


def reference(case: Case, operands: dict[str, jax.Array], op: str) -> np.ndarray:
    """The float64 result on (a few tokens of) the operands, in feature-major order."""
    get = {
        name: np.asarray(operands[name]).astype(np.float64 if operands[name].dtype == jnp.bfloat16 else np.int64)
        for name in ("values", "columns", "rows", "x", "dy")
    }
    values = get["values"].reshape(case.groups, case.kept, case.group_size)
    columns = get["columns"].reshape(case.groups, case.kept)
    rows = get["rows"].reshape(case.groups, case.group_size)
    if op == "grad_values":  # the first two groups alone
        return np.stack([get["x"][columns[g]] @ get["dy"][rows[g]].T for g in range(2)])
    dense = np.zeros((case.m, case.k))
    for g in range(case.groups):
        dense[rows[g][:, None], columns[g][None, :]] = values[g].T
    return dense @ get["x"][:, :64] if op == "forward" else dense.T @ get["dy"][:, :64]


def arrays_shape(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the operands, for compiling before they exist."""
    bf16, i32, p = jnp.bfloat16, jnp.int32, case.groups * case.kept
    return {
        "values": jax.ShapeDtypeStruct((p, case.group_size), bf16),
        "values_vk": jax.ShapeDtypeStruct((case.groups, case.group_size, case.kept), bf16),
        "columns": jax.ShapeDtypeStruct((p,), i32),
        "group_ptr": jax.ShapeDtypeStruct((case.groups + 1,), i32),
        "rows": jax.ShapeDtypeStruct((case.m,), i32),
        "x": jax.ShapeDtypeStruct((case.k, case.n), bf16),
        "x_tokens": jax.ShapeDtypeStruct((case.n, case.k), bf16),
        "x_tiles": jax.ShapeDtypeStruct((-(-case.n // 128), case.k, min(case.n, 128)), bf16),
        "dy": jax.ShapeDtypeStruct((case.m, case.n), bf16),
        "dense": jax.ShapeDtypeStruct((case.m, case.k), bf16),
    }


def check(case: Case, variant: Variant, result: jax.Array, want: np.ndarray) -> float:
    """Relative error against float64."""
    if variant.op == "grad_values":
        got = result[: 2 * case.kept].reshape(2, case.kept, -1)
    elif variant.store == "token_major" or variant.op == "token_major":
        got = result[:64].T
    else:
        got = result[:, :64]
    got = np.asarray(got.astype(jnp.float32), np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
