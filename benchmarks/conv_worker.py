"""The measuring half of `benchmarks.conv`: a process that answers questions as JSON lines (`benchmarks.workers`).

What a question needs is made and compiled without the GPU, beside other workers; the GPU is held where something runs
on it, which is also where XLA compiles products and convolutions of its own: it tries its kernels.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's products would take every core for each worker

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks import resnet, workers
from benchmarks.conv import BATCHES, Case, Layer, key_of
from benchmarks.matmul import IMPLEMENTATIONS, XLA_ELEMENTS
from benchmarks.workers import holding_gpu, on_host
from pallas_kernels import RowGrouped, timing, to_dense, tune
from pallas_kernels._conv import FROM_NATIVE, TO_NATIVE

DENSE_LAYOUTS = {"NHWC": "OHWI", "NCHW": "OIHW", "CHWN": "OHWI"}  # of images, and how filters lie for them


class Operands(NamedTuple):
    """What a case is made of, on the host."""

    filters: RowGrouped  # canonical
    images: np.ndarray  # (C, H, W, B)


class Compiled(NamedTuple):
    """A compiled function, or why it could not be, and its arguments on the host."""

    function: jax.stages.Compiled | str
    arguments: tuple


def operands(case: Case) -> Operands:
    """Random filters and images; call it where the default device is the host."""
    m, k, _ = case.product
    filters = tune.random_matrix(m, k, case.sparsity, case.group_size, equal=case.counts == "equal", dtype=case.dtype)
    shape = (case.layer.channels, case.layer.image, case.layer.image, case.batch)
    return Operands(filters, np.random.default_rng(1).standard_normal(shape, np.float32).astype(jnp.dtype(case.dtype)))


def sparse_function(case: Case, implementation: str | None) -> Callable:
    """Our convolution as a function of prepared filters and images in the case's layout."""
    window = case.layer.window

    def forward(filters, x):
        return pallas_kernels.conv2d(
            filters, x, kernel_size=window.kernel, strides=window.strides, padding=window.padding,
            layout=case.layout, implementation=implementation,
        )  # fmt: skip

    return forward


def dense_layouts(case: Case) -> tuple[str, ...]:
    """The layouts a dense convolution is measured in; with channels first XLA is fast where it is a product."""
    return ("NHWC", "NCHW", "CHWN") if case.layer.kernel == 1 else ("NHWC", "NCHW")


def dense_function(case: Case, layout: str) -> Callable:
    """XLA's dense convolution as a function of (kernel, x), in the layout's own arrangement of both."""
    window = case.layer.window

    def forward(kernel, x):
        if layout == "CHWN":
            return jnp.tensordot(kernel[:, 0, 0], x[:, :: window.strides[0], :: window.strides[1]], 1)
        return jax.lax.conv_general_dilated(
            x, kernel, window.strides, window.padding, dimension_numbers=(layout, DENSE_LAYOUTS[layout], layout)
        )

    return forward


def arranged(images: np.ndarray, layout: str) -> np.ndarray:
    """Images in a layout."""
    return np.ascontiguousarray(images.transpose(FROM_NATIVE[layout]))


def dense_kernel(case: Case, filters: RowGrouped) -> np.ndarray:
    """The decompressed filters (M, kh, kw, C)."""
    return np.asarray(jax.jit(to_dense)(filters)).reshape(-1, *case.layer.window.kernel, case.layer.channels)


def lower(function: Callable, arguments: tuple) -> jax.stages.Lowered:
    """A function lowered for arguments that stay where they are."""
    return jax.jit(function).lower(*jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments))


def build(lowered: jax.stages.Lowered, arguments: tuple) -> Compiled:
    """Compiles."""
    try:
        return Compiled(lowered.compile(), arguments)
    except jax.errors.JaxRuntimeError as error:
        return Compiled(str(error)[:200], arguments)


def dense_records(case: Case) -> list[dict[str, Any]]:
    """XLA's dense convolution of a case in all of its layouts."""
    with on_host():
        filters, images = operands(case)
        kernel = dense_kernel(case, filters)
    reference = float64_image(case, kernel, images)
    jobs = {}
    for layout in dense_layouts(case):
        lying = np.ascontiguousarray(kernel.transpose(0, 3, 1, 2)) if layout == "NCHW" else kernel
        jobs[layout] = lying, arranged(images, layout)
    lowered = {layout: lower(dense_function(case, layout), arguments) for layout, arguments in jobs.items()}
    with holding_gpu():
        compiled = {layout: build(lowered[layout], arguments) for layout, arguments in jobs.items()}
        return [
            {"pattern": "dense", "implementation": "xla", "layout": layout} | timed(found, layout, reference)
            for layout, found in compiled.items()
        ]


