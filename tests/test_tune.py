"""``python -m benchmarks tune``: which tile or crossover is chosen, what becomes of the file, and whether the gate lets
wrong tiles through.

Times and compilers are stand-ins, except in the test for a GPU. Kernels run in Triton's interpreter, in a process of
its own: the tests of this file that need it are skipped here and run there.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_tiles import MEASUREMENT, ask, entry, files  # noqa: F401  # a fixture

from benchmarks import tune
from dtr_kernels.ops import dispatch, tiles, tuned_tiles
from dtr_kernels.ops.tiles import KINDS, NEVER, Crossover, GemmTile, RowTile, Tiles, crossovers, forced

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
CROSSOVERS = crossovers()
TILED = [op for op in KINDS if op not in CROSSOVERS]
OURS, CUBLAS = tune.OURS, tune.CUBLAS
DEFAULT, SLOW, FAST, FASTEST = (RowTile(rows, 2048, 16) for rows in (1, 2, 4, 8))
PROBLEM = tune.Problem("norm_forward", torch.bfloat16, 1152, 256, 32)
SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# Launchers' names for the sides of a tile.
OPTIONS = {"m": "BLOCK_M", "n": "BLOCK_N", "k": "BLOCK_K", "rows": "ROWS", "block": "BLOCK"}
OPTIONS |= {"warps": "num_warps", "stages": "num_stages"}


# --- choosing --------------------------------------------------------------------------------------------------------


class Trial:
    """Tiles with given times, each of which scatters by ``noise``: by the same numbers in every run of a test, since of
    fresh ones some make a tile that is slightly faster clearly faster."""

    def __init__(self, times, noise=0.0, unusable=None, errors=None):
        self.times, self.noise, self.random = times, noise, random.Random(0)
        self.reasons, self.errors = unusable or {}, errors or {}
        self.timed = []

    def unusable(self, tiles):
        return {tile: self.reasons[tile] for tile in tiles if tile in self.reasons}

    def error(self, tile):
        assert tile not in self.reasons or tile in (DEFAULT, OURS, CUBLAS), "a tile that does not run was run"
        return self.errors.get(tile, 0.0)

    def timer(self, tile):
        self.timed.append(tile)
        return lambda: self.times[tile] * self.random.uniform(1, 1 + self.noise)


def choose(bound=0.01, **trial):
    return tune.choose(DEFAULT, [SLOW, DEFAULT, FAST, FASTEST], bound, Trial(**trial))


TIMES = {DEFAULT: 10e-6, SLOW: 20e-6, FAST: 8e-6, FASTEST: 5e-6}


def test_the_fastest_is_chosen():
    assert choose(times=TIMES) == (FASTEST, 5e-6, 10e-6)
    assert choose(times=TIMES, noise=0.1).tile == FASTEST


def test_the_default_stays_unless_another_is_clearly_faster():
    near = TIMES | {FAST: 9.9e-6, FASTEST: 9.85e-6}
    assert choose(times=near) == (DEFAULT, 10e-6, 10e-6)
    assert choose(times=near | {FASTEST: 9.7e-6}).tile == FASTEST
    assert choose(times=near | {FASTEST: 9.7e-6}, noise=0.3).tile == DEFAULT
    assert choose(times=TIMES | {FAST: 11e-6, FASTEST: 12e-6}).tile == DEFAULT


@pytest.mark.parametrize("error", [0.02, math.inf, math.nan])
def test_a_wrong_tile_is_never_chosen(error):
    assert choose(times=TIMES, errors={FASTEST: error, SLOW: 0.01}).tile == FAST


@pytest.mark.parametrize("reason", [tune.SPILLS, "OutOfResources: shared memory"])
def test_an_unusable_tile_is_never_run_nor_chosen(reason):
    assert choose(times=TIMES, unusable={FASTEST: reason}).tile == FAST


def test_everything_else_being_unusable_leaves_the_default():
    unusable = dict.fromkeys((SLOW, FAST, FASTEST), tune.SPILLS)
    assert choose(times=TIMES, unusable=unusable) == (DEFAULT, 10e-6, 10e-6)


def test_a_default_that_spills_is_still_what_others_are_compared_with():
    assert choose(times=TIMES, unusable={DEFAULT: tune.SPILLS}) == (FASTEST, 5e-6, 10e-6)


def test_without_a_right_default_nothing_is_chosen():
    with pytest.raises(tune.NotTuned, match=r"default tile is wrong: error 2\.0e-02, allowed 1\.0e-02"):
        choose(times=TIMES, errors={DEFAULT: 0.02})
    with pytest.raises(tune.NotTuned, match="default tile does not run: too large"):
        choose(times=TIMES, unusable={DEFAULT: "too large"})


def test_tiles_alternate():
    order = []
    timers = {tile: lambda tile=tile: order.append(tile) or 1.0 for tile in (DEFAULT, FAST, FASTEST)}
    seconds = tune.alternating(timers, 6)
    assert {tile: len(taken) for tile, taken in seconds.items()} == {DEFAULT: 6, FAST: 6, FASTEST: 6}
    rounds = [order[i : i + 3] for i in range(3, len(order), 3)]  # the first warms up
    assert [first for first, *_ in rounds] == [DEFAULT, FAST, FASTEST] * 2


def test_spilling_and_failing_tiles_are_found(monkeypatch):
    """A problem may have two launches, as the library calls some ops in several ways."""

    class Kernel:
        def __init__(self, spills=0, error_in_thread=None, launch_error=None):
            self.spills, self.error_in_thread, self.launch_error = spills, error_in_thread, launch_error

        def warmup(self, *args, grid, **options):
            if self.error_in_thread:
                raise self.error_in_thread
            assert (args, grid, options) == ((1,), (3,), {"num_warps": 4})

        def __getitem__(self, grid):
            def run(*args, **options):
                if self.launch_error:
                    raise self.launch_error
                return SimpleNamespace(n_spills=self.spills)

            return run

    kernels = {
        DEFAULT: [Kernel(), Kernel()],
        SLOW: [Kernel(), Kernel(spills=2)],
        FAST: [Kernel(), Kernel(error_in_thread=SystemError("recursion depth"))],  # which may be chance
        FASTEST: [Kernel(launch_error=ValueError("out of resource\nmore")), Kernel()],
    }
    trial = object.__new__(tune.TrialOnGpu)
    trial._device = None
    trial._launches = lambda tile: [dispatch.Launch(kernel, 3, (1,), {"num_warps": 4}) for kernel in kernels[tile]]
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert trial.unusable(list(kernels)) == {
        SLOW: tune.SPILLS,
        FASTEST: "ValueError: out of resource",
    }


# --- crossovers ------------------------------------------------------------------------------------------------------


def crossover(ours, default=NEVER, batch=8, tokens=64, **trial):
    """The choice where our GEMM takes ``ours[samples]`` and cuBLAS 10 µs a sample; and the samples of the trials."""
    tried = []

    def trial_of(problem):
        tried.append(problem.batch)
        return Trial({OURS: ours[problem.batch], CUBLAS: 10e-6 * problem.batch}, **trial)

    problem = replace(PROBLEM, op="windows_forward", tokens=tokens, batch=batch)
    return tune.choose_crossover(problem, Crossover(default), 0.01, trial_of), tried


FROM_FOUR = {8: 50e-6, 4: 30e-6, 2: 25e-6, 1: 20e-6}


@pytest.mark.parametrize(
    "ours, tokens, seconds, tried",
    [
        (FROM_FOUR, 256, 50e-6, [8, 4, 2]),
        ({8: 50e-6, 4: 30e-6, 2: 15e-6, 1: 5e-6}, 64, 50e-6, [8, 4, 2, 1]),
        ({8: 90e-6}, NEVER, 80e-6, [8]),
        ({8: 79e-6}, NEVER, 80e-6, [8]),  # by less than the margin
        ({8: 50e-6, 4: 50e-6, 2: 15e-6, 1: 5e-6}, 512, 50e-6, [8, 4]),  # below, nothing is asked any more
    ],
)
def test_our_gemm_runs_from_where_it_is_faster_at_every_larger_size(ours, tokens, seconds, tried):
    assert crossover(ours) == ((Crossover(tokens), seconds, 80e-6), tried)


def test_a_crossover_is_clearly_faster_too():
    assert crossover(FROM_FOUR, noise=0.1)[0].tile == Crossover(256)
    assert crossover(FROM_FOUR | {8: 75e-6}, noise=0.3)[0].tile == CUBLAS


def test_a_crossover_is_a_power_of_two():
    """Between a batch for which our GEMM is faster and the half of it, for which it is not."""
    ours = {12: 100e-6, 6: 50e-6, 3: 90e-6}
    assert crossover(ours, batch=12)[0].tile == Crossover(256)
    assert crossover(ours, batch=12, tokens=100)[0].tile == Crossover(512)


@pytest.mark.parametrize(
    "ours, default, seconds, default_seconds",
    [
        (FROM_FOUR, 1, 50e-6, 50e-6),
        (FROM_FOUR, 512, 50e-6, 50e-6),
        (FROM_FOUR, 1024, 50e-6, 80e-6),
        ({8: 90e-6}, 512, 80e-6, 90e-6),
        ({8: 90e-6}, 1024, 80e-6, 80e-6),
    ],
)
def test_seconds_of_a_crossover_are_those_of_the_largest_batch(ours, default, seconds, default_seconds):
    assert crossover(ours, default)[0][1:] == (seconds, default_seconds)


@pytest.mark.parametrize("way, name", [(OURS, "our GEMM"), (CUBLAS, "cuBLAS")])
def test_without_two_right_ways_there_is_no_crossover(way, name):
    for wrong in (0.02, math.nan):
        with pytest.raises(tune.NotTuned, match=f"{name}, for 8 samples, is wrong: error"):
            crossover(FROM_FOUR, errors={way: wrong})
    with pytest.raises(tune.NotTuned, match=f"{name}, for 8 samples, does not run: too large"):
        crossover(FROM_FOUR, unusable={way: "too large"})


def test_a_kernel_that_spills_has_a_crossover():
    """It is the fastest tile that was found: what counts is whether it beats cuBLAS."""
    assert crossover(FROM_FOUR, unusable=dict.fromkeys((OURS, CUBLAS), tune.SPILLS))[0].tile == Crossover(256)


# --- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize("op", TILED)
def test_candidates_can_run_and_fit(op, arch):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (1, 16, 64, 256):
            for channels in (64, 384, 1152):
                problem = tune.Problem(op, dtype, channels, tokens, 4)
                tiles = tune.candidates(problem, arch, SHARED_MEMORY[arch])
                assert 3 <= len(tiles) == len(set(tiles)) <= 48, (problem, len(tiles))
                _, _, width, rows, _ = problem.key
                for tile in tiles:
                    assert KINDS[op].problem(tile, rows, width) is None
                    if isinstance(tile, GemmTile):
                        # The weight gradient keeps one load under way for two stages.
                        loads = (tile.stages + 1) // 2 if op == "weight_gradient" else tile.stages
                        assert loads * (tile.m + tile.n) * tile.k * dtype.itemsize <= SHARED_MEMORY[arch]


def problems_of(models, names, precisions=("bf16",), betas=(0.2, 0.5, 0.8)):
    return tune.problems_of(models, precisions, names, 8, betas)


def test_problems_are_those_of_the_models_and_none_twice():
    problems = problems_of(["DiT-S/2", "DiT-S/4", "DiT-XL/2", "DiT-S/2"], ["forward", "token_sums"])
    assert [problem.key for problem in problems] == [
        ("forward", "bfloat16", 384, 128, 100),
        ("token_sums", "bfloat16", 1152, 128, 100),
        ("forward", "bfloat16", 384, 64, 100),
        ("token_sums", "bfloat16", 1152, 64, 100),
        ("forward", "bfloat16", 1152, 128, 100),
        ("token_sums", "bfloat16", 3456, 128, 100),
    ]
    assert {problem.beta for problem in problems} == {0.8}
    # Whatever the order they are given in, crossovers come after the tiles that they are timed with.
    given = ["gelu_backward", "windows_forward", "forward", "gelu_input_gradient"]
    ordered = problems_of(["DiT-S/2", "DiT-B/2"], given, ["bf16", "fp32"], betas=[0.5])
    assert [(problem.channels, problem.op) for problem in ordered if problem.dtype == torch.bfloat16] == [
        (channels, op) for channels in (384, 768) for op in (*given[2:], *given[:2])
    ]
    # fc2's input gradient has no windows: 16 tokens of 8 samples are 128 rows, as 256 tokens are.
    assert len(problems_of(["DiT-S/2", "DiT-S/8"], ["gelu_input_gradient"])) == 1
    with pytest.raises(ValueError, match=r"--model: there is no DiT-M/2; there are DiT-S/2"):
        problems_of(["DiT-M/2"], ["forward"])


def test_crossovers_of_windows_are_found_for_each_share_and_for_none_twice():
    ops = ["windows_backward", "gelu_forward"]
    for betas, shares in [((0.2, 0.5, 0.8), [20, 50, 80]), ((0.8, 0.1, 0.8001), [80, 10])]:
        problems = problems_of(["DiT-XL/2", "DiT-XL/2"], ops, betas=betas)
        assert [problem.key[-1] for problem in problems] == [*shares, 100]
        for problem, beta in zip(problems, [*betas[: len(shares)], 0.8], strict=True):
            assert problem.beta == beta
            call = tune.calls_of(replace(problem, batch=1, tokens=2), torch.device("meta"))[0]
            assert call.keywords.get("width", 921) == int(beta * 1152)


# --- the file --------------------------------------------------------------------------------------------------------


def choices(problem):
    return tune.Choice(FAST, 8e-6, 10e-6)


def problems(*widths):
    return [replace(PROBLEM, channels=channels) for channels in widths]


WIDTHS = (1152, 1100, 1200)  # of one padded row


def found_in(path):
    return {entry.channels: entry for entry in tuned_tiles.read(path)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "tuned.json"


def test_results_are_merged_with_what_the_file_holds(path):
    first = tune.Tuning(path, MEASUREMENT)
    first.run(problems(1152, 1100), choices)
    later = replace(MEASUREMENT, date="2027-01-01")
    second = tune.Tuning(path, later)
    second.run(problems(1100, 1200), lambda problem: tune.Choice(DEFAULT, 9e-6, 9e-6))
    found = found_in(path)
    assert {channels: (entry.tile, entry.measurement) for channels, entry in found.items()} == {
        1152: (FAST, MEASUREMENT),
        1100: (DEFAULT, later),
        1200: (DEFAULT, later),
    }
    assert (found[1152].seconds, found[1152].default_seconds) == (8e-6, 10e-6)


def test_every_result_is_saved_at_once_and_stays_after_an_interrupt(path):
    """A machine that is taken away asks nobody."""
    saved = []

    def interrupted_at_the_third(problem):
        saved.append(len(found_in(path)) if path.exists() else 0)
        if problem.channels == WIDTHS[2]:
            raise KeyboardInterrupt
        return choices(problem)

    tuning = tune.Tuning(path, MEASUREMENT)
    tuning.run(problems(*WIDTHS), interrupted_at_the_third)
    assert saved == [0, 1, 2] and tuning.interrupted and not tuning.failures
    assert set(found_in(path)) == set(WIDTHS[:2])


def test_a_time_limit_starts_nothing_more(path, monkeypatch):
    clock = iter([0.0, 1.0, 59.0, 61.0])
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(clock))
    tuning = tune.Tuning(path, MEASUREMENT)
    tuning.run(problems(*WIDTHS), choices, seconds=60)
    assert set(found_in(path)) == set(WIDTHS[:2]) and not tuning.interrupted


@pytest.mark.parametrize("error", [tune.NotTuned("wrong"), RuntimeError("CUDA out of memory\nmore")])
def test_what_fails_is_told_and_the_rest_goes_on(path, error):
    def fail_once(problem):
        if problem.channels == 1152:
            raise error
        return choices(problem)

    tuning = tune.Tuning(path, MEASUREMENT)
    tuning.run(problems(*WIDTHS), fail_once)
    assert tuning.failures == {PROBLEM: str(error).partition("\n")[0]}
    assert set(found_in(path)) == {1100, 1200}


def test_a_file_that_holds_something_else_is_not_overwritten(path):
    path.parent.mkdir()
    path.write_text("my notes")
    with pytest.raises(ValueError, match=r"tuned\.json does not hold JSON .* delete it, or .* --out"):
        tune.Tuning(path, MEASUREMENT)
    assert path.read_text() == "my notes"


@pytest.mark.parametrize("folder", ["/proc", "/proc/there", "/dev/null/there"])
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(folder):
    with pytest.raises(ValueError, match=rf"{folder} cannot be written to \(.*\); choose a file with --out"):
        tune.Tuning(Path(folder) / "tuned.json", MEASUREMENT)


def test_what_another_process_adds_meanwhile_stays(path):
    def choose_as_another_ends(problem):
        tune.Tuning(path, MEASUREMENT).run(problems(1100), choices)
        return choices(problem)

    tune.Tuning(path, MEASUREMENT).run(problems(1152), choose_as_another_ends)
    assert set(found_in(path)) == {1152, 1100}


def test_without_a_home_a_file_must_be_given(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("DTR_KERNELS_CACHE", raising=False)
    with pytest.raises(ValueError, match=r"home folder is unknown, .* --out"):
        tune.cached_file("NVIDIA H200")


def test_the_table():
    tuned_entry = replace(entry("norm_forward", tile=FAST), seconds=8e-6)
    header, line = tune.table([tuned_entry]).splitlines()
    said = "norm_forward bfloat16 1152 128 100% 20.0 µs 8.0 µs 150.0% rows 4 block 2048 warps 16"
    assert line.split() == said.split()
    assert header.split() == ["op", "dtype", "width", "rows", "active", "default", "best", "gain", "tile"]
    for way, words in ((Crossover(4096), "from 4,096 tokens on"), (CUBLAS, "never"), (OURS, "always")):
        assert tune.table([entry("gelu_forward", tile=way)]).splitlines()[1].endswith(f"100.0%  {words}")


@pytest.mark.usefixtures("files")
def test_what_was_just_tuned_is_used_for_what_comes_after(path):
    """Though the file is not the user's, and the user's says something else. It does not count afterwards."""
    tuned_tiles.write(tuned_tiles.user_file("NVIDIA H200"), [entry("norm_forward", tile=SLOW)])

    def choose_and_look(problem):
        found.append(ask("norm_forward"))
        return tune.Choice(FASTEST, 1e-6, 2e-6) if problem == PROBLEM else tune.Choice(OURS, 1e-6, 2e-6)

    found = []
    assert ask("norm_forward") == SLOW
    tune.Tuning(path, MEASUREMENT).run([PROBLEM, replace(PROBLEM, op="gelu_forward")], choose_and_look)
    assert found == [PROBLEM.default(90), FASTEST]
    assert ask("norm_forward") == SLOW


# --- command line ----------------------------------------------------------------------------------------------------


def arguments(*given):
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args(given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="no CUDA device"):
        tune.main(arguments())


@pytest.mark.parametrize(
    "given",
    [
        ["--dtype", "autocast"],
        ["--ops", "attention"],
        ["--batch", "0"],
        ["--seconds", "x"],
        ["--beta", "0.5", "0"],
        ["--beta", "1.1"],
        ["--beta", "nan"],
        ["--beta", "half"],
    ],
)
def test_arguments_that_do_not_fit_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        arguments(*given)
    assert given[0] in capsys.readouterr().err


def test_the_command_line_from_end_to_end(monkeypatch, path, capsys):
    """With a device, a compiler and times that are made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(tune, "measurement_on", lambda device: MEASUREMENT)
    monkeypatch.setattr(tune, "Stopwatch", lambda device: None)
    monkeypatch.setenv("DTR_KERNELS_CACHE", str(path.parent))

    def choose_on(problem, device, stopwatch):
        if problem.op == "residual_backward":
            raise tune.NotTuned("the default tile is wrong")
        tile = problem.default(90)
        return tune.Choice(tile._replace(rows=1), 1e-6, 2e-6)

    monkeypatch.setattr(tune, "choose_on", choose_on)
    ops = ("--model", "DiT-XL/2", "--dtype", "bf16", "--ops", "norm_forward", "residual_forward")
    assert tune.main(arguments(*ops)) == 0
    assert "100.0%  rows 1 block 2048 warps 16" in capsys.readouterr().out
    assert len(tuned_tiles.read(tuned_tiles.user_file("NVIDIA H200"))) == 2
    assert tune.main(arguments(*ops, "residual_backward", "--out", str(path))) == 1
    told = "not tuned: residual_backward bf16, 1152 channels, beta 0.8, 256 tokens: the default"
    assert told in capsys.readouterr().err
    assert len(tuned_tiles.read(path)) == 2


