"""Measures tile configs of the Triton and the Mosaic kernels on this GPU and writes a table of the best.

A problem already in the table is skipped, so a call that ran out of time is simply repeated. All configs of a batch are
compiled before the first is measured: CUPTI sees every kernel of the process, the compiler's own trials too. Several
calls may write to one table, each with problems of its own; a lock lets one at a time use the GPU.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pallas_kernels import _tables as tables
from pallas_kernels import timing
from pallas_kernels._backend import BACKENDS, FEW_TOKENS, Call, Op, Problem
from pallas_kernels._devices import gpu
from pallas_kernels._layout import Matrix, Prepared, as_prepared
from pallas_kernels._matrix import RowGrouped, Topology

__all__ = [
    "IMPLEMENTATIONS",
    "LARGEST_ERROR",
    "LAYERS",
    "SPREAD",
    "TOKENS",
    "copies",
    "dense_products",
    "main",
    "problems",
    "product",
    "random_matrix",
    "relative_error",
    "search_space",
    "triton_device",
    "tune",
]

LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (3072, 768), (768, 3072), (1024, 1024), (8192, 8192))
TOKENS = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
SPREAD = 0.42  # coefficient of variation of ragged counts, that of a one-threshold mask on a trained layer
IMPLEMENTATIONS: tuple[str, ...] = (
    "triton",
    "mosaic_gpu",
)  # the first one is compared with dense products, the others with it
LARGEST_ERROR = 2e-2  # configs that disagree with the heuristic's result by more are not kept


def random_matrix(
    m: int,
    k: int,
    sparsity: float,
    group_size: int,
    *,
    equal: bool = True,
    dtype: DTypeLike = "bfloat16",
    seed: int = 0,
) -> RowGrouped:
    """A random canonical matrix: random row permutation, random columns, normal values.

    Args:
        m: output features.
        k: input features.
        sparsity: pruned share of the weights.
        group_size: rows of a group.
        equal: equal counts, else log-normal ones.
        dtype: of the values.
        seed: of all random numbers.
    """
    rng = np.random.default_rng(seed)
    groups = -(-m // group_size)
    counts = np.full(groups, max(1, round(k * (1 - sparsity))))
    if not equal:
        # The counts are the same for every seed: one compiled function serves all.
        weights = np.random.default_rng(0).lognormal(sigma=np.sqrt(np.log1p(SPREAD**2)), size=groups)
        counts = np.clip(np.round(weights * counts.sum() / weights.sum()), 1, k).astype(int)
    columns = np.concatenate([np.sort(rng.permutation(k)[:count]) for count in counts]).astype(np.int32)
    rows = np.full(groups * group_size, m, np.int32)
    rows[:m] = rng.permutation(m)
    ptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = jax.random.normal(jax.random.key(seed), (len(columns), group_size), dtype) * float(counts.mean()) ** -0.5
    arrays = map(jnp.asarray, (columns, ptr, rows))
    topology = Topology(*arrays, m=m, k=k, group_size=group_size, max_count=int(counts.max()))
    return RowGrouped(values.astype(dtype), topology)


def product(op: Op, config: Any, implementation: str = IMPLEMENTATIONS[0]) -> Callable[..., jax.Array]:
    """The kernel of an op as a function of (matrix, x, dy), feature-major; None takes the config that is looked up.

    The function raises NotImplementedError where the implementation has no kernel for its arguments.
    """
    backend, call = BACKENDS[implementation], Call()

    def run(matrix: Matrix, x: jax.Array, dy: jax.Array) -> jax.Array:
        prepared = as_prepared(matrix)
        problem = Problem.of_layout(op, prepared.layout, call.tokens(x), x.dtype)
        if reasons := backend.why_not(problem):
            raise NotImplementedError(f"{implementation} has no kernel for a {problem}: {'; '.join(reasons)}")
        if op == "forward":
            return backend.forward(call, prepared, x, None, None, config)
        if op == "grad_values":
            return backend.grad_values(call, prepared.layout, x, dy, config)
        return backend.grad_input(call, prepared, dy, config)

    return run


def dense_products(op: Op) -> tuple[Callable[..., Any], ...]:
    """What XLA does without sparsity, as functions of (weight, x, dy): in both layouts of the activations."""

    def contract(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
        return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32).astype(b.dtype)

    def feature_major(w: jax.Array, x: jax.Array, dy: jax.Array) -> jax.Array:
        if op == "forward":
            return contract(w, x, 1, 0)
        return contract(dy, x, 1, 1) if op == "grad_values" else contract(w, dy, 0, 0)

    def token_major(w: jax.Array, x: jax.Array, dy: jax.Array) -> jax.Array:
        x, dy = _tokens_first(x), _tokens_first(dy)
        if op == "forward":
            return contract(x, w, 1, 1)
        return contract(dy, x, 0, 0) if op == "grad_values" else contract(dy, w, 1, 0)

    return feature_major, token_major


def _tokens_first(x: jax.Array) -> jax.Array:
    """The same bytes read as a token-major array: the right shape for a timing, without a transpose in it."""
    return x.reshape(x.shape[::-1])


def problems(
    layers: Sequence[tuple[int, int]], tokens: Sequence[int], sparsities: Sequence[float], sizes: Sequence[int],
    ops: Sequence[Op], dtype: str,
) -> list[Problem]:  # fmt: skip
    """All products of the given sizes; ragged counts too where there are many tokens."""
    found = []
    for op, (m, k), n, sparsity, v in itertools.product(ops, layers, tokens, sparsities, sizes):
        slots = -(-m // v) * round(k * (1 - sparsity))
        found.append(Problem(op, m, k, n, slots, v, dtype))
        if op == "forward" and n > FEW_TOKENS:
            found.append(Problem(op, m, k, n, slots, v, dtype, equal=False))
    return found


def tune(
    todo: Sequence[Problem], implementations: Sequence[str], path: pathlib.Path, minutes: float, batch: int = 8
) -> None:
    """Measures problems until the time is over and keeps the table on disk up to date.

    Args:
        todo: what to measure.
        implementations: with what; those that cannot do a problem are left out.
        path: the table.
        minutes: no problem is begun after so many.
        batch: problems compiled together.
    """
    started = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    with timing.locked(path.name):
        done = {_key(entry) for entry in _read(path)["entries"]}
    jobs = [(name, p) for p in dict.fromkeys(todo) for name in implementations if search_space(name, p)]
    jobs = [job for job in jobs if job not in done]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task("tuning", total=len(jobs))
        for i in range(0, len(jobs), batch):
            if time.monotonic() - started > minutes * 60:
                progress.console.print(f"out of time: {len(jobs) - i} problems left, call again to go on")
                break
            some = jobs[i : i + batch]
            compiled = list(pool.map(_compile, some))
            for (name, problem), functions in zip(some, compiled, strict=True):
                if not functions[0] or None in functions[1]:
                    progress.advance(task)
                    continue
                with timing.alone():
                    entry = _measure((name, problem), *functions)
                if "config" not in entry:  # none agreed
                    progress.advance(task)
                    continue
                with timing.locked(path.name):
                    table = _read(path)  # another call may have added to it
                    table["entries"].append(entry)
                    path.write_text(json.dumps(table | {"date": str(datetime.date.today())}, indent=1) + "\n")
                rival = "dense" if "dense_time_us" in entry else "triton"
                ratio = entry[f"{rival}_time_us"] / entry["time_us"]
                progress.console.print(
                    f"{name} {problem.op} {problem.m}x{problem.k}x{problem.n} V={problem.group_size} "
                    f"density {problem.density:.3f}{'' if problem.equal else ' ragged'}: {entry['time_us']:.2f} us, "
                    f"{ratio:.2f} times {rival}, {entry['config']}",
                    soft_wrap=True,
                )
                progress.advance(task)


def search_space(implementation: str, problem: Problem) -> tuple[Any, ...]:
    """The configs to measure, the heuristic's first; none where the implementation cannot do the problem here."""
    backend, here = BACKENDS[implementation], gpu()
    if backend.missing(here) or backend.why_not(problem):
        return ()
    return backend.configs(problem, here)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The table on disk, or one without entries."""
    table: dict[str, Any] = {"device": tables.file_name(triton_device()), "jax": jax.__version__, "date": ""}
    table["entries"] = list[dict[str, Any]]()
    return table | ({"entries": json.loads(path.read_text())["entries"]} if path.exists() else {})


def triton_device() -> str:
    """The kind of the GPU to tune; RuntimeError without one."""
    return jax.devices("cuda")[0].device_kind


def _key(entry: dict[str, Any]) -> tuple[str, Problem]:
    problem = Problem.of(entry)
    return entry.get("implementation", IMPLEMENTATIONS[0]), problem


def _operands(problem: Problem, seed: int) -> tuple[Prepared, jax.Array, jax.Array]:
    p = problem
    sparsity = 1 - p.slots * p.group_size / (-(-p.m // p.group_size) * p.group_size * p.k)
    matrix = random_matrix(p.m, p.k, sparsity, p.group_size, equal=p.equal, dtype=p.dtype, seed=seed)
    keys = jax.random.split(jax.random.key(seed + 1))
    x = jax.random.normal(keys[0], (p.k, p.n), p.dtype)
    return BACKENDS[IMPLEMENTATIONS[0]].prepare(matrix, None), x, jax.random.normal(keys[1], (p.m, p.n), p.dtype)


def _compile(job: tuple[str, Problem]) -> tuple[list[Any], list[Any]]:
    """([(config, function), ...], [functions to compare with]): dense products, for other kernels Triton's."""
    implementation, problem = job
    operands = _operands(problem, 0)
    if _is_first(job):
        with timing.alone():  # XLA tries its dense kernels while it compiles them
            rivals = list(_dense(problem.op, problem.m, problem.k, problem.n, problem.dtype))
    else:
        rivals = [_build(product(problem.op, None), *operands)]
    space = search_space(implementation, problem)
    candidates = [(c, _build(product(problem.op, c, implementation), *operands)) for c in space]
    return [(c, f) for c, f in candidates if f is not None], rivals


