"""Side-by-side times of the row-grouped convolution on GPUs: `python -m benchmarks.conv`.

Writes `benchmarks/results/<device>/conv.json`: every distinct convolution of ResNet-50, our implementations against
XLA's dense convolution in NHWC and NCHW (1 x 1 ones as products with channels first too), and PyTorch's in
channels-last (`benchmarks.baselines`); ResNet-50 whole (`benchmarks.resnet`); and what follows from these, a summary
for every batch, sparsity and V and the cost of transposing images. Times are CUPTI kernel times with a cold L2, on
random data. `--table` makes the table of `predict_convolution` of what is there.

The cases of a shape and its baselines are measured in one call on one GPU; all visible GPUs share the shapes. Each has
processes that prepare and compile (`benchmarks.conv_worker`) while one of them measures. A case already in the file is
skipped unless `--again` is given; the network and the cases of the acceptance table come first; a call ends by itself
after `--minutes`.

Without a GPU, `--size tiny` runs the whole program on small images, timed by the clock: a check, not a measurement.
"""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share a GPU's memory

import jax

from benchmarks import records as files
from benchmarks import resnet, workers
from benchmarks.matmul import BASELINES, GROUP_SIZES
from pallas_kernels import _tables as tables
from pallas_kernels import _window as windows
from pallas_kernels._conv import ConvLayout
from pallas_kernels._window import Window

SPARSITIES = (0.75, 0.5, 0.875)
BATCHES = (64, 16)
TINY_MODEL = {"image": 24, "stages": (1,), "width": 8, "classes": 5}
SLOW = 0.97  # a speed-up below which a layer counts as slower than the dense one
WORKERS = 16  # processes on a GPU, at most
MODEL_LOAD = 30  # what the whole network takes of a GPU's time, in cases
SAVE_S = 5.0  # seconds between two writings of the results file


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


def key_of(case: Case) -> str:
    """A case as one word, by which a results file is resumed."""
    layer = case.layer
    words = [case.suite, f"{layer.kernel}x{layer.kernel}s{layer.stride}", f"{layer.channels}to{layer.features}"]
    words += [f"image{layer.image}", f"batch{case.batch}", f"{case.sparsity:g}", f"V{case.group_size}"]
    return "/".join([*words, case.counts, case.layout, case.dtype])


def spread(todo: Sequence[Case], models: Sequence[int], gpus: Sequence[str]) -> dict[str, list[tuple[str, Any]]]:
    """Shares among GPUs what is to be measured, in its order; the cases of a shape stay together.

    Args:
        todo: cases.
        models: batches of the whole network, which comes first.
        gpus: names.

    Returns:
        {name: [("model", batch), ("dense", the first case of a shape) or ("sparse", case), ...]}.
    """
    found: dict[str, list[tuple[str, Any]]] = {gpu: [] for gpu in gpus}
    load = dict.fromkeys(gpus, 0)

    def least_loaded(more: int) -> str:
        gpu = min(load, key=lambda gpu: load[gpu])
        load[gpu] += more
        return gpu

    for batch in models:
        found[least_loaded(MODEL_LOAD)].append(("model", batch))
    shapes = collections.Counter(case.shape_key for case in todo)
    home = {shape: least_loaded(count) for shape, count in shapes.items()}
    for case in todo:
        kinds = ("dense", "sparse") if shapes.pop(case.shape_key, 0) else ("sparse",)
        found[home[case.shape_key]] += [(kind, case) for kind in kinds]
    return found


class Results:
    """A results file, and what was measured of cases that are not complete yet."""

    def __init__(self, out: pathlib.Path, forgotten: Container[str], kinds: Sequence[str]):
        """Reads the file.

        Args:
            out: the file.
            forgotten: cases whose records are dropped.
            kinds: of the dense measurements that a case needs.
        """
        # What follows from other records has no case of its own.
        self.records = [r for r in files.read(out)["records"] if "case" in r and r["case"] not in forgotten]
        self.out, self.kinds, self.saved = out, kinds, 0.0
        self.dense: dict[tuple, dict[str, list[dict]]] = collections.defaultdict(dict)
        self.sparse: dict[Case, list[dict]] = {}

    def add(self, kind: str, of: Any, records: list[dict]) -> list[dict]:
        """Takes what was measured and returns the records of what is complete with it."""
        new = []
        if kind == "model":
            new += records
        elif kind == "sparse":
            self.sparse[of] = records
        else:
            self.dense[of.shape_key][kind] = records
        for case in list(self.sparse):
            dense = self.dense[case.shape_key]
            if all(kind in dense for kind in self.kinds):
                new += with_dense(case, [r for kind in self.kinds for r in dense[kind]], self.sparse.pop(case))
        self.records += new
        return new

    def save(self, order: Mapping[str, int]) -> None:
        """Writes the file: records in an order of cases, then what follows from them."""
        records = sorted(self.records, key=lambda r: order.get(r["case"], len(order)))
        files.write(self.out, [*records, *summaries(records), *transposes(records)])
        self.saved = time.monotonic()