@pytest.mark.parametrize("op", KINDS)
def test_an_op_has_a_tile_or_a_crossover_chosen(op, monkeypatch):
    monkeypatch.setattr(tune, "capability", lambda x: 90)
    monkeypatch.setattr(tune, "max_shared_mem", lambda index: SHARED_MEMORY[90])
    monkeypatch.setattr(tune, "TrialOnGpu", lambda problem, device, stopwatch: (problem, device, stopwatch))
    monkeypatch.setattr(tune, "choose", lambda default, tiles, bound, trial: (default, bound, trial))
    monkeypatch.setattr(
        tune,
        "choose_crossover",
        lambda problem, default, bound, trial_of: (default, bound, trial_of(replace(problem, batch=2))),
    )
    problem, device = replace(PROBLEM, op=op), torch.device("cpu")
    tried = replace(problem, batch=2) if op in CROSSOVERS else problem
    expected = problem.default(90), tune.BOUNDS[torch.bfloat16], (tried, device, "stopwatch")
    assert tune.choose_on(problem, device, "stopwatch") == expected


# --- launchers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Questions for tiles and crossovers, of launchers for which the CPU stands in for a GPU."""
    questions, tile = [], Tiles.tile

    def spy(kind, x, rows, channels, active=100):
        questions.append((kind.name, x, rows, channels, active))
        return tile(kind, x, rows, channels, active)

    monkeypatch.setattr(tiles, "_forced", {})  # what other tests of kernels want
    monkeypatch.setattr(Tiles, "tile", spy)
    with dispatch.recording(90):
        yield questions


