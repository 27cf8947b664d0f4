"""The extension refuses what can be known to be wrong, and no code here runs what it reads or fetches anything.

`make test-sanitize` calls the extension at random under sanitizers; this is its small part that needs none.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fuzz_cases import Call, Draw, Enum, Operand, Shape, calls, issue, wrong

from dtr_kernels import ops
from dtr_kernels.ops import declaration, extension
from tests.faults import memory

ROOT = Path(__file__).parent.parent
needs_extension = pytest.mark.skipif(extension.kernels is None, reason=f"NOT RUN: {extension.unavailable}")
FUNCTIONS = sorted(calls(extension.kernels)) if extension.kernels else []
CASES = 12


class Recorder:
    """Stands in for the extension: passes calls on and keeps their arguments, tensors instead of addresses."""

    def __init__(self):
        self.kernels, self.calls = extension.kernels, {}

    def __getattr__(self, name):
        member = getattr(self.kernels, name)
        if isinstance(member, type):
            return member

        def call(*arguments):
            self.calls.setdefault(name, []).append(arguments)
            before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            converted = (_passed(self.kernels, argument) for argument in arguments)
            result = member(*converted)
            self.calls[name][-1] = [*zip(arguments, before, strict=True)]
            return result

        return call


def _passed(kernels, argument):
    """An argument as the extension takes it."""
    if argument is None or isinstance(argument, torch.Tensor):
        return ROWS(argument)
    return SHAPE(*argument) if isinstance(argument, tuple) else argument


ROWS, SHAPE = extension.rows, extension.shape
# Argument names of the functions of token rows, as Python sees them.
DECLARED = {
    node.name: [argument.arg for argument in node.args.args]
    for node in ast.parse((ROOT / "dtr_kernels/_C.pyi").read_text()).body
    if isinstance(node, ast.FunctionDef) and any(argument.arg == "shape" for argument in node.args.args)
}


def recorded(monkeypatch) -> dict[str, list]:
    """The calls of such functions by declared kernels, in all of their modes."""
    recorder = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(extension, "kernels", recorder)
        patch.setattr(extension, "rows", lambda x: x)
        patch.setattr(extension, "shape", lambda *sizes: sizes)
        draw = declaration.Draw(declaration.Sizes(3, 5, 24), declaration.PRECISIONS["fp32"], torch.device("cpu"))
        for kernel in ops.KERNELS:
            for mode in kernel.modes if kernel.sizes is declaration.SIZES and not kernel.triton_only else ():
                kernel.run(kernel.inputs(draw, **mode))
    return recorder.calls


def as_fuzzed(function: str, recorded_call, optional) -> Call:
    """The same call on memory of exactly the size that each argument needs."""
    arguments, kept = {}, []
    for name, (now, before) in zip(DECLARED[function], recorded_call, strict=True):
        if isinstance(now, torch.Tensor):
            written = not torch.equal(now, before)
            rows = now.reshape(-1, now.shape[-1]).double().numpy()
            arguments[name] = Operand(rows.shape if written else rows, "f32", "tokens")
        elif isinstance(now, tuple):
            B, N, C, start, width, *chunk = now
            kept = [] if start is None else [Operand(start[None].numpy(), "i32", "whole")]
            arguments[name] = Shape(B, N, C, kept[0].address if kept else 0, width, *(chunk or [1]))
        else:
            arguments[name] = Enum(int(now)) if isinstance(now, extension.kernels.Type) else now
    return Call(function, arguments, optional=optional, keeps=kept)


# --- the extension's boundary ----------------------------------------------------------------------------------------


def functions_of(module) -> Iterator[str]:
    for name, member in vars(module).items():
        if not name.startswith("_") and not isinstance(member, type):
            yield from (f"{name}.{inner}" for inner in functions_of(member)) if name == "cuda" else [name]


@needs_extension
def test_every_function_is_fuzzed():
    """By cases written for it, or as declared kernels call it."""
    assert sorted(functions_of(extension.kernels)) == sorted({*FUNCTIONS, *map(str, DECLARED)})


@needs_extension
@pytest.mark.parametrize("function", FUNCTIONS)
def test_wrong_calls_are_refused(function):
    mistakes = set()
    for case in range(CASES):
        call = calls(extension.kernels)[function](Draw(f"{function} {case}"))
        for what, arguments in wrong(call):
            try:
                issue(extension.kernels, function, arguments)
            except (ValueError, TypeError):
                mistakes.add(what)
            else:
                pytest.fail(f"case {case} accepts: {what}")
    assert len(mistakes) > (0 if not call.arguments else 10)


@needs_extension
@pytest.mark.parametrize("function", DECLARED)
def test_wrong_calls_of_declared_kernels_are_refused(function, monkeypatch):
    """A new kernel needs no case of its own for this: its declaration says how it is called."""
    found = recorded(monkeypatch)[function]
    columns = zip(*found, strict=True)
    optional = {
        name for name, column in zip(DECLARED[function], columns, strict=True) if any(now is None for now, _ in column)
    }
    for each in found:
        call = as_fuzzed(function, each, frozenset(optional))
        call.run(extension.kernels)
        for what, arguments in wrong(call):
            with pytest.raises((ValueError, TypeError)):
                issue(extension.kernels, function, arguments)
                pytest.fail(f"{function} accepts: {what}")


@needs_extension
@pytest.mark.parametrize(
    "rows",
    [[], [[]], [None], "ab", [["a"]], [[1.0]], [[None, torch.ones(1)]], [[torch.ones(1)], 3], [[torch.ones(1)], []]],
    ids=repr,
)
def test_what_is_no_list_of_tensors_is_not_read(rows):
    """``Gradients.of`` takes objects: their types are known before anything in them is read."""
    read = extension.kernels.Gradients.of
    assert read(rows, torch.Tensor, torch.nn.Parameter) is None
    assert read([[torch.ones(1)]], int, object) is None and read([[torch.ones(1).int()]], torch.Tensor, int) is None
    for arguments in ((None, torch.Tensor, torch.Tensor), (rows, torch.Tensor), (3, int, int)):
        with pytest.raises(TypeError):
            read(*arguments)


_RIGHT_CALLS = """
import sys
import torch  # brings the OpenMP runtime
sys.path.insert(0, sys.argv[1])
from fuzz_boundary import load
from fuzz_cases import Draw, calls
kernels = load(sys.argv[2])
for function, make in calls(kernels).items():
    for case in range(int(sys.argv[3])):
        if not function.startswith("cuda."):
            make(Draw(f"{function} {case}")).run(kernels)
