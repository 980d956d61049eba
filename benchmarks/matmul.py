"""Side-by-side kernel times of the row-grouped product on a GPU: `python -m benchmarks.matmul`.

Writes `benchmarks/results/<device>/matmul.json`: our implementations against XLA's dense product in both layouts, and
PyTorch's cuBLAS, cuSPARSELt 2:4 and block-sparse rows (`benchmarks.baselines`, in a subprocess). A case and its
baselines are measured in one call, by CUPTI kernel time, with a cold L2, on random data. A case already in the file is
skipped; the cases of the acceptance table come first; a call ends by itself after `--minutes`.
"""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks import packed, workers
from benchmarks import records as files
from pallas_kernels import timing, to_dense, tune
from pallas_kernels._backend import BACKENDS, Layout, Problem
from pallas_kernels._devices import gpu

SPARSITIES = (0.75, 0.5, 0.875, 0.9)
GROUP_SIZES = (128, 64, 32)
PAPER = (
    (1024, 960, 1024),
    (4096, 960, 1024),
    (1024, 960, 4096),
    (4096, 6400, 1024),
    (1024, 32000, 1024),
    (33712, 1056, 1024),
)
CHECKED_TOKENS = 64  # tokens of the result that are compared with float64
IMPLEMENTATIONS = ("mosaic_gpu", "triton", "xla")
BASELINES = "benchmarks.baselines" if importlib.util.find_spec("torch") else None  # PyTorch's half
XLA_ELEMENTS = 2**29  # the largest gathered operand, P x N, that plain XLA is asked to make


@dataclasses.dataclass(frozen=True)
class Case:
    """One product and everything it is compared with."""

    suite: str
    m: int
    k: int
    n: int
    sparsity: float = 0.75
    group_size: int = 128
    counts: str = "equal"
    layout: Layout = "feature_major"
    backward: bool = False
    epilogue: str | None = None  # None, or an activation with a bias
    dtype: str = "bfloat16"
    packed: str | None = None  # None, or "tvw" or "shfl_tvw": 2:4 inside the groups, half of the total density

    @property
    def pattern(self) -> str:
        """What the matrix is called in a record."""
        return self.packed or ("shfl_bw" if self.counts == "equal" else "vw")

    @property
    def shape_key(self) -> tuple:
        """What the dense baselines depend on."""
        return self.m, self.k, self.n, self.dtype, self.backward


ACCEPTANCE = (
    *(Case("square", 4096, 4096, 4096, s) for s in (0.75, 0.5, 0.875)),
    *(Case("square", 4096, 4096, 4096, group_size=v) for v in (64, 256)),
    Case("square", 8192, 8192, 8192),
    Case("llm", 14336, 4096, 4096),
    Case("llm", 4096, 14336, 4096),
    Case("bert", 3072, 768, 8192),
    *(Case("llm", 14336, 4096, n) for n in (1, 8, 16, 64, 256)),
    Case("llm", 4096, 4096, 16),
    Case("square", 4096, 4096, 4096, layout="token_major"),
    Case("square", 4096, 4096, 4096, backward=True),
    Case("square", 4096, 4096, 4096, counts="ragged"),
    *(Case("square", 4096, 4096, 4096, epilogue=e) for e in ("gelu", "relu")),
    *(
        Case("square", 4096, 4096, 4096, s, v, packed=pattern)
        for pattern in ("shfl_tvw", "tvw")
        for v, sparsities in ((128, (0.75, 0.875, 0.9375)), (256, (0.75,)))
        for s in sparsities
    ),
    *(Case("llm", 14336, 4096, n, s, packed="shfl_tvw") for s in (0.75, 0.875) for n in (1, 8, 16, 64)),
    Case("llm", 14336, 4096, 16, 0.9375, packed="shfl_tvw"),
)