def assert_asked_as_keyed(asked, problem):
    """Launchers look an op up as its entry is keyed."""
    questions = [question for question in asked if question[0] == problem.op]
    assert questions
    for name, x, rows, channels, active in questions:
        dtype = str(x.dtype).removeprefix("torch.")
        assert (name, dtype, channels, tuned_tiles.rows_class(rows), active) == problem.key


@pytest.mark.parametrize("op", TILED)
def test_every_op_asks_for_its_own_tile(op, asked):
    """The launchers use the default of the op that is tuned, and obey when forced. No crossover keeps them from it."""
    problem = tune.Problem(op, torch.bfloat16, 48, 130, 2)
    calls = tune.calls_of(problem, torch.device("cpu"))
    other = tune.candidates(problem, 90, SHARED_MEMORY[90])[-1]
    for tile, context in [(problem.default(90), contextlib.nullcontext()), (other, forced(op, other))]:
        with dispatch.recording() as launches, context, contextlib.ExitStack() as stack:
            for crossover in CROSSOVERS:
                stack.enter_context(forced(crossover, OURS if "gelu" in op else CUBLAS))
            for call in calls:
                call()
        # A GEMM over windows is preceded by the one for what they leave out.
        own = [each for each in launches if op == "closed_form" or each.kernel.__name__ != "closed_form_kernel"]
        assert len(own) == len(calls) > 0
        for launch in own:
            assert tune.bytes_of(launch) > 0
            for side, value in tile._asdict().items():
                assert launch.options[OPTIONS[side]] == value
    assert_asked_as_keyed(asked, problem)