print(kernels.build_config()["instruction_set"])
"""


def run_right_calls(instruction_set: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the extension chooses its kernels once."""
    command = [sys.executable, "-c", _RIGHT_CALLS, str(ROOT / "tests"), extension.kernels.__file__, "40"]
    return subprocess.run(command, env=os.environ | {"DTR_ISA": instruction_set}, capture_output=True, text=True)


@needs_extension
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_right_calls_with_each_instruction_set(instruction_set):
    """Odd sizes, strides, addresses, windows and dtypes against NumPy; what a processor lacks is refused by name."""
    done = run_right_calls(instruction_set)
    if done.returncode:
        assert "is none of the instruction sets that run here: " in done.stderr, done.stderr
        assert f" {instruction_set}" not in done.stderr.partition("run here:")[2], done.stderr
        assert instruction_set != "baseline"
    else:
        assert done.stdout.strip() == instruction_set


@needs_extension
def test_an_unknown_instruction_set_is_refused():
    assert "ValueError: DTR_ISA=mmx is none of the instruction sets" in run_right_calls("mmx").stderr


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": {"data": 0}}, "x must not be null"),
        ({"x": {"type": 9}}, r"x must be f32, f64, bf16 or f16, got Type\(9\)"),
        ({"x": {"stride": -4}}, "x.stride must not be negative, got -4"),
        ({"out": {"stride": 1}}, "out.stride must be 8 or more for rows that are written, got 1"),
        ({"gate": {"type": 1}}, "gate must be f32 here, got f64"),
        ({"gate": {"data": 1}}, "gate must be at a multiple of 4 bytes, got 1"),
        ({"branch": {"stride": 1 << 60}}, "branch must end within the address space"),
        ({"shape": {"C": 0}}, "C must be 1 to 16777216, got 0"),
        ({"shape": {"N": 1 << 50}}, "N must be 0 to 70368744177664, got"),
        ({"shape": {"width": 9}}, "width must be 1 to 8, got 9"),
        ({"shape": {"chunk": 0}}, "chunk must be 1 to 1073741824, got 0"),
    ],
)
def test_messages_name_the_argument(change, message):
    kernels = extension.kernels
    rows = {"type": 0, "stride": 8}
    arguments = {"shape": {"B": 2, "N": 3, "C": 8, "start": 0, "width": 8, "chunk": 1}}
    # Never read, as every call is refused.
    arguments |= {name: {"data": 4096 * n} | rows for n, name in enumerate(("x", "branch", "out", "gate"), 1)}
    for name, values in change.items():
        arguments[name] |= values
    shape = tuple(arguments.pop("shape").values())
    with pytest.raises(ValueError, match=message):
        kernels.residual_forward(
            shape, *((x["data"], kernels.Type(x["type"]), x["stride"]) for x in arguments.values())
        )


