"""The training loop that people copy: a killed one loses nothing, and any number of processes trains alike."""

from __future__ import annotations

import math
import os
import random
import re
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from dtr_kernels.files import locked, read_tensors, replacing, write_tensors
from examples import digits
from examples.train import LARGEST, Recipe, Training, main, run
from tests.faults.training import bits, ended, fill_disk, log_of, start_ranks, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
TINY = Recipe(steps=15, batch_size=20, hidden_size=32, depth=2, num_heads=2)
OPTIONS = ["--steps", "15", "--batch-size", "20", "--hidden-size", "32", "--depth", "2", "--num-heads", "2"]
METHODS = [("dtr", "none"), ("random", "uw"), ("dtr", "pcgrad"), ("none", "nash"), ("dtr", "min-snr"), ("none", "edm2")]


@pytest.fixture(scope="module")
def data():
    return digits.load_images()


def trained(recipe, data):
    training = Training(recipe, *data)
    while training.done < recipe.steps:
        training.step()
    return training


def weights(training):
    """Everything that training changes."""
    return [*training.objective.parameters(), *training.averaged.parameters(), training.losses]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("routing, weighting", METHODS)
def test_a_checkpoint_continues_to_the_same_bits(routing, weighting, precision, data, tmp_path, seed):
    recipe = replace(TINY, routing=routing, weighting=weighting, precision=precision, seed=seed)
    expected = trained(recipe, data)
    assert torch.isfinite(expected.losses).all()
    first = Training(recipe, *data)
    for _ in range(random.Random(seed).randrange(1, 15)):
        first.step()
    first.save(tmp_path / "checkpoint.pt")
    torch.rand(7)  # the state of the random numbers is no part of it
    second = Training(recipe, *data)
    second.load(tmp_path / "checkpoint.pt")
    assert second.done == first.done
    while second.done < recipe.steps:
        second.step()
    assert_same(weights(second), weights(expected))


def test_min_snr_weighs_the_error_of_the_image(data, seed):
    """A wrong image is a wrong velocity, at sin(phi) of its size."""
    training = Training(replace(TINY, weighting="min-snr", seed=seed), *data)
    clusters, shares, *batch = training._batch()
    phi = digits.angle(batch[1]).flatten().double()
    weights = (phi.tan() ** -2).clamp(max=5) * phi.sin() ** 2
    losses = training.objective.losses(*batch)
    loss, mean = training.objective(clusters, shares, *batch)
    torch.testing.assert_close(loss, (weights * losses).mean().float())
    torch.testing.assert_close(mean, losses.mean())


def test_every_part_of_a_checkpoint_counts(data, tmp_path, seed):
    recipe = replace(TINY, weighting="uw", seed=seed)
    expected = trained(recipe, data)
    first = Training(recipe, *data)
    for _ in range(3):
        first.step()
    first.save(tmp_path / "whole.pt")
    for part in ("objective", "averaged", "optimizer"):
        state = torch.load(tmp_path / "whole.pt", weights_only=True)
        state[part] = {
            "objective": Training(recipe, *data).objective.state_dict(),
            "averaged": Training(recipe, *data).averaged.state_dict(),
            "optimizer": Training(recipe, *data).optimizer.state_dict(),
        }[part]
        write_tensors(state, tmp_path / "part.pt")
        second = Training(recipe, *data)
        second.load(tmp_path / "part.pt")
        while second.done < recipe.steps:
            second.step()
        pairs = zip(weights(second), weights(expected), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs), part


