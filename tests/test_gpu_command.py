"""``make gpu`` and ``make gpu-benchmarks``: .ci/gpu.py, with small commands in the place of its steps."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).parent.parent
gpu.PYTHON, gpu.GRACE = "true", 2.0
SLEEP = "import time; time.sleep(60)"
CASES = [
    ("verify", SLEEP, "stopped at its limit", ""),
    ("gpu tests", "print('not FAILED')", "ok", ""),
    ("gpu tests", "print('\\nFAILED test_x')", "FAILED", "FAILED test_x"),
    ("gpu tests", "print('ERROR test_x', flush=True); " + SLEEP, "FAILED", "ERROR test_x"),
    ("gpu tests", "print('SKIPPED: NOT RUN: needs an NVIDIA GPU')", "FAILED", "NOT RUN: needs an NVIDIA GPU"),
    ("memcheck", "print('== ERROR SUMMARY: 12 errors')", "FAILED", "SUMMARY: 12 errors"),
    ("memcheck", "print('== Invalid __global__ read')", "FAILED", "== Invalid __global__ read"),
    ("memcheck", "print('== Error: Device not supported.'); exit(1)", "missing", "Device not supported."),
    ("racecheck", "print('== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)')", "ok", ""),
    ("racecheck", "print('== Error: Race reported between')", "FAILED", "== Error: Race reported between"),
]


@pytest.fixture(autouse=True)
def signals():
    """Interrupts reach children, also where the tests are a background job of a shell; what main changes is undone."""
    before = [(number, signal.signal(number, signal.default_int_handler)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("name, script, state, why", CASES)
def test_what_becomes_of_a_step(name, script, state, why):
    step = next(step for step in gpu.checks() if step.name == name)
    facts = gpu.run(step := step._replace(command=[sys.executable, "-c", script]), 1.5)
    assert (facts["state"], facts["why"], facts["failed"]) == (state, why, state not in ("ok", "missing"))
    assert script != SLEEP or not gpu.run(step._replace(results=ROOT), 1)["failed"], "it has measured something"


@pytest.mark.parametrize("end", ["exit()", SLEEP])
def test_a_step_is_interrupted_then_killed_with_its_children(end):
    script = "import subprocess; child = subprocess.Popen(['sh', '-c', 'trap \"\" INT; sleep 60'])\n"
    script += f"print('x' * 300_000, '\\n1%\\r50%\\r100%', flush=True)\ntry: {SLEEP}\n"
    script += f"except KeyboardInterrupt: print(child.pid, flush=True); {end}"
    log = gpu.run(gpu.Step("step", [sys.executable, "-c", script]), 1)["log"]
    assert log[-2] == "100%" and 100_000 < sum(map(len, log)) <= 200_000
    gpu.time.sleep(0.2)
    assert not (child := Path(f"/proc/{log[-1]}/cmdline")).exists() or not child.read_bytes(), "its child still runs"


@pytest.mark.parametrize("part, steps, share", [("checks", 7, 0.3), ("checks", 7, 1), ("benchmarks", 9, 1)])
def test_a_part_ends_in_time(monkeypatch, tmp_path, part, steps, share):
    (earlier := tmp_path / "results" / "unknown-gpu" / "block.json.unfinished").parent.mkdir(parents=True)
    earlier.touch()
    done = []
    monkeypatch.setattr(gpu, "run", lambda step, limit: done.append((step, limit)) or {"failed": False})
    monkeypatch.setattr(gpu.time, "monotonic", lambda: share * sum(limit + gpu.GRACE for _, limit in done))
    assert gpu.main([str(tmp_path), part]) == 0 and gpu.time.monotonic() <= gpu.TOTAL < 600
    assert len(done) == steps and min(limit for _, limit in done) >= 12 and (share == 1 or done[-1][1] > 100)
    commands = {step.name: step.command for step, _ in done}
    if part == "checks":
        assert {"kns=dtr4cuda", "kns=window_forward_kernel", "-rfEs"} < {*commands["memcheck"], *commands["gpu tests"]}
    else:
        assert "compiled" in commands["model"] and "compiled" not in commands["block"] and not earlier.exists()


def test_a_run_keeps_everything_and_fails_if_a_step_does(monkeypatch, tmp_path, capsys):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    script = "import signal; print('it'); exit(3 * (signal.getsignal(signal.SIGINT) is not signal.SIG_IGN))"
    steps = [gpu.Step("failing", [sys.executable, "-c", script]), gpu.sanitizer("memcheck")]
    monkeypatch.setattr(gpu, "checks", lambda: steps)
    assert gpu.main([str(tmp_path), "checks"]) == 1 and "it\n\n1 of 3 steps failed" in capsys.readouterr().out
    built, failed, missing = json.loads((tmp_path / "checks.json").read_text())
    assert (built["state"], missing["state"]) == ("ok", "missing")
    assert [failed[name] for name in ("state", "why", "log")] == ["FAILED", "exit status 3", ["it"]]


def test_how_it_is_called():
    said = subprocess.check_output(["make", "-n", "gpu", "gpu-benchmarks", "OUT=o"], cwd=ROOT, text=True)
    assert ".ci/gpu.py o checks\n" in said and ".ci/gpu.py o benchmarks\n" in said
    for arguments in [], ["o"], ["o", "all"], ["--help", "checks"], ["a", "checks", "b"]:
        with pytest.raises(SystemExit, match=r"Usage: .ci/gpu.py OUT checks"):
            gpu.main(arguments)