@needs_extension
def test_overlaps_are_named():
    kernels = extension.kernels
    with pytest.raises(
        ValueError, match=r"^out \(0x1000 to 0x1020\), which is written, must not overlap pointers\[1\] "
    ):
        kernels.gram(kernels.Gradients.at(kernels.Type.f32, 2, [8192, 4096 + 16], [4]), 4096)
    with pytest.raises(ValueError, match=r"pointers\[2\] .*, which is written, must not overlap pointers\[1\] "):
        kernels.combine(kernels.Gradients.at(kernels.Type.f32, 2, [4096, 8200, 8192, 65536], [4, 4]), 1 << 20)


@needs_extension
def test_windows_are_looked_at_again_in_every_call():
    drawn = (calls(extension.kernels)["norm_forward"](Draw(f"windows {case}")) for case in range(20))
    call = next(call for call in drawn if call.keeps and call.arguments["shape"].N)
    (start,) = call.keeps
    call.run(extension.kernels)
    start._memory[-1] = call.arguments["shape"].C
    with pytest.raises(ValueError, match=r"window.start must be in 0\.\.\d+ \(channels - width\), got"):
        issue(extension.kernels, "norm_forward", list(call.plain().values()))


@pytest.mark.skipif(not memory.CAN_RUN, reason="NOT RUN: needs the extension and a C++ compiler")
def test_each_allocation_that_fails_is_a_memory_error(tmp_path, seed):
    """Nothing is written then, and the next call is right. An exception in a parallel region would end the process."""
    tried = Counter()
    for name, lost in memory.short_of_memory("extension", seed, tmp_path):
        assert lost is None, lost
        tried[name] += 1
        if name == "Gradients.of" and tried.total() > 400:  # the last of a round
            break
    assert set(tried) == {*(name for name in FUNCTIONS if not name.startswith("cuda.")), "Gradients.at", "Gradients.of"}
    assert all(count > tried["build_config"] for name, count in tried.items() if name != "build_config")


# --- files, shells, downloads ----------------------------------------------------------------------------------------

# (where, what `refused` says): why it may be.
ALLOWED = {
    ("tests/", "pickle.loads"): "models that the test has just pickled",
    ("tests/comparing.py", "torch.load without weights_only=True"): "a whole model that the test has just saved",
    ("dtr_kernels/surgery/", "torch.distributed.all_gather_object"): "names and errors of the caller's ranks",
    ("dtr_kernels/verify.py", "os.execv"): "the command itself, again, after an error that spoils its process",
    ("tests/test_gpu_command.py", "subprocess.run without shell=False"): "a line of the GPU command, which is no input",
    ("examples/", "torch.distributed.broadcast_object_list"): "a checkpoint or an error of the run's first process",
    ("tests/", "torch.distributed.all_gather_object"): "results of the test's own processes",
}
# Modules that run what they read, or that fetch or serve files.
# fmt: off
_MODULES = [
    "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml", "jsonpickle", "torch.package",
    "torch.hub", "torch.utils.model_zoo", "huggingface_hub", "urllib", "urllib3", "requests", "http", "httpx",
    "aiohttp", "ftplib", "smtplib", "telnetlib", "socketserver", "xmlrpc", "wget", "gdown", "pty", "code",
]
_NAMES = [
    "pickle.load", "pickle.loads", "pickle.Unpickler", "pandas.read_pickle", "eval", "exec", "__import__", "os.system",
    "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "tempfile.mktemp", "torch.distributed.all_gather_object", "torch.distributed.broadcast_object_list",
]
# fmt: on
_NAMES += [
    f"os.{how}{which}" for how in ("exec", "spawn") for which in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")
]
# Calls in which an argument must have this value.
_ARGUMENTS = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
_SHELLS = {"sh", "bash", "dash", "zsh", "/bin/sh", "/bin/bash"}


