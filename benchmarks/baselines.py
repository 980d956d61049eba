"""PyTorch's products and convolutions, in a subprocess: two libraries do not share a GPU's profiler or memory.

Reads cases as JSON lines from its input and writes a JSON line of records for each. For {"m", "k", "n", "dtype",
"sparsity", "backward"} of `benchmarks.matmul`: cuBLAS, cuSPARSELt 2:4 (at 50%, best of its algorithms) and block-sparse
rows, blocks 128 and 64 wide. For {"layer", "batch", "dtype"} of `benchmarks.conv`: cuDNN in channels-last.
Times are CUPTI kernel times in microseconds, medians, over operands rotated so that the L2 cache is cold.
"""

import contextlib
import functools
import json
import statistics
import sys
import warnings
from collections.abc import Callable

import torch  # pyrefly: ignore[missing-import]

L2_BYTES = 2 * 64 * 2**20
ITERATIONS = 20


def kernel_time(function: Callable, sets: list[tuple]) -> float:
    """Median over calls of the time of all kernels of a call, in microseconds."""
    for arguments in sets[:2]:
        function(*arguments)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    times = []
    with torch.profiler.profile(activities=activities) as profile:
        for i in range(ITERATIONS):
            function(*sets[i % len(sets)])
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted((e for e in events if not e.name.startswith("Mem")), key=lambda e: e.time_range.start)
    per_call = len(events) // ITERATIONS
    if per_call == 0 or len(events) % ITERATIONS:
        raise RuntimeError(f"{len(events)} kernels in {ITERATIONS} calls")
    for i in range(ITERATIONS):
        times.append(sum(e.time_range.elapsed_us() for e in events[i * per_call : (i + 1) * per_call]))
    return statistics.median(times)


def rotate(*arguments: torch.Tensor) -> list[tuple]:
    """Copies of the arguments that together fill the L2 cache twice."""
    size = sum(a.values().numel() * a.element_size() if a.layout == torch.sparse_bsr else a.numel() * a.element_size()
               for a in arguments if isinstance(a, torch.Tensor))  # fmt: skip
    copies = max(2, min(24, -(-L2_BYTES // max(size, 1))))
    return [arguments] + [tuple(a.clone() for a in arguments) for _ in range(copies - 1)]


def block_sparse(weight: torch.Tensor, block: int, sparsity: float) -> torch.Tensor:
    """The weight with a random equal share of blocks kept in every row of blocks, as block-sparse rows."""
    m, k = weight.shape
    kept = max(1, round(k // block * (1 - sparsity)))
    order = torch.rand(m // block, k // block, device="cuda").argsort(1) < kept
    mask = order.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (weight * mask).to_sparse_bsr((block, block))


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The weight with two of every four inputs zeroed."""
    groups = weight.reshape(-1, 4)
    kept = groups.abs().argsort(1).argsort(1) >= 2
    return (groups * kept).reshape(weight.shape)


def measure_convolution(case: dict) -> list[dict]:
    """The records of one convolution."""
    dtype, layer = getattr(torch, case["dtype"]), case["layer"]
    torch.backends.cudnn.benchmark = True
    kernel = (layer["features"], layer["channels"], layer["kernel"], layer["kernel"])
    image = (case["batch"], layer["channels"], layer["image"], layer["image"])
    arguments = [
        torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        for shape in (image, kernel)
    ]
    step = functools.partial(torch.nn.functional.conv2d, stride=layer["stride"], padding=layer["kernel"] // 2)
    time_us = kernel_time(step, rotate(*arguments))
    return [{"implementation": "torch_cudnn", "pattern": "dense", "layout": "NHWC", "time_us": time_us}]


def measure(case: dict) -> list[dict]:
    """The records of one case; an empty one has none."""
    if not case:
        return []
    if "layer" in case:
        return measure_convolution(case)
    dtype = getattr(torch, case["dtype"])
    m, k, n = case["m"], case["k"], case["n"]
    weight, x = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, k, device="cuda", dtype=dtype)
    records = []

    def add(implementation, pattern, time_us, **more):
        records.append({"implementation": implementation, "pattern": pattern, "time_us": time_us, **more})

    if case["backward"]:
        dy = torch.randn(n, m, device="cuda", dtype=dtype)
        step = lambda x, w, dy: (torch.nn.functional.linear(x, w), dy @ w, dy.T @ x)  # noqa: E731
        add("torch_cublas", "dense", kernel_time(step, rotate(x, weight, dy)))
        return records
    add("torch_cublas", "dense", kernel_time(torch.nn.functional.linear, rotate(x, weight)))
    failures = (RuntimeError, NotImplementedError, AttributeError, ValueError)
    if case["sparsity"] == 0.5 and m % 32 == 0 and k % 64 == 0 and n % 16 == 0:
        try:
            compressed = torch._cslt_compress(two_of_four(weight))
            found = torch._cslt_sparse_mm_search(compressed, x.T)
            best = found if isinstance(found, int) else found[0]
            run = lambda c, xt: torch._cslt_sparse_mm(c, xt.T, alg_id=best)  # noqa: E731
            add("cusparselt", "nm", kernel_time(run, rotate(compressed, x)), algorithm=best)
        except failures as error:
            add("cusparselt", "nm", None, error=str(error)[:200])
    for block in (128, 64):
        if m % block or k % block or n % 16:
            continue
        try:
            sparse = block_sparse(weight, block, case["sparsity"])
            run = lambda x, w: torch.nn.functional.linear(x, w)  # noqa: E731
            add("torch_bsr", "bw", kernel_time(run, [(x.clone(), sparse) for _ in range(2)] if n < 64 else
                                               [(x, sparse), *((x.clone(), sparse) for _ in range(5))]),
                group_size=block)  # fmt: skip
        except failures as error:
            add("torch_bsr", "bw", None, group_size=block, error=str(error)[:200])
    return records


def main() -> None:
    """Serves cases from standard input until it ends."""
    warnings.simplefilter("ignore")
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            with torch.no_grad():
                answer = measure(json.loads(line))
            torch.cuda.empty_cache()
            print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