def cases() -> Iterator[Case]:
    """All cases, those of the acceptance table first."""
    yield from ACCEPTANCE
    suites = {
        "llm": [
            (m, k, n)
            for n in (1, 8, 16, 32, 64, 256, 1024, 4096)
            for m, k in ((14336, 4096), (4096, 14336), (4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096))
        ],
        "square": [(d, d, d) for d in (1024, 2048, 8192, 4096)],
        "bert": [(m, k, n) for n in (8192, 12800) for m, k in ((3072, 768), (768, 3072), (768, 768))],
        "paper": list(PAPER),
    }
    for sparsity, v in itertools.product(SPARSITIES, GROUP_SIZES):
        for suite, sizes in suites.items():
            for size in sizes:
                yield Case(suite, *size, sparsity, v)
                if size[2] > 256 and v >= 64:
                    yield Case(suite, *size, sparsity, v, counts="ragged")
                if size[2] > 256 and v == 128:
                    yield Case(suite, *size, sparsity, v, backward=True)


class Torch:
    """PyTorch's half, in a subprocess that answers one case at a time; nothing where PyTorch is not installed."""

    def __init__(self):
        self.worker = workers.Worker(BASELINES) if BASELINES else None
        self.known: dict[tuple, list[dict]] = {}

    def measure(self, case: Case) -> list[dict]:
        """The records of a case's baselines, measured once a call for every shape and sparsity."""
        key = (case.shape_key, case.sparsity)
        if self.worker is None:
            return []
        if key not in self.known:
            self.known[key] = self.worker.ask(dataclasses.asdict(case)) or []
        return self.known[key]

    def close(self) -> None:
        """Ends the subprocess."""
        if self.worker is not None:
            self.worker.close()


def operands(case: Case, implementation: str | None) -> tuple:
    """The prepared matrix, the activations in the case's layout, the output's gradient and the bias of a case."""
    if case.packed:
        matrix = packed.random_matrix(case.packed, case.m, case.k, case.sparsity, case.group_size, case.dtype)
    else:
        equal = case.counts == "equal"
        matrix = tune.random_matrix(case.m, case.k, case.sparsity, case.group_size, equal=equal, dtype=case.dtype)
    if implementation != "xla" and not case.backward:  # training runs on the canonical form
        matrix = pallas_kernels.prepare(matrix, implementation)
    keys = jax.random.split(jax.random.key(1), 3)
    token_major = case.layout == "token_major"
    shape_x = (case.n, case.k) if token_major else (case.k, case.n)
    shape_y = (case.n, case.m) if token_major else (case.m, case.n)
    x, dy = jax.random.normal(keys[0], shape_x, case.dtype), jax.random.normal(keys[1], shape_y, case.dtype)
    return matrix, x, dy if case.backward else None, jax.random.normal(keys[2], (case.m,), case.dtype)


def sparse_function(case: Case, implementation: str | None) -> Callable:
    """Our product, or forward and both gradients, as a function of `operands`."""

    def forward(matrix, x, dy, bias):
        return pallas_kernels.matmul(
            matrix, x, layout=case.layout, implementation=implementation, activation=case.epilogue,
            bias=None if case.epilogue is None else bias,
        )  # fmt: skip

    def step(matrix, x, dy, bias):
        y, pull = jax.vjp(lambda v, x: forward(dataclasses.replace(matrix, values=v), x, dy, bias), matrix.values, x)
        return y, *pull(dy)

    return step if case.backward else forward


def dense_functions(case: Case) -> dict[str, Callable]:
    """XLA's dense product in both layouts, as functions of (w, x, dy); x and dy are stored as the layout wants them."""

    def feature_major(w, x, dy):
        y = _dot(w, x, 1, 0)
        return (y, _dot(w, dy, 0, 0), _dot(dy, x, 1, 1)) if case.backward else y

    def token_major(w, x, dy):
        x, dy = (None if a is None else a.reshape(a.shape[::-1]) for a in (x, dy))
        y = _dot(x, w, 1, 1)
        return (y, _dot(dy, w, 1, 0), _dot(dy, x, 0, 0)) if case.backward else y

    return {"feature_major": feature_major, "token_major": token_major}


def _dot(a, b, i, j):
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32).astype(a.dtype)


