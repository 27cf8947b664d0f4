"""Files that are damaged, cut short by a kill or a full disk, or wanted by two at once."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import random
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dtr_kernels as dtr
from dtr_kernels.analysis import progress
from dtr_kernels.files import locked, read_tensors, replacing, write_tensors
from tests.faults.fault import Fault

ROOT = Path(__file__).parents[2]
TIMESTEPS = range(0, 60, 10)
# Its server imports this file once, and has never computed a gradient, which PyTorch could not do in a fork after that.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.faults.files"])


# --- what is stored --------------------------------------------------------------------------------------------------


def some_clusters(version: int) -> dtr.IntervalClusters:
    return dtr.interval_clusters(1000 + version, 5)


def some_affinity(version: int) -> dtr.TaskAffinity:
    generator = torch.Generator().manual_seed(version)
    gradients = torch.randn(20, 30, dtype=torch.float64, generator=generator)
    gram = gradients @ gradients.T
    norms = gram.diagonal().sqrt()
    return dtr.TaskAffinity(torch.arange(20), (gram / norms / norms[:, None]).clamp(-1, 1), norms, norms.log())


def some_tensors(version: int) -> dict[str, Any]:
    return {"weights": some_affinity(version).matrix, "steps": version}


def some_text(version: int) -> str:
    return f"{version}, " * 2000


def write_text(text: str, path: Path) -> None:
    with replacing(path) as draft:
        draft.write_text(text)


def same(a: Any, b: Any) -> bool:
    """Return whether two stored things are the same, to the last bit."""
    if isinstance(a, dtr.TaskAffinity):
        a, b = vars(a), vars(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


# By name: what is stored in a version, how it is saved, and how it is read.
SAVED: dict[str, tuple[Callable[[int], Any], Callable[[Any, Path], object], Callable[[Path], Any]]] = {
    "text": (some_text, write_text, Path.read_text),
    "IntervalClusters": (some_clusters, dtr.IntervalClusters.save, dtr.IntervalClusters.load),
    "TaskAffinity": (some_affinity, dtr.TaskAffinity.save, dtr.TaskAffinity.load),
    "tensors": (some_tensors, write_tensors, read_tensors),
}


def analysis(
    path: Path | None, memory: int = 1000, between_saves: float = 30.0, calls: int = 10**9, pause: float = 0.0
) -> dtr.TaskAffinity:
    """An analysis of a small model, always of the same one, whose loss may be called only so many times."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 9), nn.Tanh(), nn.Linear(9, 1)).double()
    left = calls

    def loss(t: int) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        time.sleep(pause)
        return model(torch.tensor([t / 60, 1, -1], dtype=torch.float64)).square().sum()

    progress._SECONDS_BETWEEN_SAVES = between_saves
    try:
        return dtr.task_affinity(loss, model.parameters(), TIMESTEPS, memory=memory, path=path, progress=False)
    finally:
        progress._SECONDS_BETWEEN_SAVES = 30.0


PASSES = 6 * 3  # six timesteps, and 46 fp64 parameters of which 1000 bytes hold 20 for each


def stopped_analysis(path: Path, calls: int) -> None:
    try:
        analysis(path, calls=calls)
    except KeyboardInterrupt:
        return


# --- damage ----------------------------------------------------------------------------------------------------------


def _other_values() -> list[Any]:
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    huge = ["a" * 100_000, [0] * 100_000, {str(i): 0 for i in range(10_000)}]
    others = [None, True, -1, 0, 2**62, 1e308, -1e-308, 0.5, "", "x", [], [0], [[]], {}, {"a": 0}, deep, float("nan")]
    return [*others, *huge]


def changed_value(content: bytes, draw: random.Random) -> bytes:
    """JSON of which one value, at any depth, is another or is gone."""
    whole = {"": json.loads(content)}
    holder: Any = whole
    key: Any = ""
    while isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.85:
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    if holder is not whole and draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(_other_values())
    return json.dumps(whole[""]).encode()


