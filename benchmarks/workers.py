"""Processes that measure for one program: they prepare and compile side by side, and one at a time holds a GPU.

JAX compiles the Pallas kernels of a process one after the other, and CUPTI sees every kernel of a process, so that a
sweep of many small measurements is shared among processes, not threads. A worker is a subprocess that answers JSON
lines with JSON lines; `answers` puts the questions of a program to as many workers as each GPU is given.
"""

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import jax

from pallas_kernels import timing

PATIENCE = 120  # seconds after which a process that holds a GPU counts as hanging
held_s = 0.0  # how long this process held its GPU


class Worker:
    """A subprocess `python -m module` that answers JSON lines."""

    def __init__(self, module: str, gpu: str | None = None):
        """Starts it, on one GPU or on those that this process sees."""
        environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        command = [sys.executable, "-m", module]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, question: Mapping[str, Any]) -> Any:
        """The answer to a question, or None where the process ends instead."""
        try:
            print(json.dumps(question), file=_pipe(self.process.stdin), flush=True)
        except BrokenPipeError:
            return None
        line = _pipe(self.process.stdout).readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        """Ends the subprocess, which reads the end of its input."""
        with contextlib.suppress(BrokenPipeError):
            _pipe(self.process.stdin).close()
        self.process.wait()
        _pipe(self.process.stdout).close()

    def kill(self) -> None:
        """Ends the subprocess at once."""
        self.process.kill()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@dataclasses.dataclass(frozen=True)
class Team:
    """Workers of one kind on one GPU and what they are asked.

    Attributes:
        module: what they run.
        gpu: as CUDA_VISIBLE_DEVICES names it.
        size: the number of workers.
        questions: (what the caller knows a question by, the question), the most important ones first.
        locks: whether they take the GPU's lock themselves; else it is held while they answer, and they have to answer
            an empty question too.
    """

    module: str
    gpu: str
    size: int
    questions: Sequence[tuple[Any, Mapping[str, Any]]]
    locks: bool = True


def answers(teams: Sequence[Team], seconds: float) -> Iterator[tuple[Any, Any]]:
    """Yields (what the caller knows a question by, its answer) as answers come, until all did or the time is over.

    An answer is None where the worker ended; another one takes its place.
    """
    found: queue.SimpleQueue = queue.SimpleQueue()
    over = threading.Event()
    at_work: set[Worker] = set()

    def work(team: Team, questions: Iterator[tuple[Any, Mapping[str, Any]]]) -> None:
        worker: Worker | None = None
        for name, question in questions:  # shared by the team's threads; each takes what comes next
            if over.is_set():
                break
            if worker is None:
                at_work.add(worker := Worker(team.module, team.gpu))
                if not team.locks:
                    worker.ask({})  # answered when it is ready: the GPU is not held for its start
            with contextlib.nullcontext() if team.locks else timing.alone(team.gpu):
                answer = worker.ask(question)
            if answer is None:
                at_work.discard(worker)
                worker.close()
                worker = None
            if not over.is_set():
                found.put((name, answer))
        if worker is not None:
            worker.close()

    deadline = time.monotonic() + seconds
    threads = []
    for team in teams:
        questions = iter(team.questions)
        threads += [threading.Thread(target=work, args=(team, questions)) for _ in range(team.size)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(sum(len(team.questions) for team in teams)):
            yield found.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        pass
    finally:
        over.set()
        while any(thread.is_alive() for thread in threads):
            for worker in list(at_work):
                worker.kill()  # in the middle of an answer, or with nothing more to do
            time.sleep(0.1)


def visible_gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; one name without a GPU."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",") if names else [str(i) for i in range(jax.local_device_count())]


def serve(answer: Callable[[dict[str, Any]], Any]) -> None:
    """What a worker does: answers questions from standard input until it ends; its prints go to standard error."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        with timing.alone(shared=True):
            jax.devices()  # starting on a GPU takes some of its time
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=out, flush=True)


@contextlib.contextmanager
def holding_gpu() -> Iterator[None]:
    """Holds the GPU alone; a process that holds it too long ends, and with it the lock."""
    global held_s
    with timing.alone():
        started, watch = time.monotonic(), threading.Timer(PATIENCE, os._exit, (1,))
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()
            held_s += time.monotonic() - started


def on_host() -> contextlib.AbstractContextManager:
    """Inside of it arrays are made and computed on the CPU."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])
