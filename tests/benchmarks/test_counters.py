"""Reading what Nsight Compute prints, and what happens without it."""

import csv
import io

import pytest

from benchmarks import counters

NAMES = [
    "ID", "Kernel Name", "gpu__time_duration.sum", "sm__cycles_elapsed.max", "lts__t_bytes.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", "launch__registers_per_thread",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
]  # fmt: skip


def log(*kernels):
    """As ncu writes it: lines of its own, a header, units, a row for each kernel; thousands with commas."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerow(NAMES)
    writer.writerow(["", "", "ns", "cycle", "byte", "%", "register/thread", "", ""])
    for i, kernel in enumerate(kernels):
        writer.writerow([i, kernel, "57,600", "99,072", "427,000,000", "64.7", "168", "0.5", "1.5"])
    return "==PROF== Connected to process 1\n" + out.getvalue() + "==PROF== Disconnected\n"


def test_kernels_are_those_between_markers():
    found = counters.parse(log("row_grouped_matmul", "wrapped_cosine", "table", "dot", "wrapped_cosine", "cut off"))
    assert [[row["Kernel Name"] for row in rows] for rows in found] == [["row_grouped_matmul"], ["table", "dot"]]
    with pytest.raises(ValueError, match="no permission"):
        counters.parse("==ERROR== no permission\n")


def test_a_record_has_microseconds_megabytes_and_shares():
    case = counters.CASES[0]
    ((row,),) = counters.parse(log("kernel", "wrapped_cosine"))
    record = counters.record(case, row)
    want = {"kernel": "kernel", "time_us": 57.6, "clock_mhz": 1720, "l2_mb": 427, "tensor_percent": 64.7}
    for name, value in want.items():
        assert record[name] == (pytest.approx(value) if isinstance(value, float) else value)
    assert record["l2_tb_per_s"] == pytest.approx(427 / 57.6)
    assert record["stalls"] == {"wait": 0.75, "barrier": 0.25}
    assert record["top_stalls"] == "wait 75%, barrier 25%"
    assert record["dram_read_mb"] is None  # not counted
    assert record["implementation"] == case.implementation


def test_only_metrics_that_this_ncu_knows_are_asked_for():
    listing = "Metric Name  Type\n---- ----\nlts__t_bytes  Counter  byte\ngpu__time_duration  Counter\nother  Counter\n"
    assert counters.known_metrics(listing) == ["gpu__time_duration.sum", "lts__t_bytes.sum"]


def test_without_ncu_nothing_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(counters, "find_ncu", lambda: None)
    assert counters.main(["--out", str(tmp_path / "counters.json")]) == 1
    assert "nothing is written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
