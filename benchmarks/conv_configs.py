"""The study behind `pallas_kernels.mosaic_gpu_conv.heuristic`: its search space, measured.

`python -m benchmarks.conv_configs` writes `benchmarks/results/<device>/conv_configs.json`: the convolutions of
ResNet-50 at 75%, V = 64 and 128, batches of 64 and 16, with every config of the Mosaic kernel and Triton's default.
All visible GPUs share them, as in `benchmarks.conv`. A summary for each V and batch follows in the file.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from benchmarks import workers
from benchmarks.conv import BATCHES, RESNET50, Case, key_of
from benchmarks.records import RESULTS, write
from pallas_kernels import _tables as tables

WORKERS = 12  # processes on a GPU


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conv_configs", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="begin nothing new after this time")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--summary", action="store_true", help="measure nothing, summarise anew what is there")
    options = parser.parse_args(argv)
    if options.summary:
        out = options.out or RESULTS / "nvidia-h200" / "conv_configs.json"
        document = json.loads(out.read_text())
        records = [record for record in document["records"] if record["op"] == "conv2d"]
        write(out, [*records, *summaries(records)], document)
        return
    if jax.default_backend() != "gpu":
        parser.error("configs of the kernel are measured on a Hopper GPU, and there is none here")
    out = options.out or RESULTS / tables.file_name(jax.devices()[0].device_kind) / "conv_configs.json"
    cases = [
        Case("resnet50", layer, batch, group_size=v)
        for v, batch in ((64, BATCHES[0]), (128, BATCHES[0]), (64, BATCHES[1]), (128, BATCHES[1]))
        for layer in RESNET50
        if v <= max(64, layer.features)
    ]
    gpus, order = workers.visible_gpus(), {key_of(case): i for i, case in enumerate(cases)}
    teams = []
    for i, gpu in enumerate(gpus):
        questions = [(case, {"kind": "configs", "case": dataclasses.asdict(case)}) for case in cases[i :: len(gpus)]]
        teams.append(workers.Team("benchmarks.conv_worker", gpu, WORKERS, questions))
    records = []
    for case, found in workers.answers(teams, 60 * options.minutes):
        key, (m, k, n) = key_of(case), case.product
        base = {"op": "conv2d", **dataclasses.asdict(case), "m": m, "k": k, "n": n, "case": key}
        timed = [record for record in found or () if record["time_us"]]
        if not timed:
            print(f"{key}: nothing was measured")
            continue
        first = next(record["time_us"] for record in timed if record["heuristic"])
        best = min(record["time_us"] for record in timed)
        records += [base | record | {"heuristic_time_us": first, "best_time_us": best} for record in found]
        print(f"{key}: the heuristic's {first:.1f} us, the best {best:.1f} us", flush=True)
        records.sort(key=lambda record: order[record["case"]])
        write(out, [*records, *summaries(records)])


def summaries(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each V and batch geometric means over the layers of times in terms of the best, and the heuristic's worst."""
    found = []
    timed = sorted((r for r in records if r["time_us"]), key=lambda r: (r["group_size"], r["batch"]))
    for (v, batch), some in itertools.groupby(timed, key=lambda r: (r["group_size"], r["batch"])):
        layers: dict[str, dict[str, float]] = {}
        for r in some:
            config = r["config"]
            name = r["implementation"] if config is None else "clusters" if config["cluster"] > 1 else "alone"
            times = layers.setdefault(r["case"], {"heuristic": r["heuristic_time_us"], "best": r["best_time_us"]})
            times[name] = min(r["time_us"], times.get(name, r["time_us"]))
        means = {
            f"{name}_of_best": statistics.geometric_mean(times[name] / times["best"] for times in layers.values())
            for name in ("heuristic", "clusters", "triton")
            if all(name in times for times in layers.values())
        }
        worst = max(times["heuristic"] / times["best"] for times in layers.values())
        base = {"op": "conv2d_configs_summary", "group_size": v, "batch": batch, "layers": len(layers)}
        found.append(base | means | {"worst_of_best": worst})
    return found


if __name__ == "__main__":
    main()
