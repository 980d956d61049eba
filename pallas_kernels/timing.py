"""Times: of kernels on a GPU by CUPTI, over rotating inputs so that the L2 cache is cold, and of whole calls."""

import contextlib
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.mosaic.gpu import profiler

__all__ = ["alone", "interleaved_us", "kernel_times", "locked", "median_us", "num_sets", "queued_us"]

L2_BYTES = 2 * 64 * 2**20  # inputs are rotated over more bytes than this, twice the largest L2 cache


def alone(gpu: str | None = None, *, shared: bool = False) -> contextlib.AbstractContextManager[None]:
    """Keeps a GPU from other processes that measure; they may prepare and compile meanwhile.

    Args:
        gpu: its name in CUDA_VISIBLE_DEVICES; None is the first one that this process sees.
        shared: with others that share it, for what would disturb measurements and is none.
    """
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if gpu is None else gpu
    return locked(f"gpu-{gpu}", shared=shared)


@contextlib.contextmanager
def locked(name: str, *, shared: bool = False) -> Iterator[None]:
    """Keeps other processes of this machine from something with a name."""
    import fcntl  # not on Windows, where this module is imported too

    with (pathlib.Path(tempfile.gettempdir()) / f"shfl-jax-{name.replace('/', '-')}.lock").open("w") as file:
        # Until the file is closed, which it is too when the process ends.
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


class _Rotating:
    """Calls a compiled function with the next set of arguments each time.

    It has the methods of `jax.stages.Wrapped`, so that `measure` takes it for a compiled function and does not jit it.
    """

    def __init__(self, function: Callable[..., Any], argument_sets: Sequence[tuple[Any, ...]]) -> None:
        self.function, self.argument_sets, self.calls = function, argument_sets, 0

    def __call__(self) -> Any:
        arguments = self.argument_sets[self.calls % len(self.argument_sets)]
        self.calls += 1
        return self.function(*arguments)

    def trace(self, *args: Any) -> Any:
        return self.function

    lower = eval_shape = trace


def num_sets(arguments: object, most: int = 24) -> int:
    """How many copies of the arguments it takes to fill the L2 cache twice: 2 to `most`."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arguments))
    return max(2, min(most, -(-L2_BYTES // max(size, 1))))


def kernel_times(
    function: Callable[..., Any], argument_sets: Sequence[tuple[Any, ...]], iterations: int = 20
) -> list[list[float]]:
    """Times every kernel of every call.

    Args:
        function: a compiled function (`jax.jit(f).lower(*args).compile()`).
        argument_sets: the arguments of one call each; calls go through them in turn.
        iterations: number of calls.

    Returns:
        One list per call: the times of its kernels, in microseconds.
    """
    rotating = _Rotating(function, argument_sets)
    _, timings = profiler.measure(rotating, aggregate=False, iterations=iterations)()
    if timings is None:
        raise RuntimeError("no kernel was launched")
    calls: list[Any] = [timings] if iterations == 1 else list(timings)
    return [[milliseconds * 1e3 for _, milliseconds in call] for call in calls]


def median_us(
    function: Callable[..., Any], argument_sets: Sequence[tuple[Any, ...]], iterations: int = 20
) -> tuple[float, int]:
    """Median over the calls of the sum of a call's kernel times in microseconds, and the number of kernels."""
    calls = kernel_times(function, argument_sets, iterations)
    return statistics.median(sum(call) for call in calls), len(calls[0])


def interleaved_us(functions: Mapping[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """Median wall-clock times of calls in microseconds; the functions take turns, so that a busy machine slows all."""
    times: dict[str, list[float]] = {label: [] for label in functions}
    for i in range(runs + 2):  # the first two turns warm up
        for label, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if i >= 2:
                times[label].append(1e6 * (time.perf_counter() - start))
    return {label: statistics.median(values) for label, values in times.items()}


def queued_us(function: Callable[[], Any], runs: int) -> float:
    """The wall-clock time of a call in microseconds where calls follow each other and nobody waits for their results.

    The median of five rows of `runs` calls. The host prepares a call while the device works on those before.
    """
    times = []
    for i in range(6):
        start = time.perf_counter()
        jax.block_until_ready([function() for _ in range(runs)])
        if i:  # the first row warms up
            times.append(1e6 * (time.perf_counter() - start) / runs)
    return statistics.median(times)