def compile_case(case: Case) -> dict[str, Any]:
    """All functions of a case, compiled; an exception's text in place of one that cannot be."""
    feature_major = dataclasses.replace(case, layout="feature_major", epilogue=None)
    weight = jax.ShapeDtypeStruct((case.m, case.k), case.dtype)
    _, x, dy, _ = jax.eval_shape(lambda: _shapes(feature_major))
    jobs = {f"dense {name}": (function, (weight, x, dy)) for name, function in dense_functions(case).items()}
    for name in IMPLEMENTATIONS:
        if name == "xla" and (
            case.backward or case.n * case.k * (1 - case.sparsity) * case.m / case.group_size > XLA_ELEMENTS
        ):
            continue
        jobs[name] = (sparse_function(case, name), operands(case, name))
    compiled: dict[str, Any] = {}
    for name, (function, arguments) in jobs.items():
        try:
            compiled[name] = jax.jit(function).lower(*arguments).compile()
        except NotImplementedError:
            continue
        except jax.errors.JaxRuntimeError as error:
            compiled[name] = str(error)[:200]
    return compiled


def _shapes(case: Case):
    zeros = [jnp.zeros((case.k, case.n), case.dtype), jnp.zeros((case.m, case.n), case.dtype)]
    return None, zeros[0], zeros[1] if case.backward else None, None


def measure(case: Case, compiled: dict, torch: Torch) -> list[dict]:
    """The records of one case."""
    base: dict[str, Any] = dataclasses.asdict(case) | {"op": "matmul_grad" if case.backward else "matmul"}
    del base["backward"], base["packed"]
    feature_major = dataclasses.replace(case, layout="feature_major", epilogue=None)
    _, x, dy, _ = operands(feature_major, "triton")
    dense_sets = tune.copies((jax.random.normal(jax.random.key(2), (case.m, case.k), case.dtype), x, dy))
    records: list[dict[str, Any]] = []
    for layout in ("feature_major", "token_major"):
        time_us, kernels = timing.median_us(compiled[f"dense {layout}"], dense_sets)
        records.append(base | {"pattern": "dense", "implementation": "xla", "layout": layout, "time_us": time_us,
                               "kernels": kernels, "sparsity": 0.0, "group_size": 0, "epilogue": None})  # fmt: skip
    del dense_sets
    dense_time = min(r["time_us"] for r in records)
    reference = None
    for name in IMPLEMENTATIONS:
        if name not in compiled:
            continue
        record = base | {"pattern": case.pattern, "implementation": name}
        if isinstance(compiled[name], str):
            records.append(record | {"time_us": None, "error": compiled[name]})
            continue
        first = operands(case, name)
        time_us, kernels = timing.median_us(compiled[name], tune.copies(first))
        record |= {"time_us": time_us, "kernels": kernels, "config": config_of(case, first[0], name)}
        if name != "xla":
            memory = compiled[name].memory_analysis()
            record["temporary_bytes"] = int(memory.temp_size_in_bytes)
            counts = np.diff(np.asarray(first[0].layout.group_ptr))
            record["counts_cv"] = round(float(counts.std() / counts.mean()), 3)
        if not case.backward and case.epilogue is None:
            reference = float64_product(case, first) if reference is None else reference
            y = compiled[name](*first)
            record["relative_error"] = relative_error(case, y, reference)
        records.append(record)
    if not case.backward and case.epilogue is None and reference is not None:
        first = operands(case, "triton")
        records[0]["relative_error"] = dense_error(case, first, reference)
    plain = {"counts": "equal", "layout": "token_major", "epilogue": None}
    records += [base | plain | record for record in torch.measure(case)]
    for record in records:
        record["dense_time_us"] = dense_time
        record["speedup"] = dense_time / record["time_us"] if record["time_us"] else None
        record["case"] = key_of(case)
    return records


def config_of(case: Case, matrix, implementation: str) -> dict | None:
    """The forward kernel's config for a case, as it is looked up."""
    if implementation == "xla" or case.backward:  # a backward case has three, one a kernel
        return None
    if case.packed and implementation != "mosaic_gpu":
        return None
    problem = Problem.of_layout("forward", matrix.layout, case.n, case.dtype)
    return dataclasses.asdict(BACKENDS[implementation].config(problem, gpu()))


