"""Workers that answer lines: shares, ends, limits. They are small programs without JAX."""

import sys
import time

import pytest

from benchmarks import workers
from benchmarks.workers import Team, answers

PROGRAM = """
import json, os, sys, time
for line in sys.stdin:
    question = json.loads(line)
    if question.get("do") == "end":
        sys.exit()
    time.sleep(question.get("seconds", 0))
    print(json.dumps([question.get("do"), os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()]), flush=True)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "answering.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "answering"


def ask(*words, **more):
    return [(word, {"do": word} | more) for word in words]


@pytest.mark.parametrize("locks", [True, False])
def test_every_question_is_answered_by_a_worker_of_its_gpu(module, locks):
    teams = [Team(module, "0", 2, ask("a", "b", "c"), locks), Team(module, "1", 1, ask("d"), locks)]
    found = dict(answers(teams, 60))
    assert {name: answer[:2] for name, answer in found.items()} == {
        "a": ["a", "0"], "b": ["b", "0"], "c": ["c", "0"], "d": ["d", "1"],
    }  # fmt: skip
    assert len({pid for *_, pid in found.values()}) <= 3


def test_another_worker_takes_the_place_of_one_that_ends(module):
    found = list(answers([Team(module, "0", 1, ask("a", "end", "b"))], 60))
    assert [name for name, _ in found] == ["a", "end", "b"]
    assert found[1] == ("end", None)
    assert found[0][1][2] != found[2][1][2]


def test_workers_end_with_the_time(module):
    started = time.monotonic()
    found = list(answers([Team(module, "0", 1, ask("a") + ask("b", seconds=60) + ask("c"))], 3))
    assert [name for name, _ in found] == ["a"]
    assert time.monotonic() - started < 30


def test_nothing_to_ask(module):
    assert list(answers([Team(module, "0", 1, [])], 60)) == []


def test_a_worker_of_the_processes_own_gpus(module):
    worker = workers.Worker(module)
    assert worker.ask({"do": "a"})[0] == "a"
    worker.close()
    assert worker.process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="locks files")
def test_only_one_process_holds_a_gpu(monkeypatch):
    import fcntl

    from pallas_kernels import timing

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "test,1")
    opened, flags = [], fcntl.LOCK_NB
    original = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: (opened.append(file.name), original(file, how | flags)))
    with timing.alone(), timing.alone("1"), pytest.raises(BlockingIOError), timing.alone():
        pass
    with timing.alone(shared=True), timing.alone(shared=True), pytest.raises(BlockingIOError), timing.alone():
        pass
    assert "gpu-test.lock" in opened[0]
    with workers.holding_gpu(), pytest.raises(BlockingIOError), timing.alone():
        pass
