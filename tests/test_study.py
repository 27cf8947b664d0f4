"""The study: its measures against others' code, its sentences against known figures, and all of it once, very small."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

import benchmarks.__main__ as command_line
from benchmarks.study import findings, inner, units
from benchmarks.study.judge import frechet_distance, split
from benchmarks.study.plan import METHODS, PLANS, SOLVING, TIMED_STEPS, VANILLA, unit
from dtr_kernels.files import locked, write_tensors
from examples import digits
from examples.train import Recipe, Training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder of a quick study that was interrupted twice, and the models that were trained in each part of it."""
    folder = tmp_path_factory.mktemp("study")
    trained: list[list[str]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        train, specialist = units.Study.train, units.Study.specialist

        def counted(self, name, recipe):
            if len(trained) == 1 and len(trained[0]) == 3:
                raise KeyboardInterrupt
            trained[-1].append(name)
            return train(self, name, recipe)

        def stopped(self, k, seed):
            if len(trained) == 2 and k == 1:
                raise units.Interrupted
            return specialist(self, k, seed)

        patch.setattr(units, "TIMED_STEPS", 3)
        patch.setattr(units.Study, "train", counted)
        patch.setattr(units.Study, "specialist", stopped)
        for expected in (130, 130, 0):
            trained.append([])
            assert command_line.main(["study", "--quick", "--out", str(folder)]) == expected
    torch.set_num_threads(threads)
    return folder, trained


def test_an_interrupted_study_trains_every_model_once(quick):
    _, trained = quick
    assert [len(part) for part in trained] == [3, 9, 12]
    assert sorted(itertools.chain(*trained)) == sorted(unit(method, seed) for method in METHODS for seed in range(2))


def test_a_study_has_all_figures(quick):
    folder, _ = quick
    study = json.loads((folder / "quick.json").read_text())
    plan = PLANS["quick"]
    assert list(study["methods"]) == list(METHODS)
    for of_method in study["methods"].values():
        losses = torch.tensor(of_method["losses"])
        assert losses.shape == (plan.seeds, 1000 // plan.loss_every) and losses.isfinite().all() and (losses > 0).all()
        assert len(of_method["distance"]) == len(of_method["recognised"]) == plan.seeds
        assert all(math.isfinite(distance) and distance > 0 for distance in of_method["distance"])
        assert all(0 <= share <= 1 for share in of_method["recognised"])
        assert len(of_method["seconds"]) == 3
    different = {json.dumps(of_method["losses"]) for of_method in study["methods"].values()}
    assert len(different) == len(METHODS)
    assert torch.tensor(study["transfer"]).shape == (plan.seeds, plan.clusters)
    assert (torch.tensor(study["affinity"]["matrix"]).diagonal() - 1).abs().max() < 1e-6
    assert study["bounds"] == [0, 200, 400, 600, 800, 1000]
    assert study["real"]["training images"] + study["real"]["held-out images"] == 1797
    assert study["commits"] and study["environment"]["command"].startswith("python -m benchmarks")
    page = (folder / "quick.md").read_text()
    assert page == findings.markdown(study)
    assert all(method in page for method in METHODS) and "quick.png" in page
    assert (folder / "quick.png").stat().st_size > 50_000


def test_a_study_from_before_a_method_says_nothing_of_it(quick, tmp_path):
    study = json.loads((quick[0] / "quick.json").read_text())
    assert all("+u(t)" in text for text in (findings.markdown(study), findings.sentences(study)[1]))
    del study["methods"]["+u(t)"]
    assert "+u(t)" not in findings.markdown(study) and "+Min-SNR: loss" in findings.sentences(study)[1]
    study["plan"]["name"] = "cpu"
    (tmp_path / findings.DOCS).mkdir(parents=True)
    (tmp_path / findings.DOCS / "cpu.json").write_text(json.dumps(study))
    block = findings.methods_block(tmp_path)
    assert "\n| +Min-SNR " in block and "\n| vanilla" not in block
    assert block.endswith("Newer than that run, and not in it: +u(t).") and "(study/cpu.md)" in block


def test_a_finished_study_trains_nothing(quick, monkeypatch):
    folder, _ = quick
    monkeypatch.setattr(Training, "step", lambda self: pytest.fail("something was trained again"))
    assert command_line.main(["study", "--quick", "--out", str(folder)]) == 0


@pytest.mark.parametrize(
    "name, damage, remedy",
    [
        ("plan.json", lambda path: path.write_text("{}"), "delete it"),
        ("real.json", lambda path: path.write_text(path.read_text().replace("1438", "1439")), "delete it"),
        ("seconds.json", lambda path: path.write_bytes(b"\x00" * 100), "delete it"),
        ("transfer, seed 0.json", lambda path: (path.unlink(), path.mkdir()), "delete it"),
        ("+UW, seed 1.json", lambda path: path.write_text("[" * 100_000), "delete it"),
        ("classifier.pt", lambda path: path.write_bytes(path.read_bytes()[:-200]), "delete it"),
        ("classifier.pt", lambda path: write_tensors({"a": torch.ones(2)}, path), "delete it"),
        ("vanilla, seed 0 images.pt", lambda path: path.unlink(), "seed 0.json"),
        ("+Nash, seed 0 images.pt", lambda path: write_tensors(torch.ones(3), path), "delete"),
    ],
)
def test_a_damaged_file_of_a_study_is_named(quick, tmp_path, capsys, name, damage, remedy):
    folder = shutil.copytree(quick[0], tmp_path / "study")
    damage(folder / name)
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["study", "--quick", "--out", str(folder)])
    said = capsys.readouterr().err
    assert str(folder / name) in said and remedy in said and "Traceback" not in said


def test_what_was_deleted_is_made_anew(quick, tmp_path):
    folder = shutil.copytree(quick[0], tmp_path / "study")
    found = json.loads((folder / "quick.json").read_text())
    for name in ("+UW, seed 0.json", "+UW, seed 0 images.pt", "real.json", "transfer, seed 1.json", "+R-TR, seed 0.pt"):
        (folder / name).unlink()
    assert command_line.main(["study", "--quick", "--out", str(folder)]) == 0
    again = json.loads((folder / "quick.json").read_text())
    for method, of_method in found["methods"].items():
        assert again["methods"][method]["losses"] == of_method["losses"]
        assert again["methods"][method]["distance"] == pytest.approx(of_method["distance"], rel=1e-6)
    torch.testing.assert_close(torch.tensor(again["transfer"]), torch.tensor(found["transfer"]), rtol=1e-3, atol=1e-3)


def test_a_study_is_of_one_process_at_a_time(quick, capsys):
    folder, _ = quick
    with locked(folder / "study", "busy"), pytest.raises(SystemExit, match="2"):
        command_line.main(["study", "--quick", "--out", str(folder)])
    assert f"another process works on the study in {folder}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [findings, inner], ids=["methods", "inner"])
def test_committed_studies_that_are_damaged_are_named(quick, tmp_path, kind):
    root = Path(__file__).parent.parent
    name = "cpu.json" if kind is findings else "inner.json"
    (tmp_path / findings.DOCS).mkdir(parents=True)
    good = (root / findings.DOCS / name).read_text()
    path = tmp_path / findings.DOCS / name
    path.write_text(good)
    assert kind.committed(tmp_path)
    for bad in (good[:-20], "[]", good.replace('"losses"', '"loss"'), good.replace('"name": "', '"name": "../')):
        path.write_text(bad)
        with pytest.raises(ValueError, match=f"{path} does not hold a study of this version"):
            kind.committed(tmp_path)


def test_a_folder_of_another_study_is_refused(quick, capsys):
    folder, _ = quick
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["study", "--out", str(folder)])
    assert "holds a study with name 'quick', and this one has 'cpu'; give another --out" in capsys.readouterr().err


