"""Faults of the training loop in ``examples/train.py``: kills, Ctrl-C, full disks, damaged checkpoints, lost ranks."""

from __future__ import annotations

import copy
import itertools
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dtr_kernels.files import read_tensors, write_tensors
from examples import digits
from examples.train import Recipe, Training
from tests.faults.fault import Fault
from tests.processes import forks

TINY = Recipe(steps=8, batch_size=20, hidden_size=16, depth=1, num_heads=2, weighting="uw")
OPTIONS = ["--steps=8", "--batch-size=20", "--hidden-size=16", "--depth=1", "--num-heads=2", "--weighting=uw"]
OPTIONS += ["--save-every=1"]
FILES = {"checkpoint.pt", "averaged.pt", "loss.png", "samples.png"}
# A machine that is busy with something else may take as long.
PATIENCE = 60.0
# Limit for the processes that are left when one has died.
AT_MOST = 15.0


def command(out: Path, options: list[str], rank: int | None, port: int, raise_at: int | None) -> None:
    """Run ``python -m examples.train`` in this process; its output goes into a file beside ``out``."""
    log = os.open(log_of(out, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own would leave a semaphore behind when this process is killed
    if rank is not None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if raise_at is not None:
        batches, noisy = itertools.count(), digits.noisy
        digits.noisy = lambda *batch: noisy(*batch) if next(batches) < raise_at else 1 / 0
    sys.argv = ["train", *OPTIONS, *options, "--out", str(out)]
    runpy.run_module("examples.train", run_name="__main__")


def log_of(out: Path, rank: int | None = None) -> Path:
    return out.with_name(f"{out.name}.{rank}.log")


def start(
    out: Path, *options: str, rank: int | None = None, port: int = 0, raise_at: int | None = None
) -> ForkServerProcess:
    """Start the example, and return when it runs."""
    log_of(out, rank).unlink(missing_ok=True)
    process = forks().Process(target=command, args=(out, list(options), rank, port, raise_at), daemon=True)
    process.start()
    wait_until(lambda: log_of(out, rank).exists() or not process.is_alive())
    return process


def start_ranks(
    out: list[Path], *options: str, raise_at: tuple[int | None, int | None] = (None, None)
) -> list[ForkServerProcess]:
    """Start the example in two processes, each with its folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(out[rank], *options, rank=rank, port=port, raise_at=raise_at[rank]) for rank in range(2)]


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def ended(processes: list[ForkServerProcess], seconds: float = PATIENCE) -> bool:
    """Wait for all of them, and kill those that are not done in time."""
    in_time = wait_until(lambda: not any(process.is_alive() for process in processes), seconds)
    for process in processes:
        process.kill()
        process.join()
    return in_time


def at_any_moment(out: Path, process: ForkServerProcess, source: random.Random, seconds: float) -> None:
    """Wait until the first checkpoint is there, and for at most so long."""
    wait_until(lambda: (out / "checkpoint.pt").exists() or not process.is_alive())
    time.sleep(seconds * source.random() ** 3)  # most of them early, while it trains


def fill_disk(process: ForkServerProcess, most_bytes: int) -> None:
    """Let no file of a process grow beyond so many bytes."""
    with suppress(ProcessLookupError):  # it has ended
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most_bytes, most_bytes))


class Undisturbed(NamedTuple):
    """Results of a run that was left alone, and its seconds from the first checkpoint on."""

    bits: list
    seconds: float

    @classmethod
    def of(cls, out: Path, processes: int) -> Undisturbed:
        running = start_ranks([out, out]) if processes == 2 else [start(out)]
        at_any_moment(out, running[0], random.Random(), 0)
        begun = time.monotonic()
        ended(running)
        return cls(results(out), time.monotonic() - begun)


def results(out: Path) -> list:
    """Return the bits of everything that a run ends with."""
    return [*bits(read_tensors(out / "checkpoint.pt")), *bits(read_tensors(out / "averaged.pt"))]


def tensors(state: Any) -> Iterator[Tensor]:
    """Yield the tensors and numbers of a checkpoint, but for the optimizer's settings, which follow from the step."""
    if isinstance(state, dict):
        for key in (key for key in state if key != "param_groups"):
            yield from tensors(state[key])
    elif isinstance(state, Tensor | int | float):
        yield torch.as_tensor(state)


def bits(state: Any) -> list[tuple[torch.dtype, torch.Size, bytes]]:
    return [(tensor.dtype, tensor.shape, tensor.detach().numpy().tobytes()) for tensor in tensors(state)]


def says_wrong(out: Path, processes: list[ForkServerProcess], allowed: set[int]) -> str | None:
    """Wait for processes, and return what is wrong with their exit status or last words."""
    in_time = ended(processes)
    logs = [log_of(out, None if len(processes) == 1 else rank).read_text() for rank in range(len(processes))]
    if in_time and all(p.exitcode in allowed for p in processes) and not any("Traceback" in log for log in logs):
        return None
    return f"{out}: exit status {[p.exitcode for p in processes]}: {[log[-300:] for log in logs]}"


def goes_on(out: Path, expected: Undisturbed, processes: int) -> str | None:
    """Give the command again, and return what is wrong with the results; delete them if nothing is."""
    if wrong := says_wrong(out, start_ranks([out, out]) if processes == 2 else [start(out)], {0}):
        return f"the same command failed: {wrong}"
    if results(out) != expected.bits:
        return f"{out}: the same command ended with other weights"
    if {path.name for path in out.iterdir()} != FILES:
        return f"{out}: there are also {', '.join(path.name for path in out.iterdir() if path.name not in FILES)}"
    shutil.rmtree(out)
    return None


def kills(source: random.Random, folder: Path) -> Iterator[str | None]:
    expected = Undisturbed.of(folder / "undisturbed", 1)
    for number in itertools.count():
        out = folder / str(number)
        for _ in range(source.randint(1, 2)):
            process = start(out)
            time.sleep(source.uniform(0, 2 * expected.seconds))
            process.kill()
            process.join()
        yield goes_on(out, expected, 1)


def interrupts(source: random.Random, folder: Path) -> Iterator[str | None]:
    expected = Undisturbed.of(folder / "undisturbed", 1)
    for number in itertools.count():
        out = folder / str(number)
        process = start(out)
        at_any_moment(out, process, source, expected.seconds)
        if process.is_alive():
            os.kill(process.pid, source.choice([signal.SIGINT, signal.SIGTERM]))
        yield says_wrong(out, [process], {0, 130, -signal.SIGTERM}) or goes_on(out, expected, 1)


def full_disks(source: random.Random, folder: Path) -> Iterator[str | None]:
    expected = Undisturbed.of(folder / "undisturbed", 1)
    largest = (folder / "undisturbed" / "checkpoint.pt").stat().st_size
    for number in itertools.count():
        out = folder / str(number)
        process = start(out)
        if source.random() < 0.8:
            at_any_moment(out, process, source, expected.seconds)
        fill_disk(process, source.randrange(4096, largest))  # the log must fit
        yield says_wrong(out, [process], {0, 1, 2}) or goes_on(out, expected, 1)


def lost_ranks(source: random.Random, folder: Path) -> Iterator[str | None]:
    expected = Undisturbed.of(folder / "undisturbed", 2)
    for number in itertools.count():
        out, who = folder / str(number), source.randrange(2)
        if source.random() < 0.5:
            running = start_ranks([out, out])
            at_any_moment(out, running[0], source, expected.seconds)
            running[who].kill()
        else:
            steps = [None, None]
            steps[who] = source.randrange(TINY.steps)
            running = start_ranks([out, out], raise_at=tuple(steps))
            wait_until(lambda running=running, who=who: not running[who].is_alive())
        if not ended(running, AT_MOST):
            yield f"{out}: rank {1 - who} still ran {AT_MOST:.0f} s after rank {who} had ended"
        else:
            yield goes_on(out, expected, 2)


def damage(source: random.Random, good: bytes) -> bytes:
    """Return a file in which bits are flipped, or a part is cut off, missing, zero or random."""
    first, end = sorted(source.randrange(len(good)) for _ in range(2))
    end = min(end, first + source.choice([1, 512, len(good)]))
    flipped = bytearray(good)
    for _ in range(source.choice([1, 1, 1, 8])):
        flipped[source.randrange(len(good))] ^= 1 << source.randrange(8)
    return source.choice(
        [
            bytes(flipped),
            bytes(flipped),
            good[:first],
            good[:first] + good[end:],
            good[:first] + bytes(end - first) + good[end:],
            good[:first] + source.randbytes(end - first) + good[end:],
        ]
    )


def changed(source: random.Random, state: Any) -> Any:
    """Return a checkpoint of which one part, anywhere, is missing or of another type or shape."""
    state = copy.copy(state)
    key = source.choice(list(state))
    if isinstance(state[key], dict) and state[key] and source.random() < 0.8:
        return state | {key: changed(source, state[key])}
    others = [True, -1, 0.5, "text", None, [1], {}, {"more": 1}, torch.zeros(3), torch.zeros(3, dtype=torch.bool)]
    state[key] = source.choice(others)
    if source.random() < 0.3:
        del state[key]
    return state


def damaged_checkpoints(source: random.Random, folder: Path) -> Iterator[str | None]:
    trainings = []
    for steps in (3, 2):
        trainings.append(Training(TINY, *digits.load_images()))
        for _ in range(steps):
            trainings[-1].step()
    saved, running = trainings
    path, wrong = folder / "checkpoint.pt", folder / "damaged.pt"
    saved.save(path)
    running.save(folder / "running.pt")
    good, state = path.read_bytes(), read_tensors(path)
    for number in itertools.count():
        structure = source.random() < 0.5
        if structure:
            write_tensors(changed(source, state), wrong)
        else:
            wrong.write_bytes(damage(source, good))
        held = running._state()  # as a caller may
        before = bits(held)
        try:
            running.load(wrong)
        except (ValueError, OSError) as error:
            whole = bits(running._state()) == bits(held) == before
            sentence = "\n" not in str(error) and str(wrong) in str(error)
            yield None if whole and sentence else f"try {number}: {'' if whole else 'state changed by '}{error}"
        except Exception as error:
            yield f"try {number}: {error!r}"
        else:
            fine = bits(running._state()) == bits(state)
            yield None if fine else f"try {number}: a damaged checkpoint was loaded"
            running.load(folder / "running.pt")


SAME_BITS = "the same command ends with the same bits"

FAULTS = [
    Fault("training: killed", SAME_BITS, kills),
    Fault("training: Ctrl-C or SIGTERM", f"no traceback; {SAME_BITS}", interrupts),
    Fault("training: the disk is full", f"a sentence, the checkpoint is whole; {SAME_BITS}", full_disks),
    Fault("training: one of two ranks is killed or raises", f"the other ends in seconds; {SAME_BITS}", lost_ranks),
    Fault("training: a damaged checkpoint", "refused in a sentence, nothing has changed", damaged_checkpoints),
]