def by_torchrun(folder, *options):
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m examples.train"
    command = [sys.executable, *torchrun.split(), *OPTIONS, "--out", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def by_forks(folder, *options):
    ranks = start_ranks([folder, folder], *OPTIONS, *options)
    assert ended(ranks) and [rank.exitcode for rank in ranks] == [0, 0]


@pytest.mark.parametrize(("weighting", "run_two"), [("uw", by_torchrun), ("pcgrad", by_forks), ("edm2", by_forks)])
def test_two_processes_train_the_model_of_one(weighting, run_two, data, tmp_path, seed):
    recipe = replace(TINY, weighting=weighting, seed=seed)
    run_two(tmp_path, "--weighting", weighting, "--seed", str(seed), "--save-every", "4")
    expected, found = trained(recipe, data), Training(recipe, *data)
    found.load(tmp_path / "checkpoint.pt")
    for a, b in zip(found.objective.parameters(), expected.objective.parameters(), strict=True):
        # Adam divides by the size of gradients: rounding of tiny ones becomes steps of up to the learning rate.
        assert (a - b).abs().max() <= 0.05 * recipe.learning_rate * recipe.steps
        assert (a - b).norm() <= 1e-2 * b.norm() + 1e-5
        # It hides their scale, which its own averages show.
        if b.requires_grad:
            here, there = found.optimizer.state[a]["exp_avg"], expected.optimizer.state[b]["exp_avg"]
            assert (here - there).norm() <= 1e-2 * there.norm() + 1e-6


def test_a_specialist_sees_its_interval_alone(data, seed):
    for k in range(5):
        clusters, _, _, t, *_ = Training(replace(TINY, cluster=k, seed=seed), *data)._batch()
        assert (clusters == k).all() and (t // 200 == k).all() and len(t) == 20
    clusters = Training(replace(TINY, seed=seed), *data)._batch()[0]
    assert clusters.bincount().tolist() == [4] * 5


def test_the_loss_falls(data, seed):
    losses = trained(replace(TINY, steps=60, batch_size=40, seed=seed), data).losses
    assert losses[-10:].mean() < 0.85 * losses[:5].mean()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"routing": "windows"}, "routing must be one of none, random, dtr, got 'windows'"),
        ({"scope": "all"}, "scope must be one of block, branch, inner, got 'all'"),
        ({"weighting": "mgda"}, "weighting must be one of none, uw, pcgrad, nash, min-snr, edm2, got 'mgda'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"routing": ["dtr"]}, r"routing must be one of none, random, dtr, got \['dtr'\]"),
        *(
            ({name: value}, rf"{name} must be a whole number in {int(name != 'seed')}\.\.{largest}, got {value}$")
            for name, largest in LARGEST.items()
            for value in (-1, largest + 1, 5.5, True)
        ),
        ({"steps": 0}, r"steps must be a whole number in 1\.\.10000000, got 0"),
        *(
            ({"learning_rate": value}, f"learning_rate must be a number above 0, and finite, got {value}")
            for value in (-1.0, 0.0, math.nan, math.inf, True)
        ),
        ({"alpha": math.nan, "routing": "none"}, "alpha.* must be greater than 0, got nan"),
        ({"beta": -1.0, "routing": "none"}, r"beta.* must be in \(0, 1\], got -1.0"),
        ({"cluster": True}, r"cluster must be in 0..4 .*got True"),
        ({"cluster": 1.5}, r"cluster must be in 0..4 .*got 1.5"),
        ({"batch_size": 4}, r"batch_size must be at least clusters \(5\).*got 4"),
        ({"cluster": 5}, r"cluster must be in 0..4 .*got 5"),
        ({"cluster": 1, "weighting": "uw"}, "one cluster has nothing to be weighted against"),
    ],
)
def test_recipes_that_cannot_be_trained(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_another_recipe_does_not_continue(data, tmp_path):
    training = Training(TINY, *data)
    training.save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="was made with scope 'block', but this run has 'branch'"):
        Training(replace(TINY, scope="branch"), *data).load(tmp_path / "checkpoint.pt")
    write_tensors(training.model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt is no checkpoint of a training; delete the file, or give anoth"):
        training.load(tmp_path / "weights.pt")


@pytest.mark.parametrize("last", [7, TINY.steps])
def test_a_signal_is_told_after_its_step_is_saved_and_handlers_come_back(last, data, tmp_path, monkeypatch):
    training = Training(TINY, *data)
    before = signal.getsignal(signal.SIGINT)
    step = training.step

    def interrupted():
        step()
        if training.done == last:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "step", interrupted)
    assert not run(training, tmp_path / "checkpoint.pt", save_every=100)
    assert signal.getsignal(signal.SIGINT) is before
    again = Training(TINY, *data)
    again.load(tmp_path / "checkpoint.pt")
    assert again.done == last
    monkeypatch.setattr(training, "step", lambda: 1 / 0)
    training.done = 0
    with pytest.raises(ZeroDivisionError):
        run(training, tmp_path / "checkpoint.pt", save_every=100)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_while_the_bar_is_made_ends_the_run_after_saving(data, tmp_path, monkeypatch):
    class Interrupted(tqdm):
        def __init__(self, *args, **options):
            signal.raise_signal(signal.SIGINT)
            super().__init__(*args, **options)

    monkeypatch.setattr("examples.train.tqdm", Interrupted)
    assert not run(Training(TINY, *data), tmp_path / "checkpoint.pt", save_every=100)
    again = Training(TINY, *data)
    again.load(tmp_path / "checkpoint.pt")
    assert again.done == 0