NORM = {"gated_norm_forward_kernel"}
BACKWARD = {*NORM, "gated_norm_backward_kernel"}
WINDOW = {"closed_form_kernel", "window_forward_kernel"}
WINDOW_GRADIENTS = {
    "closed_form_kernel",
    "token_sums_kernel",
    "window_input_gradient_kernel",
    "window_weight_gradient_kernel",
}


@pytest.mark.parametrize(
    "op, ours, cublas",
    [
        ("windows_forward", {*NORM, *WINDOW}, NORM),
        ("windows_backward", {*BACKWARD, *WINDOW_GRADIENTS}, BACKWARD),
        # Behind a window the product is ours in either case.
        ("gelu_forward", WINDOW, {*WINDOW, "activation_forward_kernel"}),
        ("gelu_backward", {"window_input_gradient_kernel"}, {"activation_backward_kernel"}),
    ],
)
def test_the_two_ways_of_an_op_run_other_kernels(op, ours, cublas, asked):
    problem = tune.Problem(op, torch.bfloat16, 48, 130, 2, beta=0.5)
    calls = tune.calls_of(problem, torch.device("cpu"))

    def kernels():
        with dispatch.recording() as launches:
            for call in calls:
                call()
        return {kernel.__name__ for kernel, *_ in launches}

    for tokens, expected in ((1, ours), (256, ours), (512, cublas), (NEVER, cublas)):
        with forced(op, Crossover(tokens)):
            assert kernels() == expected, tokens
    assert kernels() == (ours if problem.default(90).tokens <= 260 else cublas)
    assert_asked_as_keyed(asked, problem)