def float64_product(case: Case, arguments: tuple) -> np.ndarray:
    """W x in float64 for the first tokens, (M, tokens)."""
    matrix, x, _, _ = arguments
    x = x[:CHECKED_TOKENS].T if case.layout == "token_major" else x[:, :CHECKED_TOKENS]
    dense = np.asarray(to_dense(matrix).astype(jnp.float32))
    # Rows a block at a time: a float64 copy of the largest weight would not fit beside its float32 one.
    blocks = np.array_split(dense, max(1, case.m * case.k // 2**26))
    return np.concatenate([b.astype(np.float64) @ np.asarray(x.astype(jnp.float32), np.float64) for b in blocks])


def relative_error(case: Case, y, reference: np.ndarray) -> float:
    """Relative error of the first tokens of a result, in the Frobenius norm."""
    y = y[:CHECKED_TOKENS].T if case.layout == "token_major" else y[:, :CHECKED_TOKENS]
    y = np.asarray(y.astype(jnp.float32), np.float64)
    return float(np.linalg.norm(y - reference) / np.linalg.norm(reference))


def dense_error(case: Case, arguments: tuple, reference: np.ndarray) -> float:
    """The error of XLA's dense product on the same decompressed weight."""
    matrix, x, _, _ = arguments
    x = x[:CHECKED_TOKENS].T if case.layout == "token_major" else x[:, :CHECKED_TOKENS]
    y = _dot(to_dense(matrix), x, 1, 0)
    return float(np.linalg.norm(np.asarray(y.astype(jnp.float32), np.float64) - reference) / np.linalg.norm(reference))


def key_of(case: Case) -> str:
    """A case as one word, by which a results file is resumed."""
    words = [case.suite, f"{case.m}x{case.k}x{case.n}", f"{case.sparsity:g}", f"V{case.group_size}"]
    words += [case.packed or case.counts]
    words += [case.layout, case.dtype] + ["backward"] * case.backward + ([case.epilogue] if case.epilogue else [])
    return "/".join(words)


def run(todo: list[Case], out: pathlib.Path, minutes: float, batch: int = 8) -> None:
    """Measures cases until the time is over."""
    started = time.monotonic()
    records = files.read(out)["records"]
    done = {record["case"] for record in records}
    todo = [case for case in dict.fromkeys(todo) if key_of(case) not in done]
    torch = Torch()
    with contextlib.closing(torch), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(todo), batch):
            compiled = list(pool.map(compile_case, todo[i : i + batch]))
            for case, functions in zip(todo[i : i + batch], compiled, strict=True):
                if time.monotonic() - started > minutes * 60:
                    print(f"out of time: {len(todo) - i} cases or fewer left, call again to go on")
                    return
                new = measure(case, functions, torch)
                records += new
                files.write(out, records)
                line = ", ".join(
                    f"{r['implementation']}{'/' + str(r['group_size']) if r['implementation'] == 'torch_bsr' else ''} "
                    f"{r['time_us']:.1f} ({r['speedup']:.2f})"
                    for r in new if r["time_us"]
                )  # fmt: skip
                print(f"{key_of(case)}: {line}", flush=True)


def main() -> None:
    """Command line."""
    parser = files.command_line("matmul", __doc__, minutes=7.5, again="the chosen cases of the acceptance table")
    parser.add_argument("--suite", nargs="+", help="only these suites")
    parser.add_argument("--acceptance", action="store_true", help="only the cases of the acceptance table")
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("products are measured on a GPU, and there is none here; benchmarks.cpu_matmul is for a CPU")
    todo = list(ACCEPTANCE if options.acceptance else cases())
    todo = [case for case in todo if options.suite is None or case.suite in options.suite]
    out = files.output(parser, options, "matmul")
    if options.again:
        forget(out, [case for case in todo if case in ACCEPTANCE])
    run(todo, out, options.minutes)


def forget(out: pathlib.Path, again: Sequence[Case]) -> None:
    """Drops the records of some cases from a results file, so that they are measured anew."""
    if not out.exists():
        return
    result, keys = json.loads(out.read_text()), {key_of(case) for case in again}
    result["records"] = [record for record in result["records"] if record["case"] not in keys]
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
