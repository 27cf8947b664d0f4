"""The training loop that people copy: a killed one loses nothing, and any number of processes trains alike."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples import digits
from examples.train import Recipe, Training, main, run

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parent.parent
TINY = Recipe(steps=15, batch_size=20, hidden_size=32, depth=2, num_heads=2)
OPTIONS = ["--steps", "15", "--batch-size", "20", "--hidden-size", "32", "--depth", "2", "--num-heads", "2"]
METHODS = [("dtr", "none"), ("random", "uw"), ("dtr", "pcgrad"), ("none", "nash")]


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
        torch.save(state, tmp_path / "part.pt")
        second = Training(recipe, *data)
        second.load(tmp_path / "part.pt")
        while second.done < recipe.steps:
            second.step()
        pairs = zip(weights(second), weights(expected), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs), part


def start(folder, *options, module="examples.train"):
    """The example as a process of its own, with kernels and threads as users have them."""
    command = [sys.executable, "-m", *module.split(), *OPTIONS, "--out", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


LONGER = ["--weighting", "pcgrad", "--steps", "80", "--save-every", "7"]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("left alone")
    finish(start(folder, *LONGER))
    return folder


def test_a_killed_process_goes_on_to_the_same_bits(left_alone, tmp_path):
    process = start(tmp_path, *LONGER)
    while process.poll() is None and not (tmp_path / "checkpoint.pt").exists():
        time.sleep(0.005)
    time.sleep(0.1 * random.random())
    process.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    assert not (tmp_path / "averaged.pt").exists()
    assert f"results are in {tmp_path}" in finish(start(tmp_path, *LONGER))
    found, expected = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path, left_alone))
    assert found["done"] == expected["done"] == 80
    for part in ("objective", "averaged"):
        assert_same(found[part].values(), expected[part].values())
    assert torch.equal(found["losses"], expected["losses"])
    assert (tmp_path / "samples.png").stat().st_size > 0 and (tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.parametrize("weighting", ["uw", "pcgrad"])
def test_two_processes_train_the_model_of_one(weighting, data, tmp_path, seed):
    recipe = replace(TINY, weighting=weighting, seed=seed)
    torchrun = "torch.distributed.run --standalone --nproc-per-node 2 -m examples.train"
    running = start(tmp_path, "--weighting", weighting, "--seed", str(seed), "--save-every", "4", module=torchrun)
    expected, found = trained(recipe, data), Training(recipe, *data)
    finish(running)
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
        ({"weighting": "mgda"}, "weighting must be one of none, uw, pcgrad, nash, got 'mgda'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
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
    torch.save(training.model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt is no checkpoint of a training; give another folder"):
        training.load(tmp_path / "weights.pt")


def test_a_signal_in_the_last_step_is_told_and_handlers_come_back(data, tmp_path, monkeypatch):
    training = Training(TINY, *data)
    before = signal.getsignal(signal.SIGINT)
    step = training.step

    def interrupted_at_the_end():
        step()
        if training.done == TINY.steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training, "step", interrupted_at_the_end)
    assert not run(training, tmp_path / "checkpoint.pt", save_every=100)
    assert signal.getsignal(signal.SIGINT) is before
    again = Training(TINY, *data)
    again.load(tmp_path / "checkpoint.pt")
    assert again.done == TINY.steps
    monkeypatch.setattr(training, "step", lambda: 1 / 0)
    training.done = 0
    with pytest.raises(ZeroDivisionError):
        run(training, tmp_path / "checkpoint.pt", save_every=100)
    assert signal.getsignal(signal.SIGINT) is before


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
