"""``make gpu`` and its like: .ci/gpu.py, with small commands in the place of its steps."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu
import pytest

from dtr_kernels import ops

ROOT = Path(__file__).parent.parent
SLEEP = "import time; time.sleep(60)"
CASES = [
    ("every kernel", SLEEP, "stopped at its limit", ""),
    ("gpu tests", "print('not FAILED')", "ok", ""),
    ("gpu tests", "print('\\nFAILED test_x')", "FAILED", "FAILED test_x"),
    ("gpu tests", "print('ERROR test_x', flush=True); " + SLEEP, "FAILED", "ERROR test_x"),
    ("gpu tests", "print('SKIPPED: NOT RUN: needs an NVIDIA GPU')", "FAILED", "NOT RUN: needs an NVIDIA GPU"),
    ("every kernel", "print('9 calls of 2 kernels, 3 wrong')", "FAILED", "9 calls of 2 kernels, 3 wrong"),
    ("memcheck", "print('== ERROR SUMMARY: 12 errors')", "FAILED", "SUMMARY: 12 errors"),
    ("memcheck", "print('== Invalid __global__ read')", "FAILED", "== Invalid __global__ read"),
    ("memcheck", "print('== Error: Device not supported.'); exit(1)", "missing", "Device not supported."),
    ("facts", "print('env: nvcc: No such file'); exit(127)", "missing", "env: nvcc: No such file"),
]


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path):
    """Nothing is left in the checkout. Interrupts reach children, also where the tests are a shell's background job."""
    before = [(number, signal.signal(number, signal.default_int_handler)) for number in (signal.SIGINT, signal.SIGTERM)]
    paths = {"KEPT": "kept", "ARCHIVE": "kept/archive", "WRONG": "kept/checks/wrong.json", "CACHE": "cache"}
    for name, path in paths.items():
        monkeypatch.setattr(gpu, name, tmp_path / path)
    monkeypatch.setattr(gpu, "GRACE", 2.0)
    yield tmp_path / "kept"
    for number, handler in before:
        signal.signal(number, handler)


def python(**scripts):
    return {name: [sys.executable, "-c", script] for name, script in scripts.items()}


@pytest.mark.parametrize("name, script, state, why", CASES)
def test_what_becomes_of_a_step(tmp_path, name, script, state, why):
    step = next(step for step in gpu.checks(tmp_path) if step.name == name)._replace(commands=python(it=script))
    [facts] = gpu.run(step, time.monotonic() + 1.5, tmp_path)
    assert (facts["state"], facts["why"], facts["failed"]) == (state, why, state not in ("ok", "missing"))
    (tmp_path / "block.json").touch()
    late = script == SLEEP and gpu.run(step._replace(results=tmp_path), time.monotonic() + 1, tmp_path)[0]
    assert not late or not late["failed"], "it has measured something"


@pytest.mark.parametrize("end", ["exit()", SLEEP])
def test_a_command_is_interrupted_then_killed_with_its_children(tmp_path, end):
    script = "import subprocess; child = subprocess.Popen(['sh', '-c', 'trap \"\" INT; sleep 60'])\n"
    script += f"print('x' * 300_000, '\\n1%\\r50%\\r100%', flush=True)\ntry: {SLEEP}\n"
    script += f"except KeyboardInterrupt: print(child.pid, flush=True); {end}"
    gpu.run(gpu.Step("a step", 1, python(it=script)), time.monotonic() + 1, tmp_path)
    log = (tmp_path / "a-step-it.log").read_text().splitlines()
    assert log[-2] == "100%" and 100_000 < sum(map(len, log)) <= 200_000
    time.sleep(0.2)
    assert not (child := Path(f"/proc/{log[-1]}/cmdline")).exists() or not child.read_bytes(), "its child still runs"


def test_commands_of_a_step_run_at_once_and_hide_none_of_the_others(tmp_path):
    scripts = {"wrong": "exit(1)", "late": SLEEP, "right": "import time; time.sleep(0.2)", "more": SLEEP, "last": SLEEP}
    found = gpu.run(gpu.Step("step", 2, python(**scripts), at_once=2), time.monotonic() + 2, tmp_path)
    assert {facts["name"]: facts["state"] for facts in found} == {
        **{"wrong": "FAILED", "right": "ok", "last": "not started"},
        **dict.fromkeys(("late", "more"), "stopped at its limit"),
    }