def with_dense(case: Case, dense: Sequence[dict], sparse: Sequence[dict]) -> list[dict[str, Any]]:
    """The records of a case and of the dense convolutions of its shape, compared."""
    (m, k, n), window = case.product, case.layer.window
    base: dict[str, Any] = {"op": "conv2d", **dataclasses.asdict(case), "m": m, "k": k, "n": n}
    base |= {"kernel_size": window.kernel, "strides": window.strides, "epilogue": None}
    records = [base | {"group_size": 0, "sparsity": 0.0} | record for record in dense]
    records += [base | record for record in sparse]
    fastest = min((record for record in dense if record["time_us"]), key=lambda record: record["time_us"])
    for record in records:
        record["dense_time_us"] = fastest["time_us"]
        record["dense"] = f"{fastest['implementation']} {fastest['layout']}"
        record["speedup"] = fastest["time_us"] / record["time_us"] if record["time_us"] else None
        record["case"] = key_of(case)
    return records


def defaults(records: Iterable[dict], layout: str) -> list[dict]:
    """The records of the default implementation with equal counts, of images in one layout."""
    wanted = {"op": "conv2d", "default": True, "counts": "equal", "layout": layout}
    return [r for r in records if wanted.items() <= r.items() and r["time_us"]]


def summaries(records: Iterable[dict]) -> list[dict[str, Any]]:
    """For every batch, sparsity and V geometric means of the default's speed-ups, and the share of slow layers."""
    groups = collections.defaultdict(list)
    for r in defaults(records, "CHWN"):
        groups[r["batch"], r["sparsity"], r["group_size"]].append((r["layer"], r["speedup"]))
    found = []
    for (batch, sparsity, v), some in sorted(groups.items()):
        threes = [speedup for layer, speedup in some if layer["kernel"] == 3]
        ones = [speedup for layer, speedup in some if layer["kernel"] == 1 and layer["channels"] >= 256]
        if threes and ones:
            record = {"op": "conv2d_summary", "batch": batch, "sparsity": sparsity, "group_size": v}
            record |= {"layers": len(some), "slow_share": sum(speedup < SLOW for _, speedup in some) / len(some)}
            means = {"speedup_3x3": statistics.geometric_mean(threes), "speedup_1x1": statistics.geometric_mean(ones)}
            found.append(record | means)
    return found


def transposes(records: Sequence[dict]) -> list[dict[str, Any]]:
    """For every kernel size and stride the times of all layers measured in NHWC too, and how much longer it takes."""
    native = {r["case"]: r["time_us"] for r in defaults(records, "CHWN")}
    groups = collections.defaultdict(list)
    for r in defaults(records, "NHWC"):
        if time_us := native.get(r["case"].replace("/NHWC/", "/CHWN/")):
            sizes = r["layer"]["kernel"], r["layer"]["stride"]
            groups[r["batch"], r["sparsity"], r["group_size"], *sizes].append((time_us, r["time_us"], r["speedup"]))
    found = []
    for (batch, sparsity, v, kernel, stride), some in sorted(groups.items()):
        before, after, speedups = zip(*some, strict=True)
        record = {"op": "conv2d_transposes", "batch": batch, "sparsity": sparsity, "group_size": v}
        record |= {"kernel": kernel, "stride": stride, "layers": len(some), "native_time_us": sum(before)}
        record |= {"time_us": sum(after), "slowdown": sum(after) / sum(before)}
        found.append(record | {"speedup": statistics.geometric_mean(speedups)})
    return found


