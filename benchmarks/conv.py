"""Side-by-side times of the row-grouped convolution on a GPU: `python -m benchmarks.conv`.

Writes `benchmarks/results/<device>/conv.json`: every distinct convolution of ResNet-50, our implementations against
XLA's dense convolution in NHWC and NCHW (1 x 1 ones as products with channels first too), and PyTorch's in
channels-last (`benchmarks.baselines`, in a subprocess); with `--model` ResNet-50 whole; `--table` makes the table of
`predict_convolution` of what is there. A case and its baselines are
measured in one call, by CUPTI kernel time, with a cold L2, on random data; the baselines of a shape once a call. A case
already in the file is skipped; the cases of the acceptance table come first; a call ends by itself after `--minutes`.

Without a GPU, `--size tiny` runs the whole program on small images, timed by the clock: a check, not a measurement.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
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
from benchmarks import resnet
from benchmarks.matmul import GROUP_SIZES, IMPLEMENTATIONS, RESULTS, XLA_ELEMENTS, Torch
from pallas_kernels import configs, conv_cost, timing, tune, windows
from pallas_kernels.conv import FROM_NATIVE, TO_NATIVE, ConvLayout
from pallas_kernels.row_grouped import to_dense
from pallas_kernels.windows import Window

SPARSITIES = (0.75, 0.5, 0.875)
BATCHES = (64, 16)
DENSE_LAYOUTS = {"NHWC": "OHWI", "NCHW": "OIHW", "CHWN": "OHWI"}  # of images, and how filters lie for them


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution of a network, with padding that keeps the image's size up to the stride."""

    channels: int
    features: int
    kernel: int
    stride: int
    image: int
    count: int = 1  # how often the network has it

    @property
    def window(self) -> Window:
        """Its geometry."""
        pads = (self.kernel // 2, self.kernel // 2)
        return windows.window(
            (self.image, self.image), self.channels, (self.kernel, self.kernel), self.stride, (pads, pads), 1
        )


# Every distinct convolution, strides in the 3 x 3 ones.
RESNET50 = (
    Layer(64, 64, 3, 1, 56, 3),
    Layer(128, 128, 3, 2, 56),
    Layer(128, 128, 3, 1, 28, 3),
    Layer(256, 256, 3, 2, 28),
    Layer(256, 256, 3, 1, 14, 5),
    Layer(512, 512, 3, 2, 14),
    Layer(512, 512, 3, 1, 7, 2),
    Layer(256, 64, 1, 1, 56, 2),
    Layer(256, 128, 1, 1, 56),
    Layer(256, 512, 1, 2, 56),
    Layer(512, 128, 1, 1, 28, 3),
    Layer(512, 256, 1, 1, 28),
    Layer(512, 1024, 1, 2, 28),
    Layer(256, 1024, 1, 1, 14, 6),
    Layer(1024, 256, 1, 1, 14, 5),
    Layer(1024, 512, 1, 1, 14),
    Layer(1024, 2048, 1, 2, 14),
    Layer(512, 2048, 1, 1, 7, 3),
    Layer(2048, 512, 1, 1, 7, 2),
    Layer(64, 64, 1, 1, 56),
    Layer(64, 256, 1, 1, 56, 4),
    Layer(128, 512, 1, 1, 28, 4),
    Layer(3, 64, 7, 2, 224),
)
TINY = (Layer(4, 32, 3, 1, 5), Layer(8, 32, 1, 2, 6))


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution and everything it is compared with."""

    suite: str
    layer: Layer
    batch: int
    sparsity: float = 0.75
    group_size: int = 64
    counts: str = "equal"
    layout: ConvLayout = "CHWN"
    dtype: str = "bfloat16"

    @property
    def shape_key(self) -> tuple:
        """What the dense baselines depend on."""
        return self.layer, self.batch, self.dtype

    @property
    def product(self) -> tuple[int, int, int]:
        """M, K and N of the product that the convolution is."""
        height, width = self.layer.window.outputs
        return self.layer.features, self.layer.window.features, height * width * self.batch


def cases(layers: Sequence[Layer] = RESNET50, suite: str = "resnet50", batches=BATCHES) -> tuple[Case, ...]:
    """All cases, those of the acceptance table first."""
    return tuple(dict.fromkeys(_cases(layers, suite, batches)))


def _cases(layers: Sequence[Layer], suite: str, batches: Sequence[int]) -> Iterator[Case]:
    first, *others = batches

    def of(batch: int = first, sparsity: float = 0.75, v: int = 64, **more) -> list[Case]:
        return [Case(suite, layer, batch, sparsity, v, **more) for layer in layers if v <= max(64, layer.features)]

    yield from of()
    for batch in others:
        yield from of(batch)
    for v in GROUP_SIZES:
        yield from of(v=v)
    for sparsity in SPARSITIES:
        yield from of(sparsity=sparsity)
    yield from of(layout="NHWC")  # what the transposes cost
    yield from of(counts="ragged")
    for batch, sparsity, v in itertools.product(batches, SPARSITIES, GROUP_SIZES):
        yield from of(batch, sparsity, v)


def operands(case: Case, implementation: str) -> tuple:
    """The prepared filters and the images of a case, in its layout."""
    m, k, _ = case.product
    filters = tune.random_matrix(m, k, case.sparsity, case.group_size, equal=case.counts == "equal", dtype=case.dtype)
    return pallas_kernels.prepare(filters, implementation, case.layer.window), images(case, case.layout)


def images(case: Case, layout: str) -> jax.Array:
    """Random images of a case."""
    size = case.layer.image
    x = jax.random.normal(jax.random.key(1), (case.layer.channels, size, size, case.batch), case.dtype)
    return x.transpose(FROM_NATIVE[layout])


def sparse_function(case: Case, implementation: str | None) -> Callable:
    """Our convolution as a function of `operands`."""
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


def dense_operands(case: Case, layout: str) -> tuple:
    """The decompressed filters of a case and its images."""
    m, k, _ = case.product
    filters = tune.random_matrix(m, k, case.sparsity, case.group_size, equal=case.counts == "equal", dtype=case.dtype)
    kernel = to_dense(filters).reshape(m, *case.layer.window.kernel, case.layer.channels)
    return kernel.transpose(0, 3, 1, 2) if layout == "NCHW" else kernel, images(case, layout)


def compile_case(case: Case, with_dense: bool) -> dict[str, Any]:
    """All functions of a case, compiled; an exception's text in place of one that cannot be."""
    m, k, n = case.product
    jobs = {}
    if with_dense:
        for layout in dense_layouts(case):
            jobs[f"dense {layout}"] = (dense_function(case, layout), dense_operands(case, layout))
    for name in IMPLEMENTATIONS:
        # Plain XLA is far behind on a GPU: the cases of the acceptance table show it.
        if name == "xla" and (case.group_size, case.sparsity, case.counts, case.layout) != (64, 0.75, "equal", "CHWN"):
            continue
        if name == "xla" and n * k * (1 - case.sparsity) * m / case.group_size > XLA_ELEMENTS:
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
    text = jax.jit(sparse_function(case, None)).lower(*operands(case, "triton")).as_text()
    compiled["default"] = next((name for name in ("mosaic_gpu", "triton") if name in text), "xla")
    return compiled


def time_us(function: Callable, argument_sets: Sequence[tuple]) -> tuple[float, int]:
    """The median time of a call and its number of kernels; by the clock, and 0 kernels, where there is no GPU."""
    if jax.default_backend() == "gpu":
        return timing.median_us(function, argument_sets)
    return timing.interleaved_us({"": lambda: function(*argument_sets[0])}, runs=3)[""], 0


def measure(case: Case, compiled: dict[str, Any], dense: list[dict], torch: Torch) -> list[dict]:
    """The records of one case; those of its dense baselines are appended to `dense` if that is empty."""
    (m, k, n), window = case.product, case.layer.window
    base: dict[str, Any] = {"op": "conv2d", **dataclasses.asdict(case), "m": m, "k": k, "n": n}
    base |= {"kernel_size": window.kernel, "strides": window.strides, "epilogue": None}
    reference = float64_image(case)
    if not dense:
        for layout in dense_layouts(case):
            found = timed(compiled[f"dense {layout}"], dense_operands(case, layout), layout, reference)
            dense.append({"pattern": "dense", "implementation": "xla", "layout": layout} | found)
        dense += torch.measure(case)
    records = [base | {"group_size": 0, "sparsity": 0.0} | record for record in dense]
    for name in IMPLEMENTATIONS:
        if name in compiled:
            pattern = "shfl_bw" if case.counts == "equal" else "vw"
            found = timed(compiled[name], operands(case, name), case.layout, reference)
            chosen = {"default": name == compiled["default"]}
            records.append(base | {"pattern": pattern, "implementation": name} | chosen | found)
    fastest = min((record for record in dense if record["time_us"]), key=lambda record: record["time_us"])
    for record in records:
        record["dense_time_us"] = fastest["time_us"]
        record["dense"] = f"{fastest['implementation']} {fastest['layout']}"
        record["speedup"] = fastest["time_us"] / record["time_us"] if record["time_us"] else None
        record["case"] = key_of(case)
    return records


def timed(function: Any, arguments: tuple, layout: str, reference: np.ndarray) -> dict[str, Any]:
    """What one compiled function gives: its time, kernels and error, or why it could not be compiled."""
    if isinstance(function, str):
        return {"time_us": None, "error": function}
    time_of_call, kernels = time_us(function, tune.copies(arguments))
    y = np.asarray(function(*arguments).transpose(TO_NATIVE[layout])[..., 0].astype(jnp.float32), np.float64)
    error = float(np.linalg.norm(y - reference) / np.linalg.norm(reference))
    return {"time_us": time_of_call, "kernels": kernels, "relative_error": error}


def float64_image(case: Case) -> np.ndarray:
    """The convolution of the first image in float64, (M, H', W')."""
    kernel, x = (np.asarray(a.astype(jnp.float32), np.float64) for a in dense_operands(case, "NHWC"))
    kernel, window = kernel.transpose(1, 2, 3, 0), case.layer.window
    padded = np.pad(x[0], [*window.padding, (0, 0)])
    height, width = window.outputs
    y = np.zeros((height, width, case.layer.features))
    for i, j in itertools.product(*map(range, window.kernel)):
        y += padded[i :: window.strides[0], j :: window.strides[1]][:height, :width] @ kernel[i, j]
    return y.transpose(2, 0, 1)


def key_of(case: Case) -> str:
    """A case as one word, by which a results file is resumed."""
    layer = case.layer
    words = [case.suite, f"{layer.kernel}x{layer.kernel}s{layer.stride}", f"{layer.channels}to{layer.features}"]
    words += [f"image{layer.image}", f"batch{case.batch}", f"{case.sparsity:g}", f"V{case.group_size}"]
    return "/".join([*words, case.counts, case.layout, case.dtype])


def run(todo: list[Case], out: pathlib.Path, minutes: float, ahead: int = 8) -> None:
    """Measures cases until the time is over."""
    started = time.monotonic()
    result: dict[str, Any] = {"device": out.parent.name, "jax": jax.__version__, "records": []}
    if out.exists():
        result["records"] = json.loads(out.read_text())["records"]
    done = {record["case"] for record in result["records"]}
    todo = [case for case in todo if key_of(case) not in done]
    torch, dense = Torch(), collections.defaultdict(list)
    with contextlib.closing(torch), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(todo), ahead):
            # All are compiled before the first is timed: CUPTI sees the compiler's own trials too.
            some = todo[i : i + ahead]
            shapes = [case.shape_key for case in some]
            first = [not dense[shape] and shape not in shapes[:j] for j, shape in enumerate(shapes)]
            compiled = list(pool.map(compile_case, some, first))
            for case, functions in zip(some, compiled, strict=True):
                if time.monotonic() - started > minutes * 60:
                    print(f"out of time: {len(todo) - i} cases or fewer left, call again to go on")
                    return
                records = measure(case, functions, dense[case.shape_key], torch)
                result["records"] += records
                result["date"] = str(datetime.date.today())
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=1) + "\n")
                timings = (
                    f"{r['implementation']}{'/' + r['layout'] if r['pattern'] == 'dense' else '*' * r['default']} "
                    f"{r['time_us']:.1f} ({r['speedup']:.2f})"
                    for r in records
                    if r["time_us"]
                )
                print(f"{key_of(case)}: {', '.join(timings)}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conv", description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--acceptance", action="store_true", help="only the cases of the acceptance table")
    parser.add_argument("--model", action="store_true", help="only ResNet-50 whole, measured anew")
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, write the table of the results for `predict_convolution`"
    )
    parser.add_argument("--size", choices=("resnet50", "tiny"), default="resnet50")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    if options.table:
        write_table(options.out or RESULTS / "nvidia-h200" / "conv.json")
        return
    tiny = options.size == "tiny"
    layers, batches = (TINY, (8, 2)) if tiny else (RESNET50, BATCHES)
    if not tiny and jax.default_backend() != "gpu":
        parser.error("ResNet-50 is measured on a GPU, and there is none here; --size tiny only checks the program")
    todo = list(cases(layers, options.size, batches))
    todo = todo[: len(layers)] if options.acceptance else todo
    device = configs.device_name(jax.devices()[0].device_kind)
    out = options.out or RESULTS / device / ("conv_tiny.json" if tiny else "conv.json")
    if options.model:
        run_models(out, {"batches": (2,), "image": 24, "stages": (1,), "width": 8, "classes": 5} if tiny else {})
    else:
        run(todo, out, options.minutes)


