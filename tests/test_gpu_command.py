"""``make gpu`` and ``make gpu-benchmarks``: the stage runner of .ci/gpu, with small commands in the place of stages."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / ".ci" / "gpu"


@pytest.fixture
def gpu(monkeypatch):
    loader = importlib.machinery.SourceFileLoader("gpu_command", str(PATH))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_command", loader))
    monkeypatch.setitem(sys.modules, "gpu_command", module)  # where its dataclasses look for it
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE", 0.5)
    return module


def python(gpu, script, **facts):
    return gpu.Stage("stage", [sys.executable, "-c", script], **facts)


def test_states(gpu):
    cases = {
        "ok": python(gpu, "print('well')"),
        "FAILED": python(gpu, "print('badly'); exit(3)"),
        "missing": gpu.Stage("stage", missing="there is none"),
    }
    outcomes = {state: gpu.run(stage, 20) for state, stage in cases.items()}
    assert {state: outcome.state for state, outcome in outcomes.items()} == {state: state for state in cases}
    assert outcomes["ok"].log == ["well"] and outcomes["FAILED"].log == ["badly"]
    assert (outcomes["FAILED"].status, outcomes["FAILED"].why) == (3, "exit status 3")
    assert "there is none" in str(outcomes["missing"]) and str(outcomes["FAILED"]).startswith("FAILED ")


def test_what_a_stage_says_counts(gpu):
    assert gpu.run(python(gpu, "print('a\\nFAILED test_x')", fails="^FAILED .*"), 20).why == "FAILED test_x"
    assert gpu.run(python(gpu, "print('not FAILED')", fails="^FAILED .*"), 20).state == "ok"
    outcome = gpu.run(python(gpu, "print('Device not supported'); exit(1)", unable="Device not supported"), 20)
    assert (outcome.state, outcome.why) == ("missing", "Device not supported")


@pytest.fixture(params=["in front", "in the background"])
def place(request):
    """Background jobs of a shell ignore SIGINT."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN if request.param == "in the background" else signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stage_that_keeps_what_it_has_is_stopped_gently(gpu, place, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "GRACE", 20)  # a busy machine may take seconds to end a child
    script = f"""
import time
try:
    print('begun', flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    open({str(tmp_path / "kept")!r}, 'w').close()
    print('interrupted')
    exit(130)
"""
    outcome = gpu.run(python(gpu, script), 1)
    assert outcome.state == "stopped at its limit" and outcome.log == ["begun", "interrupted"]
    assert (tmp_path / "kept").exists() and outcome.seconds < 1 + gpu.GRACE + 1


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_stage_that_does_not_stop_is_killed_with_its_children(gpu, tmp_path):
    script = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