def run(
    todo: Sequence[Case], models: Sequence[int], out: pathlib.Path, minutes: float, *, again: bool, size: Mapping
) -> None:
    """Measures cases, and the whole network of some size and batches, until all is done or the time is over."""
    started = time.monotonic()
    torch = BASELINES if jax.default_backend() == "gpu" else None
    order = {key: i for i, key in enumerate([*map(resnet.model_key, models), *map(key_of, todo)])}
    results = Results(out, order if again else (), ("dense", torch) if torch else ("dense",))
    done = {record["case"] for record in results.records}
    todo = [case for case in todo if key_of(case) not in done]
    models = [batch for batch in models if resnet.model_key(batch) not in done]
    if not todo and not models:
        return
    shares = spread(todo, models, workers.visible_gpus())
    left = {*map(resnet.model_key, models), *map(key_of, todo)}
    try:
        for (kind, of), records in workers.answers(teams(shares, size, torch), 60 * minutes):
            if records is None:
                print(f"{kind} {of}: its process ended", flush=True)
            if records is not None or kind == torch:  # without which a case can be
                new = results.add(kind, of, records or [])
                left -= {record["case"] for record in new}
                show(new, time.monotonic() - started)
            if time.monotonic() - results.saved > SAVE_S:
                results.save(order)
    finally:
        results.save(order)
    if left:
        print(f"{len(left)} cases left, call again to go on")


def teams(shares: Mapping[str, Sequence[tuple[str, Any]]], size: Mapping, torch: str | None) -> list[workers.Team]:
    """Who measures what `spread` gives to every GPU; `torch` is the module for PyTorch's half."""
    found = []
    most = max(1, min(WORKERS, len(os.sched_getaffinity(0)) // len(shares)))
    for gpu, share in shares.items():
        # Few processes measure the dense ones: each loads XLA's libraries on the GPU first.
        for kinds, processes in ((("dense",), min(4, most)), (("model", "sparse"), most)):
            questions = []
            for kind, of in share:
                what = {"batch": of, "size": size} if kind == "model" else {"case": dataclasses.asdict(of)}
                if kind in kinds:
                    questions.append(((kind, of), {"kind": kind} | what))
            found.append(workers.Team("benchmarks.conv_worker", gpu, min(processes, len(questions)), questions))
        if torch:
            shapes = [((torch, of), dataclasses.asdict(of)) for kind, of in share if kind == "dense"]
            found.append(workers.Team(torch, gpu, 1, shapes, locks=False))
    return found


def show(records: Sequence[dict], seconds: float) -> None:
    """Prints the records of whole cases, a line each."""
    for key, some in itertools.groupby(records, key=lambda r: r["case"]):
        timings = []
        for r in some:
            if not r["time_us"]:
                continue
            dense = "/" + r["layout"] if r["pattern"] == "dense" else "*" * r.get("default", 0)
            timings.append(f"{r.get('form', r.get('implementation'))}{dense} {r['time_us']:.1f} ({r['speedup']:.2f})")
        print(f"{seconds:.0f} s {key}: {', '.join(timings)}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = files.command_line("conv", __doc__, minutes=7.5, again="what the file has already")
    parser.add_argument("--acceptance", action="store_true", help="only the cases of the acceptance table")
    parser.add_argument("--model", action="store_true", help="only ResNet-50 whole")
    parser.add_argument(
        "--table", action="store_true", help="measure nothing, write the table of the results for `predict_convolution`"
    )
    parser.add_argument("--size", choices=("resnet50", "tiny"), default="resnet50")
    options = parser.parse_args(argv)
    if options.table:
        write_table(options.out or files.RESULTS / "nvidia-h200" / "conv.json")
        return
    tiny = options.size == "tiny"
    if not tiny and jax.default_backend() != "gpu":
        parser.error("ResNet-50 is measured on a GPU, and there is none here; --size tiny only checks the program")
    layers, batches = (TINY, (8, 2)) if tiny else (RESNET50, BATCHES)
    todo, models = list(cases(layers, options.size, batches)), batches[-1:] if tiny else batches
    if options.acceptance or options.model:
        todo = todo[: len(layers)] if options.acceptance else []
        models = models if options.model else ()
    out = files.output(parser, options, "conv_tiny" if tiny else "conv")
    run(todo, models, out, options.minutes, again=options.again, size=TINY_MODEL if tiny else {})


def write_table(results: pathlib.Path) -> None:
    """Writes the table of `pallas_kernels._tables`."""
    entries, path = [], tables.TABLES / "convolutions" / f"{results.parent.name}.json"
    for r in defaults(files.read(results)["records"], "CHWN"):
        slots = -(-r["m"] // r["group_size"]) * round(r["k"] * (1 - r["sparsity"]))
        entry = {key: r[key] for key in ("m", "k", "n", "group_size", "dtype", "time_us", "dense_time_us")}
        entries.append({"taps": r["kernel_size"][0] * r["kernel_size"][1], "slots": slots} | entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"entries": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main()