def _is_first(job: tuple[str, Problem]) -> bool:
    """Whether a job is of the implementation that is compared with dense, and the others with it."""
    return job[0] == IMPLEMENTATIONS[0]


@functools.cache
def _dense(op: Op, m: int, k: int, n: int, dtype: str) -> tuple[Any, ...]:
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((m, k), (k, n), (m, n))]
    return tuple(_build(function, *shapes) for function in dense_products(op))


def _build(function: Callable[..., Any], *arguments: Any) -> Any:
    """The compiled function, or None where that cannot be."""
    try:
        return jax.jit(function).lower(*arguments).compile()
    # Too much shared memory, too many registers or a matrix of another kind: not a config for this problem.
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return None


def _measure(job: tuple[str, Problem], candidates: list[Any], rivals: list[Any]) -> dict[str, Any]:
    """The entry of a job: the fastest candidate that agrees with the first one, or with Triton's kernel."""
    implementation, problem = job
    first = _operands(problem, 0)
    sparse_sets = copies(first)
    if _is_first(job):
        weight = jax.random.normal(jax.random.key(1), (problem.m, problem.k), first[1].dtype)
        dense_sets = copies((weight, *first[1:]))
        times = {"dense_time_us": min(timing.median_us(f, dense_sets)[0] for f in rivals)}
        want = candidates[0][1](*first)
    else:
        times = {"triton_time_us": timing.median_us(rivals[0], sparse_sets)[0]}
        want = rivals[0](*first)
    best: dict[str, Any] = {}
    for config, function in candidates:
        if not float(relative_error(function(*first), want)) <= LARGEST_ERROR:  # NaN is not
            continue
        time_us, kernels = timing.median_us(function, sparse_sets)
        if not best or time_us < best["time_us"]:
            best = {"config": dataclasses.asdict(config), "time_us": time_us, "kernels": kernels}
    entry = {"implementation": implementation} | dataclasses.asdict(problem)
    return entry | best | times | {"tried": len(candidates)}