@pytest.mark.skipif(not INTERPRETED, reason="run with TRITON_INTERPRET=1, by make test")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", KINDS)
def test_right_tiles_pass_the_gate_and_wrong_ones_do_not(op, dtype, seed):
    random.seed(seed)
    problem = tune.Problem(op, dtype, 40, 20, 2)
    trial = tune.TrialOnGpu(problem, torch.device("cpu"), None)
    others = [OURS, CUBLAS] if op in CROSSOVERS else [random.choice(tune.candidates(problem, 90, SHARED_MEMORY[90]))]
    for tile in [problem.default(90), *others]:
        assert trial.error(tile) <= tune.BOUNDS[dtype] / 2, tile
    kernel, _ = next(iter(tune.kernels_of(op)))
    exact = tune.exact_of(kernel, tune.calls_of(problem, torch.device("cpu"))[0])
    for number, tensor in enumerate(exact):
        # One element of a tensor that is off by a tenth, or was never written, is enough.
        for wrong in (0.1 * tensor.abs().max(), math.nan):
            changed = tensor.clone()
            changed.view(-1)[random.randrange(changed.numel())] += wrong
            assert not tune.largest_error([*exact[:number], changed, *exact[number + 1 :]], exact) <= tune.BOUNDS[dtype]


@pytest.mark.gpu
def test_tuning_on_a_gpu(path, capsys):
    """Small problems, through the command line, with every kind of tile and every crossover."""
    ops = ["forward_gelu", "weight_gradient", "token_sums", "norm_backward_update", *CROSSOVERS]
    given = ("--model", "DiT-S/4", "--dtype", "bf16", "--batch", "4", "--ops", *ops, "--out", str(path))
    assert tune.main(arguments(*given)) == 0, capsys.readouterr().err
    assert {entry.op for entry in tuned_tiles.read(path)} == set(ops)