def refused(source: str) -> Iterator[str]:
    """Yield the names in a file that this project does without."""
    tree = ast.parse(source)
    full_names = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            full_names[alias.asname or alias.name.partition(".")[0]] = (
                module + alias.name if alias.asname or module else alias.name.partition(".")[0]
            )
            if _belongs_to(module + alias.name, _MODULES):
                yield module + alias.name

    def full_name(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return full_names.get(first, first) + dot + rest

    for node in ast.walk(tree):
        if (isinstance(node, ast.Name) and full_name(node) in _NAMES) or (
            isinstance(node, ast.Attribute) and full_name(node) in _NAMES + _MODULES
        ):
            yield full_name(node)
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func)
        given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        if name in _ARGUMENTS or "shell" in given:
            argument, value = _ARGUMENTS.get(name, ("shell", False))
            if given.get(argument) is not value:
                yield f"{name} without {argument}={value}"
        for command in node.args:
            if isinstance(command, ast.List) and command.elts and getattr(command.elts[0], "value", None) in _SHELLS:
                yield f"{name} with a shell"


def _belongs_to(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def python_files() -> list[Path]:
    folders = ("dtr_kernels", "benchmarks", "examples", "tests", "docs")
    return [
        *ROOT.glob("*.py"),
        *(ROOT / ".ci" / name for name in ("gpu.py", "wheels.py")),
        *(path for name in folders for path in (ROOT / name).rglob("*.py")),
    ]


def test_nothing_runs_what_it_reads_or_fetches_anything():
    found = [
        (path.relative_to(ROOT).as_posix(), what)
        for path in python_files()
        for what in refused(path.read_text("utf-8"))
    ]
    needed = set()
    for file, what in found:
        reasons = [(where, allowed) for where, allowed in ALLOWED if file.startswith(where) and allowed == what]
        assert reasons, f"{file}: {what}"
        needed.update(reasons)
    assert needed == ALLOWED.keys()


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import torch\ntorch.load(path)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("from torch import load as read\nread(path, weights_only=choice)", "torch.load without weights_only=True"),
        ("import numpy as np\nnp.load(path)", "numpy.load without allow_pickle=False"),
        ("import pickle\npickle.loads(data)", "pickle.loads"),
        ("import yaml", "yaml"),
        ("from pickle import Unpickler as Reader\nReader(file)", "pickle.Unpickler"),
        ("list(map(eval, texts))", "eval"),
        ("from urllib.request import urlopen", "urllib.request.urlopen"),
        ("from torch import hub", "torch.hub"),
        ("import torch\ntorch.hub.load(name)", "torch.hub"),
        ("eval(text)", "eval"),
        ("import os\nos.system(text)", "os.system"),
        ("from os import popen\npopen(text)", "os.popen"),
        ("import subprocess\nsubprocess.run(text, shell=True)", "subprocess.run without shell=False"),
        ("import subprocess as s\ns.run(text, shell=choice)", "subprocess.run without shell=False"),
        ("import subprocess\nsubprocess.run(['bash', '-c', text])", "subprocess.run with a shell"),
        ("import tempfile\ntempfile.mktemp()", "tempfile.mktemp"),
    ],
)
def test_what_is_refused(source, what):
    assert list(refused(source)) == [what]


def test_what_is_not_refused():
    source = """
import subprocess, numpy as np, torch, torch.nn.functional as F
torch.load(path, map_location="cpu", weights_only=True), np.load(path, allow_pickle=False)
subprocess.run(["g++", path], check=True), subprocess.run([*command], shell=False), model.eval(), F.linear(x, w)
"""
    assert list(refused(source)) == []