def test_the_study_of_scope_inner(tmp_path, monkeypatch, capsys):
    """All of it once, very small: a method trains as many steps as fit into vanilla's time."""
    plan = dataclasses.replace(inner.INNER_PLANS["quick"], seeds=1, steps=4, epochs=1, sampling_steps=2)
    monkeypatch.setitem(inner.INNER_PLANS, "quick", plan)
    monkeypatch.setattr(units, "TIMED_STEPS", 3)
    milliseconds = iter(range(len(inner.methods(plan)), 0, -1))  # of each method's steps

    def timer(self, calls, graph):
        seconds = next(milliseconds) / 1e3
        return lambda: seconds

    monkeypatch.setattr(units.Stopwatch, "timer", timer)
    assert command_line.main(["study", "--inner", "--quick", "--out", str(tmp_path)]) == 0
    study = json.loads((tmp_path / "inner quick.json").read_text())
    assert list(study["methods"]) == list(inner.methods(plan))
    assert [recipe.get("hidden_size", 32) for recipe in inner.methods(plan).values()] == [32] * 7 + [28, 24]
    steps = {method: [run["steps"] for run in runs] for method, runs in study["as long"].items()}
    assert steps == {"inner 75%, alpha 1": [6], "inner 50%, alpha 1": [12], "28 channels": [18], "24 channels": [36]}
    page = (tmp_path / "inner quick.md").read_text()
    assert page == inner.markdown(study) and all(method in page for method in study["methods"])
    assert inner.sentence(study) in capsys.readouterr().out
    assert (tmp_path / "inner quick.png").stat().st_size > 30_000


def test_every_method_sees_the_same_batches(seed, monkeypatch):
    images, labels = digits.load_images()
    settings = PLANS["quick"].settings()
    seen = []
    for changes in METHODS.values():
        training = Training(Recipe(seed=seed % 1000, **settings, **changes), images, labels)
        batches, draw = [], training._batch
        monkeypatch.setattr(
            training, "_batch", lambda batches=batches, draw=draw: batches.append(draw()) or batches[-1]
        )
        for _ in range(3):
            training.step()
        seen.append([tensor for batch in batches for tensor in batch])
    for tensors in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tensors, seen[0], strict=True))


