"""The extension's build, in a folder of its own: with CUDA, without, and with compilers that are missing or fail.

Everything is compiled without optimisation and for one architecture; what is built here computes nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from dtr_kernels import compilation

pytest.importorskip("pybind11")
if not shutil.which("g++"):
    pytest.skip("NOT RUN: needs g++", allow_module_level=True)

ROOT = Path(__file__).parents[1]
SETTINGS = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "DTR_CUDA")
LOAD = """
import importlib.util, json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)  # OpenMP's symbols come with PyTorch, which is not needed to ask
spec = importlib.util.spec_from_file_location("dtr_kernels._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
cuda = getattr(module, "cuda", None)
seen = {"kernels": dir(cuda), "unsupported": cuda.unsupported()} if cuda else {"kernels": []}
print(json.dumps(module.build_config() | seen))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what the build reads, in a folder whose name needs quoting."""
    folder = tmp_path_factory.mktemp("build") / "a $folder: 'quoted'"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "dtr_kernels").mkdir()
    shutil.copy(compilation.__file__, folder / "dtr_kernels")
    (folder / "dtr_kernels" / "__init__.py").write_text('__version__ = "0"\n')
    return folder


@pytest.fixture
def nvcc():
    found = compilation.find_nvcc()
    if not found:
        pytest.skip("NOT RUN: needs nvcc")
    return found


def run_setup(project, *command, **settings):
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {
        "CXXFLAGS": "-O0",
        "NVCC_APPEND_FLAGS": "-Xcicc=-O0 -Xptxas=-O0 -Xcompiler=-Wall,-Wextra",
        "PYTHONWARNINGS": "ignore",
    }
    environment |= {"TORCH_CUDA_ARCH_LIST": "9.0", **settings}
    command = [sys.executable, "setup.py", *(command or ("build_ext", "--inplace"))]
    return subprocess.run(command, cwd=project, env=environment, text=True, capture_output=True)


def build(project, **settings):
    """Build; return the output and the extension's description of itself."""
    done = run_setup(project, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (extension,) = project.glob("dtr_kernels/_C*.so")
    return done.stdout, json.loads(output(sys.executable, "-c", LOAD, extension))


def stopped(project, **settings):
    """The last sentence of a build that ends with it."""
    done = run_setup(project, **settings)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def sentences(printed):
    return [line for line in printed.splitlines() if line.startswith("dtr_kernels: ")]


def compiled(printed):
    return re.findall(r" -c (\S+) -o", printed)


def output(*command):
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


def version_of(nvcc):
    return re.search(r"V([\d.]+)", output(nvcc, "--version"))[1]


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_with_cuda(project, nvcc, monkeypatch):
    """Where there is no GPU, the extension imports and says so."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    printed, config = build(project)
    assert not sentences(printed) and "warning" not in printed.lower(), printed
    assert config["cuda"] == version_of(nvcc)
    assert config["architectures"] == ["sm_90"]
    assert config["no_cuda_reason"] is None
    assert {"gram_workspace", "gram", "pcgrad_coefficients", "combine", "weighted_sum"} <= set(config["kernels"])
    assert "GPU" in config["unsupported"]


def test_links_neither_pytorch_nor_cuda_nor_openmp_and_exports_only_its_module(project):
    build(project)
    (extension,) = project.glob("dtr_kernels/_C*.so")
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", extension))
    assert "libc.so.6" in needed
    assert not [name for name in needed if re.match("lib(torch|c10|cuda|cudart|gomp|omp|iomp)", name)]
    assert re.findall(r" T (.*)", output("nm", "-D", "--defined-only", extension)) == ["PyInit__C"]


def test_recompiles_only_what_changed(project):
    build(project)
    printed, _ = build(project)
    assert not compiled(printed)
    (ninja_file,) = project.rglob("build.ninja")
    cpu = project / "csrc" / "cpu"
    for changed, expected in ("avx2.cpp", ["avx2"]), ("kernels.inl", ["avx2", "avx512", "baseline"]):
        before = (cpu / changed).stat()
        (cpu / changed).touch()
        # Said, not done.
        said = output(compilation.find_ninja(), "-C", project, "-f", ninja_file, "-n", "-v")
        assert sorted(compiled(said)) == [f"csrc/cpu/{name}.cpp" for name in expected]
        os.utime(cpu / changed, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_without_cuda_for_a_reason(tmp_path, monkeypatch):
    """With which setup.py goes on: a wheel is built so in test_wheels.py, and by a failing nvcc below."""
    monkeypatch.setenv("DTR_CUDA", "0")
    assert compilation.find_cuda().missing.startswith("DTR_CUDA=0 was set for the build; run python -m")
    monkeypatch.delenv("DTR_CUDA")
    monkeypatch.setattr(compilation, "find_nvcc", lambda version: None)
    missing = compilation.find_cuda().missing
    assert missing.startswith("nvcc was not found; put it on the PATH or set CUDA_HOME, and run python -m")


def test_nvcc_that_fails_to_compile(project, nvcc, tmp_path):
    """The compiler's own words are shown, and the CPU kernels are built."""
    answers = f'case "$*" in *--version*|*--list-gpu-code*|*--dryrun*) exec "{nvcc}" "$@";; esac'
    fake = script(tmp_path / "bin" / "nvcc", f'{answers}; echo "surgery.cu: broken"; exit 1')
    printed, config = build(project, CUDA_HOME=str(tmp_path), MAX_JOBS="1")
    (sentence,) = sentences(printed)
    assert sentence == f"dtr_kernels: built without CUDA kernels: {config['no_cuda_reason']}"
    assert f"{fake} {version_of(nvcc)} failed" in sentence and "install this package again" in sentence
    assert config["cuda"] is None and config["architectures"] == config["kernels"] == []
    assert config["instruction_set"]
    assert "surgery.cu: broken" in printed


def test_nvcc_that_does_not_run(tmp_path, monkeypatch):
    fake = script(tmp_path / "bin" / "nvcc", "exit 1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("DTR_CUDA", raising=False)
    assert compilation.find_cuda().missing.startswith(f"{fake} does not work")
    assert compilation.find_nvcc("99.0") is None


def test_nvcc_of_a_version(tmp_path, monkeypatch):
    """The first one of that version, wherever others come first."""
    at_home = script(tmp_path / "home" / "bin" / "nvcc", "echo release 12.8, V12.8.93")
    on_path = script(tmp_path / "bin" / "nvcc", "echo release 13.2, V13.2.51")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{on_path.parent}{os.pathsep}{os.environ['PATH']}")
    found = {version: compilation.find_nvcc(version) for version in ("12.8", "13.2", "3.2", "2.8")}
    assert found == {"12.8": str(at_home), "13.2": str(on_path), "3.2": None, "2.8": None}


def test_a_cuda_version_that_is_not_there_stops_the_build(project):
    said = stopped(project, DTR_CUDA="9.9")
    assert said.startswith("DTR_CUDA=9.9: nvcc of CUDA 9.9 was not found; put it on the PATH or set CUDA_HOME")


@pytest.mark.parametrize("asked", ["13", "none", "0.0", "13.0.88"])
def test_a_cuda_version_that_is_none_stops_the_build(project, asked):
    assert stopped(project, DTR_CUDA=asked) == f"DTR_CUDA={asked!r} must be 0, or a CUDA version like 13.0"


def test_a_cuda_version_that_fails_to_compile_stops_the_build(project, nvcc, tmp_path):
    """Where CUDA kernels were asked for, nothing is built without them."""
    answers = f'case "$*" in *--version*|*--list-gpu-code*|*--dryrun*) exec "{nvcc}" "$@";; esac'
    script(tmp_path / "bin" / "nvcc", f"{answers}; exit 1")
    version = ".".join(version_of(nvcc).split(".")[:2])
    said = stopped(project, DTR_CUDA=version, CUDA_HOME=str(tmp_path), MAX_JOBS="1")
    assert said.startswith(f"DTR_CUDA={version}: g++ failed; see what it says")


def test_where_nvcc_is_looked_for(tmp_path, monkeypatch):
    """CUDA_HOME before the PATH before the packages of PyPI."""
    packaged = script(tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc", "")
    on_path = script(tmp_path / "bin" / "nvcc", "")
    at_home = script(tmp_path / "home" / "bin" / "nvcc", "")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    for expected in (at_home, on_path, packaged):
        assert compilation.find_nvcc() == str(expected)
        expected.unlink()


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("9.0", ["sm_90"]),
        ("8.0;9.0a 10.0+PTX", ["sm_80", "sm_90a", "sm_100", "compute_100"]),
        ("9.0;9.0+PTX", ["sm_90", "compute_90"]),
        ("10.0f+PTX", ["sm_100f", "compute_100f"]),
        (" ; ", []),
    ],
)
def test_architectures_asked_for(listed, expected):
    assert compilation.asked_architectures(listed, "nvcc", ["sm_80", "sm_90", "sm_100"]) == expected


@pytest.mark.parametrize(
    ("supported", "expected"),
    [
        (["sm_75", "sm_80", "sm_90", "sm_110", "sm_100"], ["sm_80", "sm_90", "sm_100", "compute_100"]),
        (["sm_70", "sm_80", "sm_90"], ["sm_80", "sm_90", "compute_90"]),
        (["sm_70"], []),
    ],
)
def test_usual_architectures(supported, expected):
    assert compilation.usual_architectures(supported) == expected


@pytest.mark.parametrize(
    ("architectures", "runs_on", "not_on"),
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        (["sm_86"], [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        (["sm_90a"], [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        (["sm_100f"], [(10, 0), (10, 3)], [(9, 0), (11, 0)]),
        (["compute_80"], [(8, 0), (9, 0), (12, 1)], [(7, 5)]),
        (["compute_90a"], [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        (["compute_100f"], [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        (["sm_80", "sm_100", "compute_100"], [(8, 6), (10, 0), (12, 0)], [(9, 0)]),
        ([], [], [(9, 0)]),
    ],
)
def test_which_gpus_a_build_has_code_for(architectures, runs_on, not_on):
    for capability in runs_on:
        assert compilation.has_code_for(*capability, architectures), capability
    for capability in not_on:
        assert not compilation.has_code_for(*capability, architectures), capability


@pytest.mark.parametrize(
    ("listed", "why"),
    [
        ("9.0;Hopper", "'Hopper' is not an architecture like 8.0, 9.0a or 10.0+PTX"),
        ("90", "'90' is not an architecture like 8.0, 9.0a or 10.0+PTX"),
        ("9.0;1.0", "does not support 1.0, only sm_"),
    ],
)
def test_bad_architectures_stop_the_build(project, nvcc, listed, why):
    said = stopped(project, TORCH_CUDA_ARCH_LIST=listed)
    assert said.startswith(f"TORCH_CUDA_ARCH_LIST={listed!r}: ") and why in said


@pytest.mark.parametrize("number", ["0", "two", "-1"])
def test_bad_number_of_jobs_stops_the_build(project, number):
    assert stopped(project, MAX_JOBS=number) == f"MAX_JOBS={number!r} must be a whole number, 1 or more"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler was found; install g++ or set CXX"),
        ({"CXXFLAGS": "-fno-such-flag"}, "g++ failed; see what it says"),
    ],
)
def test_without_a_working_compiler_nothing_stale_is_left(project, settings, why):
    stale = project / "dtr_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.touch()
    done = run_setup(project, DTR_CUDA="0", **settings)
    assert done.returncode == 0
    (sentence,) = sentences(done.stdout)
    assert sentence.startswith(f"dtr_kernels: built without compiled kernels: {why}")
    assert not stale.exists()


@pytest.mark.parametrize("missing", ["pybind11", "ninja"])
def test_a_missing_build_requirement_names_the_extra(monkeypatch, tmp_path, missing):
    if missing == "pybind11":
        monkeypatch.setitem(sys.modules, "pybind11", None)
    else:
        monkeypatch.setattr(compilation, "find_ninja", lambda: None)
    why = compilation.build(ROOT, tmp_path, tmp_path / "_C.so", compilation.Cuda(missing="not asked for"))
    assert why.startswith(f'{missing} is missing; pip install "dtr_kernels[build]"')


def test_source_distribution_holds_every_source(project):
    assert run_setup(project, "sdist").returncode == 0
    (archive,) = project.glob("dist/*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    assert {str(path.relative_to(project)) for path in project.glob("csrc/**/*") if path.is_file()} <= held