def sparse_records(case: Case) -> list[dict[str, Any]]:
    """Our implementations of a case, the one that is the default marked."""
    with on_host():
        filters, images = operands(case)
        x, window = arranged(images, case.layout), case.layer.window
        reference = float64_image(case, dense_kernel(case, filters), images)
        arguments = pallas_kernels.prepare(filters, None, window), x
    lowered = lower(sparse_function(case, None), arguments)
    text = lowered.as_text()
    default = next((name for name in ("mosaic_gpu", "triton") if name in text), "xla")
    jobs = {default: (lowered, arguments)}
    for name in IMPLEMENTATIONS:
        if name in jobs or (name == "xla" and not shows_xla(case)):
            continue
        with contextlib.suppress(NotImplementedError):
            with on_host():
                arguments = pallas_kernels.prepare(filters, name, window), x
            jobs[name] = lower(sparse_function(case, name), arguments), arguments
    compiled = {name: build(*job) for name, job in jobs.items() if name != "xla"}
    pattern = "shfl_bw" if case.counts == "equal" else "vw"
    with holding_gpu():
        if "xla" in jobs:
            compiled["xla"] = build(*jobs["xla"])
        return [
            {"pattern": pattern, "implementation": name, "default": name == default}
            | timed(compiled[name], case.layout, reference)
            for name in IMPLEMENTATIONS
            if name in compiled
        ]


def shows_xla(case: Case) -> bool:
    """Whether plain XLA is measured beside the others: it is far behind, as the cases of the acceptance table show."""
    m, k, n = case.product
    small = n * k * (1 - case.sparsity) * m / case.group_size <= XLA_ELEMENTS
    shown = case.batch, case.sparsity, case.group_size, case.counts, case.layout
    return small and shown == (BATCHES[0], 0.75, 64, "equal", "CHWN")


def timed(compiled: Compiled, layout: str, reference: np.ndarray) -> dict[str, Any]:
    """What one compiled function gives: its time, kernels and error, or why it could not be compiled."""
    if isinstance(compiled.function, str):
        return {"time_us": None, "error": compiled.function}
    copies = range(timing.num_sets(compiled.arguments))
    sets = [jax.device_put(compiled.arguments, jax.devices()[0]) for _ in copies]
    time_of_call, kernels = time_us(compiled.function, sets)
    y = np.asarray(compiled.function(*sets[0])).transpose(TO_NATIVE[layout])[..., 0].astype(np.float64)
    error = float(np.linalg.norm(y - reference) / np.linalg.norm(reference))
    return {"time_us": time_of_call, "kernels": kernels, "relative_error": error}


def time_us(function: Callable, argument_sets: Sequence[tuple]) -> tuple[float, int]:
    """The median time of a call and its number of kernels; by the clock, and 0 kernels, where there is no GPU."""
    if jax.default_backend() == "gpu":
        return timing.median_us(function, argument_sets)
    return timing.interleaved_us({"": lambda: function(*argument_sets[0])}, runs=3)[""], 0


def float64_image(case: Case, kernel: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The convolution of the first image in float64, (M, H', W')."""
    kernel, window = kernel.transpose(1, 2, 3, 0).astype(np.float64), case.layer.window
    image = images[..., 0].transpose(1, 2, 0).astype(np.float64)
    padded = np.pad(image, [*window.padding, (0, 0)])
    height, width = window.outputs
    y = np.zeros((height, width, case.layer.features))
    for i, j in itertools.product(*map(range, window.kernel)):
        y += padded[i :: window.strides[0], j :: window.strides[1]][:height, :width] @ kernel[i, j]
    return y.transpose(2, 0, 1)


def answer(question: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records asked for."""
    started, held_s = time.monotonic(), workers.held_s
    if question["kind"] == "model":
        key = resnet.model_key(question["batch"])
        records = resnet.measure(question["batch"], time_us=time_us, **question["size"])
    else:
        # Calls of the whole network are timed by the clock too: what is made beside them comes second.
        os.setpriority(os.PRIO_PROCESS, 0, 10)
        case = question["case"]
        case = Case(**case | {"layer": Layer(**case["layer"])})
        key = key_of(case)
        records = {"dense": dense_records, "sparse": sparse_records}[question["kind"]](case)
    seconds, held_s = time.monotonic() - started, workers.held_s - held_s
    print(f"  {question['kind']} {key}: {seconds:.1f} s, {held_s:.1f} s with the GPU", flush=True)
    return records


if __name__ == "__main__":
    workers.serve(answer)