def changed_number(content: bytes, draw: random.Random) -> bytes:
    """JSON with a number, or what it is nested in, that no value of Python's can be made of."""
    digits = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    at = draw.choice(digits)
    other = draw.choice(
        [b"1" + b"0" * 400, b"1e999", b"-" + b"9" * 5000, b"[" * 100_000, b"\xff", b"9223372036854775808"]
    )
    return content[:at] + other + content[at + 1 :]


def damaged(path: Path, draw: random.Random) -> str:
    """Damage a file, and say how."""
    content = bytearray(path.read_bytes())
    size = len(content)
    at, stretch = draw.randrange(size), draw.randint(1, size)
    how = draw.choice(["bit", "bit", "cut", "zeros", "more", "empty", "folder", "pipe", "value", "value", "number"])
    if how in ("value", "number") and path.suffix != ".json":
        how = "bit"
    if how == "bit":
        content[at] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[at:]
    elif how == "zeros":
        content[at : at + stretch] = bytes(len(content[at : at + stretch]))
    elif how == "more":
        content += content[:stretch] if draw.random() < 0.5 else draw.randbytes(stretch)
    elif how == "value":
        content[:] = changed_value(bytes(content), draw)
    elif how == "number":
        content[:] = changed_number(bytes(content), draw)
    else:
        path.unlink()
        {"empty": path.touch, "folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}[how]()
        return how
    path.write_bytes(content)
    return f"{how} at {at} of {size}"


def removed(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def is_a_sentence(message: str, path: Path) -> bool:
    """Return whether it names the file, or its rows or lock, and is short."""
    return str(path) in message and "\n" not in message and len(message) < 1000


def result_of(read: Callable[[Path], bool], path: Path) -> str | None:
    """None if the file is refused in a sentence, or holds what it should."""
    try:
        return None if read(path) else "holds something else, silently"
    except (ValueError, OSError) as error:
        return None if is_a_sentence(str(error), path) else f"is refused by {error!r}"
    except BaseException as error:
        return f"breaks its reader: {error!r}"


def stored_files(folder: Path) -> Iterator[tuple[Path, Path, Callable[[Path], bool]]]:
    """Yield each kind of file: the one that is damaged, the one that is read, and whether that is right."""
    from benchmarks import static, tables
    from benchmarks.results import Run
    from benchmarks.study import findings, inner, judge, units

    for name, (make, save, read) in SAVED.items():
        if name not in ("text", "IntervalClusters"):
            save(make(0), path := folder / name)
            yield path, path, lambda path, make=make, read=read: same(make(0), read(path))
    some_clusters(0).save(path := folder / "clusters.json")  # which people may edit
    yield path, path, lambda path: isinstance(dtr.IntervalClusters.load(path), dtr.IntervalClusters)

    path = folder / "progress.pt"
    stopped_analysis(path, PASSES - 2)
    expected = analysis(None)
    yield path, path, lambda path: same(expected, analysis(path))
    stopped_analysis(path := folder / "other progress.pt", PASSES - 2)
    yield path.with_name(f"{path.name}.rows"), path, lambda path: same(expected, analysis(path))

    found = {"losses": [0.1, 1 / 3], "steps": 5, "environment": {"commit": None}}
    units._write(found, path := folder / "unit.json")
    yield path, path, lambda path: same(found, units._read(path))
    model, other = nn.Linear(30, 20), nn.Linear(30, 20)
    write_tensors(model.state_dict(), path := folder / "weights.pt")

    def restored(path: Path) -> bool:
        judge.load_weights(other, path)
        return same(dict(model.state_dict()), dict(other.state_dict()))

    yield path, path, restored

    def reported(path: Path) -> bool:
        run = Run.load(path)
        return bool(tables.run_markdown(run) + tables.overview(run) + tables.goals_table([run]))

    for name in ("gram_matrix", "surgery_step"):
        shutil.copy(ROOT / f"benchmarks/results/cpu/{name}.json", path := folder / f"{name}.json")
        yield path, path, reported
    stored = json.loads((ROOT / "benchmarks/results/static/static.json").read_text())
    (path := folder / "static.json").write_text(json.dumps(stored | {"rows": stored["rows"][::50]}))
    yield path, path, lambda path: bool(static.Report.load(path))
    for name, page in (("cpu", findings.markdown), ("inner", inner.markdown)):
        shutil.copy(ROOT / f"docs/study/{name}.json", path := folder / f"{name}.json")
        yield path, path, lambda path, page=page: bool(findings.read(path, page))


def damages(draw: random.Random, folder: Path) -> Iterator[str | None]:
    files = list(stored_files(folder))
    contents = {file: file.read_bytes() for file in folder.iterdir()}
    while True:
        path, read_from, read = draw.choice(files)
        how = damaged(path, draw)
        lost = result_of(read, read_from)
        yield lost and f"{path.name} ({how}) {lost}"
        for file in folder.iterdir():
            removed(file)
        for file, content in contents.items():
            file.write_bytes(content)


# --- kills -----------------------------------------------------------------------------------------------------------


def _save_again_and_again(name: str, path: Path) -> None:
    make, save, _ = SAVED[name]
    things = make(1), make(2)
    while True:
        for thing in things:
            save(thing, path)


def _analyse_with_many_saves(path: Path) -> None:
    torch.set_num_threads(1)
    analysis(path, between_saves=0.0)


def kills(draw: random.Random, folder: Path) -> Iterator[str | None]:
    expected = analysis(None)
    while True:
        for name in draw.sample([*SAVED, "task_affinity"], len(SAVED) + 1):
            path = folder / "file"
            target, arguments = (
                (_save_again_and_again, (name, path)) if name in SAVED else (_analyse_with_many_saves, (path,))
            )
            child = CHILDREN.Process(target=target, args=arguments)
            child.start()
            while child.is_alive() and not path.exists():
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.03))
            child.kill()
            child.join()
            yield _after_a_kill(name, path, expected)
            for file in folder.iterdir():
                removed(file)