def test_a_finished_run_does_nothing_more(data, tmp_path):
    training = trained(TINY, data)
    training.save(tmp_path / "checkpoint.pt")
    again = Training(TINY, *data)
    again.load(tmp_path / "checkpoint.pt")
    assert run(again, tmp_path / "checkpoint.pt", save_every=1)
    assert_same(weights(again), weights(training))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--routing", "all"], "invalid choice"),
        (["--save-every", "0"], "--save-every"),
        (["--steps", "0"], "steps must"),
    ],
)
def test_a_wrong_command_line(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), *options])
    assert message in capsys.readouterr().err


def text(path):
    path.write_text("[]")


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def another_kind(path):
    """A bit of the archive's directory, which none of its own checksums covers, makes a folder of a part."""
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 38] ^= 0x10
    path.write_bytes(content)


def nowhere(state):
    """A checkpoint whose weights are on the device without memory."""
    return state | {"objective": {name: tensor.to("meta") for name, tensor in state["objective"].items()}}


WRONG_FILES = {
    "a part of another kind": another_kind,
    "flipped": flipped,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": text,
    "pickle": lambda path: torch.save({"recipe": {}}, path, _use_new_zipfile_serialization=False),
    "an object": lambda path: write_tensors({"recipe": path}, path),
    "a list": lambda path: write_tensors([1], path),
    "no weights": lambda path: write_tensors(nowhere(read_tensors(path)), path),
    "without a digest": lambda path: torch.save(read_tensors(path), path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("spoil", WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_file_that_is_no_checkpoint_is_refused_in_a_sentence(spoil, data, tmp_path, capsys):
    checkpoint, training = tmp_path / "checkpoint.pt", Training(TINY, *data)
    training.save(checkpoint)
    spoil(checkpoint)
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), *OPTIONS])
    message = capsys.readouterr().err.split("error: ")[1]
    assert message.count("\n") == 1 and str(checkpoint) in message
    before = bits(training._state())
    with pytest.raises(ValueError):
        training.load(checkpoint)
    assert bits(training._state()) == before
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def parts(state, path=()):
    """Yield where a checkpoint has which part, but for the optimizer's settings, which no step reads."""
    for key, part in state.items():
        if part is not None and key != "param_groups":
            yield (*path, key)
        if isinstance(part, dict):
            yield from parts(part, (*path, key))


def changed(state, path, *value):
    """Return a checkpoint with this part missing, or another."""
    key, *rest = path
    others = {other: part for other, part in state.items() if other != key}
    if rest:
        return others | {key: changed(state[key], rest, *value)}
    return others | ({key: value[0]} if value else {})