def copies(arguments: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The arguments and as many copies of them as fill the L2 cache twice."""
    return [arguments] + [jax.tree.map(jnp.copy, arguments) for _ in range(1, timing.num_sets(arguments))]


@jax.jit
def relative_error(got: jax.Array, want: jax.Array) -> jax.Array:
    """The norm of a difference over that of what is wanted: float32 scalar."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `shfl-jax tune`; returns its exit status."""
    parser = argparse.ArgumentParser(prog="shfl-jax tune", description="Measures tile configs on this GPU.")
    pair = functools.partial(_numbers, count=2)
    parser.add_argument("--layers", type=pair, nargs="+", default=LAYERS, metavar="M,K", help="shapes of W")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--sparsity", type=float, nargs="+", default=(0.75, 0.5, 0.875))
    parser.add_argument("--group-size", type=int, nargs="+", default=(128, 64, 32))
    parser.add_argument("--op", nargs="+", default=("forward", "grad_values", "grad_input"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=tuple(IMPLEMENTATIONS))
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no further problem after this time")
    parser.add_argument("--out", type=pathlib.Path, help="the table (default: the one the package reads)")
    options = parser.parse_args(arguments)
    try:
        device = tables.file_name(triton_device())
    except RuntimeError:
        print("shfl-jax tune: no CUDA device here; the packaged tables and the heuristic are used", file=sys.stderr)
        return 1
    todo = problems(options.layers, options.tokens, options.sparsity, options.group_size, options.op, options.dtype)
    tune(todo, options.implementation, options.out or tables.TABLES / f"{device}.json", options.minutes)
    return 0


def _numbers(text: str, count: int) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if len(numbers) != count:
        raise argparse.ArgumentTypeError(f"expected {count} numbers with commas, got {text!r}")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