open({str(tmp_path / "child")!r}, 'w').write(str(child.pid))
time.sleep(60)
"""
    outcome = gpu.run(python(gpu, script), 1)
    assert outcome.state == "stopped at its limit" and 1.5 <= outcome.seconds < 4
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_what_failed_before_the_limit_is_no_success(gpu):
    script = "import time; print('FAILED test_x', flush=True); time.sleep(60)"
    assert gpu.run(python(gpu, script, fails="^FAILED .*"), 1).state == "FAILED"


def test_logs_are_cut_and_progress_bars_are_left_out(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_BYTES", 100)
    log = gpu.run(python(gpu, "print('x' * 1000); print('1%\\r50%\\r100%'); print('last')"), 20).log
    assert log[-2:] == ["100%", "last"] and sum(map(len, log)) <= 100


@pytest.fixture
def checks(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: "/bin/true")
    return gpu.checks()


@pytest.fixture
def benchmarks(gpu, tmp_path):
    return gpu.benchmarks(tmp_path, tmp_path / "scratch")


def simulated(gpu, monkeypatch, stages, taken):
    """(seconds in all, names and limits) of a whole part whose stages take what ``taken`` says of their limits."""
    clock, limits = [0.0], {}

    def run(stage, limit):
        if limit >= 1:
            limits[stage.name] = limit
            clock[0] += taken(stage, limit)
        return gpu.Outcome(stage.name, "ok")

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpu, "GRACE", 10.0)
    gpu.run_all(stages, Path(os.devnull), 0.0)
    return clock[0], limits


def test_checks_end_in_time(gpu, monkeypatch, checks):
    names = ["build", "info", "gpu tests", "verify", "every kernel", "memcheck", "racecheck"]
    assert [stage.name for stage in checks] == names
    # Where all need their limits, the last ones find no time left.
    seconds, limits = simulated(gpu, monkeypatch, checks, lambda stage, limit: limit + gpu.GRACE)
    assert seconds <= gpu.TOTAL < 600 and list(limits) == names[:6]
    seconds, limits = simulated(gpu, monkeypatch, checks, lambda stage, limit: limit / 2)
    assert seconds < gpu.TOTAL and limits == {stage.name: stage.seconds for stage in checks}


def test_benchmarks_end_in_time(gpu, monkeypatch, benchmarks):
    names = ["build", *gpu.BENCHMARKS, "report"]
    assert [stage.name for stage in benchmarks] == names
    for over in (0, 10):
        seconds, limits = simulated(gpu, monkeypatch, benchmarks, lambda stage, limit, over=over: limit + over)
        assert seconds <= gpu.TOTAL and list(limits) == names and limits["report"] == 30
        assert all(limits[name] > 5 for name in gpu.BENCHMARKS) and limits["block"] > 150
    # What one leaves, the others get.
    _, more = simulated(gpu, monkeypatch, benchmarks, lambda stage, limit: 5)
    assert all(more[name] > limits[name] for name in gpu.BENCHMARKS)


def test_sides_that_take_too_long_to_compile_are_left_out(benchmarks):
    skipped = {stage.name: stage.command[stage.command.index("--skip") + 1 : -2] for stage in benchmarks[1:-1]}
    assert skipped.pop("model") == ["max-autotune", "compiled"]
    assert set(map(tuple, skipped.values())) == {("max-autotune",)}


def test_gpu_tests_that_are_skipped_have_not_passed(gpu, checks):
    (tests,) = (stage for stage in checks if stage.name == "gpu tests")
    assert "-rfEs" in tests.command
    said = "SKIPPED [3] tests/test_ops.py:52: NOT RUN: needs an NVIDIA GPU"
    outcome = gpu.run(python(gpu, f"print({said!r})", fails=tests.fails), 20)
    assert (outcome.state, outcome.why) == ("FAILED", "NOT RUN: needs an NVIDIA GPU")


@pytest.mark.parametrize("limit, state", [(1, "stopped at its limit"), (0.5, "no time left")])
def test_only_a_benchmark_that_has_measured_need_not_end(gpu, monkeypatch, tmp_path, capsys, limit, state):
    monkeypatch.setattr(gpu, "limit_of", lambda *_: limit)
    (tmp_path / "measured.json").touch()
    for results, status in ((None, 1), (tmp_path / "nothing.json", 1), (tmp_path / "measured.json", 0)):
        stage = python(gpu, "import time; time.sleep(60)", results=results)
        monkeypatch.setattr(gpu, "checks", lambda stage=stage: [stage])
        assert gpu.main([str(tmp_path), "checks"]) == status
        assert json.loads((tmp_path / "checks.json").read_text())["stages"][0]["state"] == state
        said = capsys.readouterr().out
        assert said.startswith(f"{state} ") and f"{status} of 1 stages failed or did not end" in said


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder on the PATH for the tools of a machine."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_HOME", raising=False)

    def add(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return add


def test_sanitizer_gets_the_options_that_it_knows(gpu, tools):
    assert "PATH" in gpu.sanitizer("memcheck", ["command"]).missing
    tools("compute-sanitizer", "echo ' --error-exitcode arg\n --kernel-name arg'")
    stage = gpu.sanitizer("memcheck", ["command"])
    assert stage.command[1:5] == ["--tool", "memcheck", "--error-exitcode", "99"] and stage.command[-1] == "command"
    assert "kns=dtr4cuda" in stage.command and "--report-api-errors" not in stage.command
    assert stage.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert gpu.sanitizer("racecheck", ["command"]).environment == {}


def test_sanitizer_knows_our_kernels(gpu):
    """A filter that matched none would check none."""
    pytest.importorskip("triton")
    from benchmarks import every_kernel

    names = [name for module in every_kernel.LAUNCHERS for name in vars(module) if name.endswith("_kernel")]
    assert len(names) >= 10
    assert all(any(part in name for part in gpu.OUR_KERNELS) for name in names)
    assert any(part in "_ZN3dtr4cuda19coefficients_kernelEiPKdPKlPd" for part in gpu.OUR_KERNELS)


@pytest.mark.parametrize(
    "said, state",
    [
        ("========= ERROR SUMMARY: 0 errors", "ok"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "ok"),
        ("========= ERROR SUMMARY: 12 errors", "FAILED"),
        ("========= Invalid __global__ read of size 4 bytes", "FAILED"),
        ("========= Error: Race reported between Write access at kernel", "FAILED"),
        ("========= Error: Device not supported. Please refer to the documentation", "missing"),
    ],
)
def test_sanitizer_is_understood(gpu, tools, said, state):
    tools("compute-sanitizer", f"echo '{said}'")
    assert gpu.run(gpu.sanitizer("memcheck", ["command"]), 20).state == state


@pytest.mark.parametrize("target, part", [("gpu", "checks"), ("gpu-benchmarks", "benchmarks")])
def test_make_takes_the_folder(target, part):
    command = ["make", "--no-print-directory", "-n", target, "OUT=there"]  # make may have called the tests itself
    said = subprocess.run(command, cwd=PATH.parent.parent, capture_output=True, text=True)
    assert said.stdout.split()[-3:] == [".ci/gpu", "there", part] and os.access(PATH, os.X_OK)


@pytest.mark.parametrize("arguments", [[], ["there"], ["there", "all"], ["--help", "checks"], ["a", "checks", "b"]])
def test_a_wrong_call_says_how(gpu, capsys, arguments):
    assert gpu.main(arguments) == 2 and "Usage: .ci/gpu OUT checks" in capsys.readouterr().out


def test_main_goes_on_after_a_failure_and_leaves_few_files(gpu, monkeypatch, tmp_path, capsys):
    def benchmarks(results, scratch):
        assert list(results.iterdir()) == []
        kept = [python(gpu, f"open({str(results / name)!r} + '.json', 'w').close()") for name in gpu.BENCHMARKS]
        (scratch / "report.md").touch()
        return [python(gpu, "print('why'); exit(1)"), gpu.Stage("sanitizer", missing="not here"), *kept]

    monkeypatch.setattr(gpu, "benchmarks", benchmarks)
    monkeypatch.setattr(gpu, "checks", lambda: [python(gpu, "")])
    monkeypatch.setattr(gpu, "folder_of_gpu", lambda: "nvidia-h0")
    results = tmp_path / "results/nvidia-h0"
    results.mkdir(parents=True)
    for name in ("block.json", "block.json.unfinished"):  # of an earlier run
        (results / name).touch()
    assert gpu.main([str(tmp_path), "benchmarks"]) == 1
    stored = json.loads((tmp_path / "benchmarks.json").read_text())["stages"]
    assert [stage["state"] for stage in stored] == ["FAILED", "missing", *["ok"] * len(gpu.BENCHMARKS)]
    assert stored[0]["log"] == ["why"] and "1 of 9 stages failed" in capsys.readouterr().out
    assert gpu.main([str(tmp_path), "checks"]) == 0
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"checks.json", "benchmarks.json", *(f"results/nvidia-h0/{name}.json" for name in gpu.BENCHMARKS)}