def test_parts_end_in_time_and_leave_out_what_rests_on_wrong_kernels(kept, capsys):
    assert sorted(gpu.DECLARED) == sorted(kernel.name for kernel in ops.KERNELS)
    for part in gpu.checks, gpu.benchmarks:
        assert sum(step.seconds for step in part(kept)) <= 410
    commands = {step.name: step.commands for step in gpu.checks(kept)}
    assert set(commands["smoke"]) == {*gpu.DECLARED, "fresh thread"}
    assert {"kns=dtr4cuda", "kns=window_forward_kernel", "gram"} < {*commands["memcheck"]["surgery"]}
    names = [step.name for step in gpu.benchmarks(kept)]
    (kept / "checks").mkdir(parents=True)
    gpu.WRONG.write_text('["input_gradient", "band_forward"]')
    fewer = {step.name: step.commands[""] for step in gpu.benchmarks(kept)}
    assert [name for name in names if name not in fewer] == ["block", "tuned", "tuned-inner"]
    tuned = fewer["tune"][fewer["tune"].index("--ops") + 1 :]
    assert "weight_gradient" in tuned and not {"input_gradient", "forward"} & {*tuned}
    assert "left out             block, which needs input_gradient\n" in capsys.readouterr().out


def test_everything_is_kept_and_a_failure_said(monkeypatch, tmp_path, capsys, kept):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell
    row = "print('bf16  gram, 4 x {} x 1152   1.0 FAILED'); exit(1)".format
    smoke = {
        "gram": row(256),
        "combine_": row(33),
        "pcgrad_": "exit(2)",
        "weighted_sum": "import os; os.abort()",
        "pcgrad_sum": SLEEP,
        "fresh thread": "exit(3)",
    }
    ignored = "import signal; print('it'); exit(3 * (signal.getsignal(signal.SIGINT) is not signal.SIG_IGN))"
    steps = [gpu.Step("facts", 5, python(it=ignored)), gpu.Step("smoke", 0, python(**smoke))]
    monkeypatch.setattr(gpu, "checks", lambda found: steps)
    assert gpu.main([str(tmp_path / "out"), "checks"]) == 1
    assert "s  exit status 3: it\n" in (said := capsys.readouterr().out) and "7 of 7 commands failed" in said
    assert json.loads(gpu.WRONG.read_text()) == ["weighted_sum", "gram"], "in the sizes that are measured"
    facts = json.loads((tmp_path / "out/checks.json").read_text())[0]
    assert [facts[name] for name in ("state", "why", "end")] == ["FAILED", "exit status 3: it", ["it"]]
    with tarfile.open(tmp_path / "out/checks.tar.xz") as archive:
        assert {"checks/wrong.json", "checks/logs/smoke-fresh-thread.log"} < set(archive.getnames())


def test_what_was_prepared_is_used_until_the_sources_change(monkeypatch, kept):
    assert [step.name for step in gpu.prepare(kept)] == ["build", "compile", "pack", "prove"]
    kept.mkdir()
    [build] = gpu.ready()
    subprocess.run(build.commands[""][-1].replace(f"{gpu.PYTHON} setup.py", "true"), shell=True, check=True)
    gpu.ARCHIVE.touch()
    assert [step.name for step in gpu.ready()] == ["unpack"]
    monkeypatch.setattr(gpu, "ROOT", kept)
    assert [step.name for step in gpu.ready()] == ["unpack", "build"]


def test_how_it_is_called():
    said = subprocess.check_output(["make", "-n", "gpu-prepare", "gpu", "gpu-benchmarks", "OUT=o"], cwd=ROOT, text=True)
    assert re.findall(r"\.ci/gpu\.py o (\w+)\n", said) == ["prepare", "checks", "benchmarks"]
    for arguments in [], ["o"], ["o", "all"], ["--help", "checks"], ["a", "checks", "b"]:
        with pytest.raises(SystemExit, match=r"Usage: .ci/gpu.py OUT prepare"):
            gpu.main(arguments)


SPOILING = """
import pytest, torch

def synchronize(device):
    if spoilt:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

spoilt = []
torch.cuda.is_available, torch.cuda.synchronize = lambda: True, synchronize

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(4))
def test_it(number):
    spoilt.extend([number] * (number == 1))
    assert not spoilt
"""


def test_after_a_cuda_error_another_process_runs_the_other_tests(tmp_path):
    pytest.importorskip("xdist", reason="NOT RUN: pytest-xdist is missing")
    (tmp_path / "test_it.py").write_text(SPOILING)
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "conftest", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    said = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True).stdout
    assert "crashed while running" in said and "2 failed, 3 passed" in said, said