def test_the_first_weights_are_the_same_for_every_method(seed):
    images, labels = digits.load_images()
    settings = PLANS["quick"].settings()
    trainings = [Training(Recipe(seed=seed, **settings, **changes), images, labels) for changes in METHODS.values()]
    for training in trainings[1:]:
        for a, b in zip(training.model.parameters(), trainings[0].model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_frechet_distance_by_another_root(seed):
    a = torch.randn(200, 9) @ torch.randn(9, 9)
    b = torch.randn(150, 9) @ torch.randn(9, 9) + torch.randn(9)
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x + cov_y - 2 * sqrtm(cov_x @ cov_y).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_features_that_are_constant():
    a = torch.randn(100, 4) * torch.tensor([1.0, 1, 1, 0])
    assert frechet_distance(a, a + torch.tensor([0.0, 0, 0, 3])) == pytest.approx(9, abs=1e-6)


def test_held_out_images_are_never_trained_on():
    images = torch.arange(1797.0)[:, None, None, None].expand(-1, 1, 8, 8)
    training, held_out = split(images, torch.arange(1797))
    assert len(training.labels) == 1438 and len(held_out.labels) == 359
    together = torch.cat([training.labels, held_out.labels])
    assert together.sort().values.tolist() == list(range(1797))
    assert torch.equal(training.images[:, 0, 0, 0].long(), training.labels)


def test_changes_are_taken_seed_by_seed():
    change = findings.Change.of([1.1, 2.0, 2.7], [1.0, 2.5, 3.0])
    assert change.each == pytest.approx((0.1, -0.2, -0.1))
    assert str(change) == "-6.7% (-20.0% to +10.0%), lower in 2 of 3 seeds"
    assert findings.Change.of([1, 2], [2, 3]).verdict == "lower in every seed"
    assert findings.Change.of([2, 3], [1, 2]).verdict == "higher in every seed"
    assert findings.Change.of([1, 2], [1, 2]).verdict == "lower in 0 of 2 seeds"


def test_the_time_of_a_step_counts_the_one_that_solves_as_one_in_25():
    seconds = [1.0] * TIMED_STEPS
    seconds[SOLVING] = 26.0
    assert findings.step_seconds({"methods": {VANILLA: {"seconds": seconds}}}, VANILLA) == 2.0


def known_study():
    """Two seeds, four timesteps in two intervals; only the figures that are asked for."""
    return {
        "plan": {"clusters": 2, "seeds": 2},
        "methods": {VANILLA: {"losses": [[1.0, 3.0, 4.0, 6.0], [2.0, 2.0, 5.0, 5.0]]}},
        "specialists": [[[1.0, 2.0], [6.0, 5.0]], [[1.0, 1.0], [5.0, 5.0]]],
        "affinity": {"matrix": [[1, 0.9, 0.2, 0.1], [0.9, 1, 0.8, 0.3], [0.2, 0.8, 1, 0.7], [0.1, 0.3, 0.7, 1]]},
    }


def test_the_sign_of_gaps_and_what_is_near():
    gaps = findings.loss_gaps(known_study())
    torch.testing.assert_close(gaps, torch.tensor([[-0.25, 0.1], [-0.5, 0.0]], dtype=torch.float64))
    near, far = findings.affinity_falls(known_study())
    assert near == pytest.approx((0.9 + 0.8 + 0.7) / 3) and far == pytest.approx((0.2 + 0.1 + 0.3) / 3)


def test_intervals_and_the_best_in_words():
    study = {"bounds": [0, 200, 400, 1000]}
    assert findings._intervals(study, torch.tensor([False, False, False])) == "nowhere"
    assert findings._intervals(study, torch.tensor([True, False, False])) == "at t 0..199"
    assert findings._intervals(study, torch.tensor([True, False, True])) == "at t 0..199, 400..999"
    study = {"methods": {method: {"distance": [2.0, 2.0]} for method in METHODS}}
    study["methods"]["+UW"]["distance"] = [1.0, 3.0]
    assert findings._best(study).startswith("No method")
    study["methods"]["+UW"]["distance"] = [1.0, 1.0]
    assert findings._best(study) == "+UW has the smallest distance in every seed."


def test_a_checkout_without_a_study(tmp_path):
    for block in findings.readme_block, findings.methods_block:
        assert block(tmp_path) == "The study has not been run: `make study`."


def test_the_largest_study_is_the_readme_s(quick, tmp_path):
    folder, _ = quick
    study = json.loads((folder / "quick.json").read_text())
    docs = tmp_path / findings.DOCS
    docs.mkdir(parents=True)
    for name in ("cpu", "cuda"):
        study["plan"] = dict(study["plan"], name=name)
        (docs / f"{name}.json").write_text(json.dumps(study))
        text = findings.readme_block(tmp_path)
        assert f"docs/study/{name}.md" in text
        for method in METHODS:
            assert (f" {method} " in text) == (method != VANILLA)


def test_committed_pages_show_their_figures():
    for study in findings.committed(Path(__file__).parent.parent):
        assert (Path(__file__).parent.parent / findings.DOCS / f"{study['plan']['name']}.png").is_file()