def write_table(results: pathlib.Path) -> None:
    """Writes the table of `pallas_kernels.conv_cost`."""
    entries, path = [], conv_cost.FOLDER / f"{results.parent.name}.json"
    for r in json.loads(results.read_text())["records"]:
        if r["op"] == "conv2d" and r.get("default") and r["layout"] == "CHWN" and r["time_us"]:
            slots = -(-r["m"] // r["group_size"]) * round(r["k"] * (1 - r["sparsity"]))
            entry = {key: r[key] for key in ("m", "k", "n", "group_size", "dtype", "time_us", "dense_time_us")}
            entries.append({"taps": r["kernel_size"][0] * r["kernel_size"][1], "slots": slots} | entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"entries": entries}, indent=1) + "\n")


def run_models(out: pathlib.Path, size: dict[str, Any]) -> None:
    """Measures ResNet-50 whole, and puts its records in place of those the file has."""
    result: dict[str, Any] = {"device": out.parent.name, "jax": jax.__version__, "records": []}
    for batch in size.pop("batches", BATCHES):
        new = resnet.measure(batch, 0.75, 64, time_us, **size)
        if out.exists():
            result = json.loads(out.read_text())
        result["records"] = [r for r in result["records"] if r["case"] != new[0]["case"]] + new
        result["date"] = str(datetime.date.today())
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        for r in new:
            print(
                f"{r['case']} {r['form']}: {r['time_us']:.0f} us in {r['kernels']} kernels "
                f"({r['speedup']:.2f}), {r['call_us']:.0f} us a call",
                flush=True,
            )


if __name__ == "__main__":
    main()