def _after_a_kill(name: str, path: Path, expected: dtr.TaskAffinity) -> str | None:
    try:
        if name in SAVED:
            make, save, read = SAVED[name]
            if not any(same(read(path), make(version)) for version in (1, 2)):
                return f"{name} is neither the old file nor the new one"
            save(make(3), path)
        elif not same(analysis(path), expected):
            return f"{name} goes on to other results"
    except Exception as error:
        return f"{name} is broken: {error!r}"
    left = [file.name for file in path.parent.iterdir() if file != path]
    return f"{name} leaves {left} behind" if left else None


# --- two at once -----------------------------------------------------------------------------------------------------


def two_analyses(draw: random.Random, folder: Path) -> Iterator[str | None]:
    """In two threads, or in two processes; the second with another memory."""
    expected = analysis(None)
    path = folder / "progress.pt"
    while True:
        if draw.random() < 0.5:
            child = CHILDREN.Process(target=analysis, args=(path,), kwargs={"pause": 0.005})
            others: list[Any] = [child]
        else:
            others = [threading.Thread(target=_ignoring_refusal, args=(path,))]
        others[0].start()
        while others[0].is_alive() and not path.exists():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        yield _beside_another(path, draw.choice([400, 1000, 5000]), expected) or _joined(others[0], path, expected)
        for file in folder.iterdir():
            removed(file)


def _ignoring_refusal(path: Path) -> None:
    analysis(path, pause=0.002)


def _beside_another(path: Path, memory: int, expected: dtr.TaskAffinity) -> str | None:
    try:
        found = analysis(path, memory, calls=0)
    except ValueError as error:
        said = "another analysis is using path" in str(error) and is_a_sentence(str(error), path)
        return None if said else f"the second is refused by {error!r}"
    except KeyboardInterrupt:
        return "the second runs beside the first"
    return None if torch.allclose(found.matrix, expected.matrix, rtol=0, atol=1e-12) else "the second is wrong"


def _joined(other: Any, path: Path, expected: dtr.TaskAffinity) -> str | None:
    other.join()
    try:
        found = analysis(path, calls=0)
    except KeyboardInterrupt:
        return "the first has not kept its results"
    if not torch.allclose(found.matrix, expected.matrix, rtol=0, atol=1e-12):
        return "the first is wrong"
    left = [file.name for file in path.parent.iterdir() if file != path]
    return f"{left} are left behind" if left else None