@pytest.mark.parametrize("weighting", ["uw", "nash"])
def test_a_part_that_is_missing_or_of_another_kind_is_refused_and_changes_nothing(
    weighting, data, tmp_path, monkeypatch
):
    recipe = replace(TINY, depth=1, hidden_size=8, weighting=weighting, precision="fp16")
    path, training = tmp_path / "checkpoint.pt", Training(recipe, *data)
    training.step()
    training.save(path)
    good = read_tensors(path)
    training.step()
    held = training._state()  # as a caller may hold it
    before = bits(held)
    wrong = [changed(good, part, *value) for part in parts(good) for value in [(), ([1],), (torch.zeros(3),)]]
    wrong += [good | {"done": done} for done in (-1, TINY.steps + 1, True, 1.0)] + [good | {"more": 1}]
    for state in wrong:
        monkeypatch.setattr("examples.train.read_tensors", lambda _, state=state: dict(state))
        with pytest.raises(ValueError, match=re.escape(str(path))):
            training.load(path)
        assert bits(training._state()) == bits(held) == before
    monkeypatch.setattr("examples.train.read_tensors", lambda _: dict(good))
    training.load(path)
    assert training.done == 1 and bits(training._state()) == bits(good)


@contextmanager
def full_disk(most_bytes):
    """Let no file of this process grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only_folder():
    """Yield a folder that this process may read only, also where it belongs to root."""
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()
    folder.chmod(0o555)
    try:
        os.seteuid(user or 65534)
        yield folder
    finally:
        os.seteuid(user)
        folder.rmdir()


def refusal(capsys, *options):
    """Return the sentence with which the example ends before it trains."""
    with pytest.raises(SystemExit, match="2"):
        main([*OPTIONS, *map(str, options)])
    message = capsys.readouterr().err.split("error: ")[1]
    assert message.count("\n") == 1
    return message


def test_an_out_that_cannot_be_written_to_is_found_before_training(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Training, "step", lambda training: 1 / 0)
    (tmp_path / "file").write_text("")
    with read_only_folder() as folder:
        assert f"--out: [Errno 13] Permission denied: '{folder}/checkpoint.pt.lock'" in refusal(capsys, "--out", folder)
    assert f"--out: [Errno 17] File exists: '{tmp_path}/file'" in refusal(capsys, "--out", tmp_path / "file")
    assert "--out: [Errno 20] Not a directory" in refusal(capsys, "--out", tmp_path / "file" / "folder")
    assert "--out: [Errno 2] No such file" in refusal(capsys, "--out", "/proc/folder")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    with full_disk(50_000):
        assert "checkpoint.pt could not be written; is the disk full, or the folder read-only?" in refusal(
            capsys, "--out", tmp_path / "run"
        )
    assert not list(checkpoint.parent.iterdir())
    Training(TINY, *data).save(checkpoint)
    before = checkpoint.read_bytes()
    for most_bytes in (50_000, len(before) - 64, len(before) - 1):  # the last two within the checksum
        with full_disk(most_bytes):
            assert "checkpoint.pt could not be written; is the disk full, or the folder read-only?" in refusal(
                capsys, "--out", tmp_path / "run"
            )
        assert checkpoint.read_bytes() == before and list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.parametrize("full_from", ["checkpoint.pt", "averaged.pt", "loss.png", "samples.png"])
def test_a_disk_that_fills_up_later_leaves_whole_files(full_from, tmp_path, capsys, monkeypatch):
    written = []

    @contextmanager
    def replacing_until_full(path):
        written.append(Path(path).name)
        with full_disk(0 if written.count("checkpoint.pt") > 2 and full_from in written else -1), replacing(path) as d:
            yield d

    monkeypatch.setattr("dtr_kernels.files.replacing", replacing_until_full)
    monkeypatch.setattr("examples.digits.replacing", replacing_until_full)
    assert main([*OPTIONS, "--out", str(tmp_path), "--save-every", "5"]) == 1
    error = capsys.readouterr().err
    assert "; the last checkpoint is whole, and the same command goes on from it" in error and full_from in error
    order = ["checkpoint.pt", "averaged.pt", "loss.png", "samples.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", *order[: order.index(full_from)]}
    assert read_tensors(tmp_path / "checkpoint.pt")["done"] == (5 if full_from == "checkpoint.pt" else TINY.steps)


def test_a_linked_checkpoint_is_written_through_and_drafts_of_dead_processes_go(data, tmp_path):
    training, link = Training(TINY, *data), tmp_path / "checkpoint.pt"
    target = tmp_path / "disk" / "far.pt"
    link.symlink_to(target)
    training.save(link)
    target.chmod(0o640)
    child = os.fork()
    if child == 0:
        with replacing(link) as draft:
            draft.write_text("half of")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(target.parent.iterdir())) == 2
    training.step()
    training.save(link)
    assert link.is_symlink() and read_tensors(target)["done"] == 1 and target.stat().st_mode & 0o777 == 0o640
    assert list(target.parent.iterdir()) == [target]


def test_a_second_run_in_a_folder_is_refused(tmp_path, capsys):
    with locked(tmp_path / "checkpoint.pt", ""):
        assert f"another process trains in {tmp_path}; wait until it ends" in refusal(capsys, "--out", tmp_path)
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "checkpoint.pt.lock").exists()


def test_all_ranks_end_with_the_sentence_of_the_first(data, tmp_path):
    out = [tmp_path / "first", tmp_path / "other"]  # of which only the first is ever used
    checkpoint, longer = out[0] / "checkpoint.pt", ["--steps=3000", "--save-every=1"]
    training = Training(replace(TINY, steps=3000, weighting="uw"), *data)
    training.step()

    def sentences(processes, code):
        assert ended(processes, 30) and [process.exitcode for process in processes] == [code, code]
        first, other = (log_of(out[rank], rank).read_text().splitlines()[-1] for rank in range(2))
        assert first == other
        return first

    with locked(checkpoint, ""):
        assert f"another process trains in {out[0]}" in sentences(start_ranks(out, *OPTIONS, *longer), 2)
    training.save(checkpoint)
    flipped(checkpoint)
    assert f"{checkpoint} is damaged" in sentences(start_ranks(out, *OPTIONS, *longer), 2)
    training.save(checkpoint)
    both = start_ranks(out, *OPTIONS, *longer)
    assert wait_until(lambda: read_tensors(checkpoint)["done"] > 1)
    fill_disk(both[0], 20_000)
    sentence = sentences(both, 1)
    assert f"{checkpoint} could not be written" in sentence and "the last checkpoint is whole" in sentence
    assert 1 < read_tensors(checkpoint)["done"] < 3000
    assert not out[1].exists()


def demo(monkeypatch, *options):
    """Return the exit status, or last words, of the demo."""
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, options)])
    with pytest.raises(SystemExit) as error:
        runpy.run_module("examples.demo", run_name="__main__")
    return error.value.code


def test_the_demo_ends_in_a_sentence_too(tmp_path, capsys, monkeypatch):
    def interrupted(training):
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "step", interrupted)
    assert demo(monkeypatch, "--out", tmp_path / "out") == 130
    for option, value in ("--seed", -1), ("--seed", 2**32), ("--steps", 0), ("--batch-size", 4):
        assert demo(monkeypatch, "--out", tmp_path / "out", option, value) == 2
        assert f"error: {option[2:].replace('-', '_')} must be" in capsys.readouterr().err
    with read_only_folder() as folder:
        assert f"cannot be written to: [Errno 13] Permission denied: '{folder}/" in demo(monkeypatch, "--out", folder)
    with full_disk(1000):
        assert f"[Errno 27] File too large: '{tmp_path}/windows.png'" in demo(monkeypatch, "--out", tmp_path)
    assert not (tmp_path / "windows.png").exists()
