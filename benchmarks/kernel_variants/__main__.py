"""The study behind `pallas_kernels.triton`: what each choice in the kernels costs, one knob at a time.

`python -m benchmarks.kernel_variants STUDY --out FILE` compiles all variants of a study in parallel, checks each
against a float64 reference and writes kernel times (CUPTI, cold L2, medians). docs/kernels.md tells what came of it.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_variants.cases import Case, Variant, arrays, arrays_shape, check, reference
from benchmarks.kernel_variants.forward import forward, token_major, vector
from benchmarks.kernel_variants.grad import grad_input, grad_input_decompress, grad_input_xla, grad_values
from benchmarks.kernel_variants.studies import studies
from pallas_kernels import timing


def call(case: Case, variant: Variant):
    """The function of a variant and the names of its operands."""
    if variant.op == "forward":
        values = "values" if variant.values == "pv" else "values_vk"
        return functools.partial(forward, case, variant), (
            values, "columns", "group_ptr", "rows", "x_tiles" if variant.x == "tiles" else "x")  # fmt: skip
    if variant.op == "vector":
        return functools.partial(vector, case, variant), ("values", "columns", "group_ptr", "rows", "x")
    if variant.op == "token_major":
        return functools.partial(token_major, case, variant), ("values", "columns", "group_ptr", "rows", "x_tokens")
    if variant.op == "grad_values":
        return functools.partial(grad_values, case, variant), ("columns", "rows", "x", "dy")
    if variant.op == "dense":
        return functools.partial(dense_product, variant), ("dense", "x")
    function = {
        "grad_input": grad_input,
        "grad_input_xla": grad_input_xla,
        "grad_input_decompress": grad_input_decompress,
    }[variant.op]
    return functools.partial(function, case, variant), ("values", "columns", "rows", "dy")


def dense_product(variant, w, x):
    """XLA's dense product, feature-major or (store='token_major') token-major."""
    if variant.store == "rows":
        return jax.lax.dot(w, x, preferred_element_type=jnp.float32).astype(x.dtype)
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x.reshape(x.shape[::-1]), w, contract, preferred_element_type=jnp.float32).astype(
        x.dtype
    )


def label(variant: Variant) -> str:
    """The knobs that differ from the plain kernel's."""
    default = dataclasses.asdict(Variant())
    return " ".join(f"{k}={v}" for k, v in dataclasses.asdict(variant).items() if v != default[k]) or "plain"


def run(names: list[str], out: pathlib.Path, minutes: float) -> None:
    """Measures the named studies and writes the results file."""
    started = time.monotonic()
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    result = {"device": device, "jax": jax.__version__, "date": str(datetime.date.today()), "records": []}
    if out.exists():
        result["records"] = json.loads(out.read_text())["records"]
    done = {json.dumps([r["study"], r["m"], r["k"], r["n"], r["sparsity"], r["group_size"], r["variant"]])
            for r in result["records"]}  # fmt: skip
    jobs = [
        (name, case, variant)
        for name in names
        for case, variants in studies()[name]
        for variant in dict.fromkeys(variants)
    ]
    jobs = [(n, c, v) for n, c, v in jobs
            if json.dumps([n, c.m, c.k, c.n, c.sparsity, c.group_size, dataclasses.asdict(v)]) not in done]  # fmt: skip

    operand_sets: dict[Case, list] = {}
    wants: dict[str, np.ndarray] = {}
    shapes: dict[Case, dict] = {}

    def operands(case):
        if case not in operand_sets:
            one = arrays(case, 0, 1)[0]
            n_sets = max(2, min(16, -(-timing.L2_BYTES // (one["values"].nbytes + one["x"].nbytes))))
            sets = arrays(case, 0, n_sets)
            for i, s in enumerate(sets):
                if i < 6:
                    s["dense"] = jax.random.normal(jax.random.key(i), (case.m, case.k), jnp.bfloat16)
            operand_sets.clear()
            operand_sets[case] = sets
            wants.clear()
        return operand_sets[case]

    for _, case, _ in jobs:
        if case not in shapes:
            shapes[case] = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays_shape(case).items()}

    def build(job):
        _, case, variant = job
        function, names_ = call(case, variant)
        try:
            return jax.jit(function).lower(*(shapes[case][n] for n in names_)).compile()
        except Exception as error:
            return repr(error)[:200]

    pool = concurrent.futures.ThreadPoolExecutor(16)
    futures = [pool.submit(build, job) for job in jobs]
    # CUPTI sees every kernel of the process, XLA's autotuning too: compile all before measuring any.
    builds = [(job, future.result()) for job, future in zip(jobs, futures, strict=True)]
    print(f"compiled {len(jobs)} variants in {time.monotonic() - started:.0f} s", flush=True)
    dense_time: dict[Case, float] = {}
    for (name, case, variant), compiled in builds:
        if time.monotonic() - started > minutes * 60:
            print("out of time", file=sys.stderr)
            break
        record: dict[str, Any] = {"study": name, "m": case.m, "k": case.k, "n": case.n, "dtype": "bfloat16"}
        record |= {"sparsity": case.sparsity, "group_size": case.group_size, "counts": "equal"}
        record["variant"] = dataclasses.asdict(variant)
        record["label"] = label(variant)
        record["op"] = "matmul_grad" if variant.op.startswith("grad") else "matmul"
        record["pattern"] = "dense" if variant.op == "dense" else "shfl_bw"
        record["implementation"] = "xla" if variant.op in ("dense", "grad_input_xla") else "triton"
        if isinstance(compiled, str):
            record["error"] = compiled
        else:
            sets = operands(case)
            _, names_ = call(case, variant)
            try:
                used = [s for s in sets if all(n in s for n in names_)]
                if variant.op != "dense":
                    kind = variant.op if variant.op == "grad_values" else "forward"
                    kind = "grad_input" if variant.op.startswith("grad_input") else kind
                    if kind not in wants:
                        wants[kind] = reference(case, sets[0], kind)
                    got = compiled(*(sets[0][n] for n in names_))
                    record["relative_error"] = check(case, variant, got, wants[kind])
                calls = timing.kernel_times(compiled, [tuple(s[n] for n in names_) for s in used])
                time_us = statistics.median(sum(times) for times in calls)
                record |= {"time_us": time_us, "kernels": len(calls[0])}
                if len(calls[0]) > 1:
                    record["kernel_times_us"] = [statistics.median(k) for k in zip(*calls, strict=True)]
                if variant.op == "dense":
                    dense_time[case] = min(time_us, dense_time.get(case, np.inf))
                record["dense_time_us"] = dense_time.get(case)
                record["speedup"] = dense_time[case] / time_us if case in dense_time else None
            except Exception as error:
                record["error"] = repr(error)[:200]
        result["records"].append(record)
        knobs = record["label"]
        print(f"{name} {case.m}x{case.k}x{case.n} V{case.group_size}: {record.get('time_us', 0):8.2f} us "
              f"x{record.get('speedup') or 0:.2f} err {record.get('relative_error', 0):.1e} k{record.get('kernels')} "
              f"{knobs} {record.get('error', '')}", flush=True)  # fmt: skip
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_variants", description=__doc__)
    parser.add_argument("studies", nargs="+", choices=list(studies()))
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    run(options.studies, options.out, options.minutes)


if __name__ == "__main__":
    main()