def locks(draw: random.Random, folder: Path) -> Iterator[str | None]:
    """Let some threads want one lock again and again: never two have it."""
    path = folder / "file"
    while True:
        inside, together, taken = [0], [0], [0]

        def wanting(pauses: list[float], inside=inside, together=together, taken=taken) -> None:
            for pause in pauses:
                try:
                    with locked(path, "busy"):
                        inside[0] += 1
                        time.sleep(pause)
                        together[0] += inside[0] > 1
                        taken[0] += 1
                        inside[0] -= 1
                except ValueError:
                    time.sleep(0)

        threads = [
            threading.Thread(target=wanting, args=([draw.uniform(0, 0.0005) for _ in range(50)],)) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        fine = taken[0] and not together[0] and not list(folder.iterdir())
        yield None if fine else f"{together[0]} of {taken[0]} had it with another, left: {list(folder.iterdir())}"


# --- no room ---------------------------------------------------------------------------------------------------------


def _without_room(limit: int | None, name: str, path: Path, answers: Connection) -> None:
    """Save where files may have only so many bytes, or (None) as a user whom permissions bind, root or not."""
    torch.set_num_threads(1)
    if limit is None:
        _drop_capabilities()
        if os.access(path.parent, os.W_OK, effective_ids=True):
            answers.send("NOT RUN: permissions do not bind here")
            return
    else:  # Python ignores SIGXFSZ, so that writes fail instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        if name in SAVED:
            make, save, _ = SAVED[name]
            save(make(2), path)
        else:
            analysis(path, between_saves=0.0)
    except OSError as error:
        answers.send(None if is_a_sentence(str(error), path) else f"{name} is refused by {error!r}")
    except BaseException as error:
        answers.send(f"{name} breaks: {error!r}")
    else:
        answers.send(None if limit else f"{name} was written all the same")


def _drop_capabilities() -> None:
    """So that root, too, may not write where permissions forbid it."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, none)


def no_room(draw: random.Random, folder: Path) -> Iterator[str | None]:
    expected = analysis(None)
    place = folder / "place"
    path = place / "file"
    while True:
        for name in draw.sample([*SAVED, "task_affinity"], len(SAVED) + 1):
            place.mkdir()
            if name in SAVED:
                make, save, _ = SAVED[name]
                save(make(1), path)
            else:
                stopped_analysis(path, PASSES - 8)
            before = {file.name: file.read_bytes() for file in place.iterdir()}
            limit = draw.choice([None, draw.randrange(len(before["file"]))])
            if limit is None:
                place.chmod(0o555)
            here, there = CHILDREN.Pipe()
            child = CHILDREN.Process(target=_without_room, args=(limit, name, path, there))
            child.start()
            lost = here.recv()
            child.join()
            place.chmod(0o755)
            if lost is None or not lost.startswith("NOT RUN"):
                yield lost or _as_before(name, path, before, expected)
            shutil.rmtree(place)


def _as_before(name: str, path: Path, before: dict[str, bytes], expected: dtr.TaskAffinity) -> str | None:
    left = {file.name for file in path.parent.iterdir()} - before.keys()
    if left - {f"{path.name}.rows"}:
        return f"{name} leaves {left} behind"
    if name in SAVED:
        return None if path.read_bytes() == before["file"] else f"{name} has lost the old file"
    return None if same(analysis(path), expected) else f"{name} goes on to other results"


FAULTS = [
    Fault(
        "a stored file is damaged: bits, cuts, zeros, more bytes, other values, a folder or a pipe in its place",
        "refused in a sentence that names it, or exactly what was saved; of clusters, results and findings, which "
        "people may edit and so have no checksum, another one that is valid",
        damages,
    ),
    Fault("a process is killed while it writes a file", "the old file or the new one; no drafts after the next", kills),
    Fault("two analyses on one path", "the second is refused, or finds all done; no matrix is wrong", two_analyses),
    Fault("six threads want one lock", "never two have it, and its file is gone", locks),
    Fault("a full disk, or a read-only folder", "an OSError in a sentence; what was saved is as before", no_room),
]
