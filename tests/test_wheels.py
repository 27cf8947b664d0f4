"""From a source distribution to a wheel to an extension of one's own; which interpreters and compilers wheels are built
with; and what is said where the extension has no code for a GPU.

Everything is compiled without optimisation and for one architecture, and computes nothing.
"""

from __future__ import annotations

import email
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dtr_kernels
from dtr_kernels import compilation, just_in_time
from dtr_kernels.files import locked
from dtr_kernels.ops import extension, gradient_lists

ROOT = Path(__file__).parent.parent


def run(*command, **settings):
    """A command that must succeed, in an environment without settings of the build but these."""
    asked = ("CXX", "CXXFLAGS", "LDFLAGS", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "DTR_CUDA")
    environment = {name: value for name, value in os.environ.items() if name not in asked} | settings
    done = subprocess.run([str(word) for word in command], env=environment, text=True, capture_output=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel without CUDA kernels, built in isolation from a source distribution of this checkout."""
    checkout, made = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("made")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "csrc", checkout / "csrc")
    copy_of_the_package(checkout)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(made)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True, env=os.environ | {"DTR_CUDA": "13.0"})
    (archive,) = made.iterdir()
    assert archive.name == f"dtr_kernels-{dtr_kernels.__version__}.tar.gz", "it is for every CUDA version"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", made, archive]
    run(*command, CXXFLAGS="-O0", DTR_CUDA="0")
    (built,) = made.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs a module of the installed wheel, which finds the packages of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
    cache = tmp_path_factory.mktemp("cache")
    settings = {"PYTHONPATH": str(folder), "DTR_KERNELS_CACHE": str(cache), "CXXFLAGS": "-O0"}

    def module(*command, **others):
        return run(sys.executable, "-m", *command, **settings, **others)

    module.folder, module.cache = folder, cache
    return module


def test_a_wheel_holds_the_package_its_extension_and_its_sources(wheel):
    abi = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_")
    assert wheel.name == f"dtr_kernels-{dtr_kernels.__version__}-{abi}-{abi}-{platform}.whl"
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
        (metadata,) = (name for name in names if name.endswith("dist-info/METADATA"))
        facts = email.message_from_bytes(files.read(metadata))
    kept = [path for folder in ("csrc", "dtr_kernels") for path in (ROOT / folder).rglob("*.*") if path.is_file()]
    kept = [path.relative_to(ROOT).as_posix() for path in kept if path.suffix not in (".so", ".pyc", ".md")]
    assert {name if name.startswith("dtr_kernels/") else f"dtr_kernels/{name}" for name in kept} <= names
    assert f"dtr_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    assert not [name for name in names if not re.match(r"dtr_kernels(-[^/]*\.dist-info)?/", name)]
    assert facts["Version"] == dtr_kernels.__version__


def test_what_is_built_here_takes_the_place_of_what_is_installed(installed):
    nvcc = compilation.find_nvcc()
    if not nvcc:
        pytest.skip("NOT RUN: needs nvcc")
    cheap = {"NVCC_APPEND_FLAGS": "-Xcicc=-O0 -Xptxas=-O0"}
    printed = installed("dtr_kernels", "build", TORCH_CUDA_ARCH_LIST="9.0", **cheap)
    (built,) = installed.cache.rglob("*.so")
    assert f"for sm_90: {built}" in printed
    after = json.loads(installed("dtr_kernels", "info", "--json"))["extension"]
    assert after["architectures"] == ["sm_90"]
    with (installed.folder / "dtr_kernels" / "csrc" / "types.h").open("a") as source:
        source.write("// another version\n")
    stale = json.loads(installed("dtr_kernels", "info", "--json"))["extension"]
    assert stale["cuda"] is None and "DTR_CUDA=0 was set for the build" in stale["no_cuda_reason"]


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A package's sources, and a cache."""
    monkeypatch.setattr(just_in_time, "ROOT", tmp_path)
    monkeypatch.setenv("DTR_KERNELS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    for name in ("a.cpp", "cpu/b.h"):
        (tmp_path / "csrc" / name).write_text(name)
    return tmp_path / "csrc"


def test_an_extension_of_other_sources_is_not_found(sources):
    paths = [just_in_time.path()]
    assert paths[0] == just_in_time.path()
    assert paths[0].is_relative_to(sources.parent / "cache") and sysconfig.get_config_var("SOABI") in str(paths[0])
    (sources / "cpu" / "b.h").write_text("changed")
    paths.append(just_in_time.path())
    (sources / "cpu" / "b.h").rename(sources / "cpu" / "c.h")
    paths.append(just_in_time.path())
    assert len(set(paths)) == 3


@pytest.mark.parametrize(
    ("cuda", "settings", "why"),
    [
        (compilation.Cuda(missing="nvcc was lost"), {}, "nvcc was lost; set DTR_CUDA=0 to build without CUDA kernels"),
        (compilation.Cuda(missing="none"), {"DTR_CUDA": "0", "CXX": "no-such-compiler"}, "no C.. compiler was found"),
    ],
)
def test_what_cannot_be_built_here_leaves_nothing(sources, monkeypatch, cuda, settings, why):
    monkeypatch.delenv("DTR_CUDA", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compilation, "find_cuda", lambda listed: cuda)
    with pytest.raises(SystemExit, match=why):
        just_in_time.build()
    assert not list((sources.parent / "cache").rglob("*.*"))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_an_extension_that_others_could_have_written_is_not_loaded(sources, part):
    file = just_in_time.path()
    file.parent.mkdir(parents=True)
    file.touch(0o644)
    for folder in file.parents[:2]:
        folder.chmod(0o755)
    parts = [file, *file.parents]
    parts[part].chmod(parts[part].stat().st_mode | 0o020)
    with pytest.warns(match="not used: .* the path must be absolute, and nobody but its owner"):
        just_in_time.load()
    parts[part].chmod(parts[part].stat().st_mode & ~0o020)
    with pytest.warns(match="is not as it was built"):
        just_in_time.load()


@pytest.fixture
def built(sources, monkeypatch):
    """Build with a compiler that makes something that the loader refuses."""

    def compiled(root, folder, target, cuda):
        target.write_bytes(b"no extension " * 1000)

    monkeypatch.setattr(compilation, "find_cuda", lambda listed: compilation.Cuda(version="13.0"))
    monkeypatch.setattr(compilation, "build", compiled)
    return just_in_time.build()


def test_what_was_built_reaches_the_loader(built):
    with pytest.warns(match="not used: .*invalid ELF header"):
        just_in_time.load()


def replaced_by(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


def changed(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


DAMAGE = {
    "emptied": changed(lambda content: b""),
    "cut short": changed(lambda content: content[:-1]),
    "longer": changed(lambda content: content + b"\0"),
    "a bit flipped": changed(lambda content: content[:50] + bytes([content[50] ^ 4]) + content[51:]),
    "a folder": replaced_by(os.mkdir),
    "a pipe": replaced_by(os.mkfifo),
    "unreadable": lambda path: path.chmod(0),
}
DAMAGE_TO_DESCRIPTIONS = DAMAGE | {
    "a link to nothing": replaced_by(lambda path: path.symlink_to("nowhere")),
    "missing": os.unlink,
    "nested": changed(lambda content: b"[" * 100_000),
    "null": changed(lambda content: b"null"),
    "of another build": changed(lambda content: content.replace(b'"size": 13000', b'"size": 13001')),
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [("{}", damage) for damage in DAMAGE] + [("{}.json", damage) for damage in DAMAGE_TO_DESCRIPTIONS],
)
def test_a_damaged_extension_is_not_loaded(built, monkeypatch, name, damage):
    """Loading one that is cut short would end Python; opening a pipe would wait forever."""
    if damage == "unreadable" and os.geteuid() == 0:
        pytest.skip("NOT RUN: root reads everything")
    DAMAGE_TO_DESCRIPTIONS[damage](built.with_name(name.format(built.name)))
    monkeypatch.setattr(importlib.machinery.ExtensionFileLoader, "create_module", pytest.fail)
    with pytest.warns(match="not used: .* is not as it was built .*; run python -m dtr_kernels build again$") as caught:
        just_in_time.load()
    assert len(caught) == 1 and len(str(caught[0].message)) < 1000


def test_without_an_extension_nothing_is_said(built, recwarn):
    """Not of a description that was left, nor of a folder that this user may not look into."""
    built.unlink()
    just_in_time.load()
    assert not recwarn.list


def test_one_build_at_a_time(built):
    """The file of one and the description of another would not fit."""
    with (
        locked(built, "busy"),
        pytest.raises(SystemExit, match=r"not built: another process is building .*; wait until it has ended"),
    ):
        just_in_time.build()
    assert sorted(path.name for path in built.parent.iterdir()) == [built.name, f"{built.name}.json"]


def test_the_cache_must_not_depend_on_the_working_folder(sources, monkeypatch):
    monkeypatch.setenv("DTR_KERNELS_CACHE", "cache")
    monkeypatch.chdir(sources.parent)
    with pytest.raises(SystemExit, match="must be an absolute path, got cache"):
        monkeypatch.setattr(compilation, "find_cuda", lambda listed: compilation.Cuda())
        just_in_time.build()
    file = just_in_time.path()
    file.parent.mkdir(parents=True, mode=0o755)
    file.touch(0o644)
    with pytest.warns(match="must be absolute"):
        just_in_time.load()


@pytest.mark.parametrize(
    ("asked", "gpus", "expected"),
    [("", [(9, 0), (7, 5), (9, 0), (8, 6)], "8.6;9.0"), ("8.0+PTX", [(9, 0)], "8.0+PTX"), ("", [], "")],
)
def test_it_is_built_for_the_gpus_of_this_machine(sources, monkeypatch, asked, gpus, expected):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    seen = []
    monkeypatch.setattr(compilation, "find_cuda", lambda listed: seen.append(listed) or sys.exit("stop"))
    with pytest.raises(SystemExit):
        just_in_time.build()
    assert seen == [expected]


# ---- where the extension is missing


def info_of(checkout, *folders):
    """Return output and warnings of ``python -m dtr_kernels info`` in a folder, with ``folders`` on the path."""
    settings = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "DTR_KERNELS_CACHE": str(checkout / "cache")}
    command = [sys.executable, "-m", "dtr_kernels", "info"]
    done = subprocess.run(command, cwd=checkout, env=os.environ | settings, text=True, capture_output=True, check=True)
    return done.stdout, done.stderr


def copy_of_the_package(folder):
    ignored = shutil.ignore_patterns("_C*.so", "__pycache__")
    return shutil.copytree(ROOT / "dtr_kernels", folder / "dtr_kernels", ignore=ignored)


EXTENSION = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_a_checkout_that_hides_an_installed_package_says_so(tmp_path):
    """As after pip install . in a checkout; in every program that imports the package, once."""
    package, installed = copy_of_the_package(tmp_path / "checkout"), tmp_path / "site-packages" / "dtr_kernels"
    installed.mkdir(parents=True)
    (installed / EXTENSION).touch()
    said = (
        f"the compiled CPU kernels are missing: {package} has none, and is imported instead of {installed}, which has "
        f"them; run pip install -e . in {package.parent}, or start Python in another folder"
    )
    shown, warned = info_of(package.parent, installed.parent)
    assert f"extension    {said}" in shown and warned.count(said) == 1
    assert "circular" not in shown + warned


def test_an_extension_that_does_not_load_is_told_with_the_loaders_reason(tmp_path):
    package = copy_of_the_package(tmp_path)
    (package / EXTENSION).touch()
    shown, warned = info_of(tmp_path)
    reason = f"missing: {package / EXTENSION}: file too short; install a C++ compiler, and run python -m"
    assert reason in shown and reason in warned


def test_an_extension_of_another_checkout_is_not_borrowed(tmp_path, monkeypatch):
    """An editable install finds its own for whoever asks."""
    spec = SimpleNamespace(origin=str(tmp_path / "other" / "dtr_kernels" / EXTENSION))
    monkeypatch.delitem(sys.modules, "dtr_kernels._C", raising=False)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=lambda *_: spec)])
    assert str(tmp_path / "other") in extension._hidden_package(tmp_path / "dtr_kernels")
    monkeypatch.setattr(sys, "meta_path", [])
    assert extension._hidden_package(tmp_path / "dtr_kernels") is None, "there is none at all"


# ---- code for a GPU


@pytest.mark.parametrize(
    ("capability", "architectures", "why"),
    [
        ((9, 0), ["sm_90"], "asked the runtime"),
        ((12, 0), ["sm_90", "compute_90"], "asked the runtime"),
        ((7, 5), ["sm_80"], "asked the runtime"),  # it says that no build has code for those
        ((12, 0), ["sm_80", "sm_90"], "for sm_80 sm_90, and NVIDIA X has compute capability 12.0; run python -m "),
    ],
)
def test_what_was_built_is_compared_with_the_device(monkeypatch, capability, architectures, why):
    config = {"architectures": architectures}
    cuda = SimpleNamespace(unsupported=lambda: "asked the runtime")
    monkeypatch.setattr(extension, "kernels", SimpleNamespace(cuda=cuda, build_config=lambda: config))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    assert why in gradient_lists._cuda_unavailable.__wrapped__(torch.device("cuda", 0))


# ---- make wheels


@pytest.fixture
def wheels(monkeypatch, tmp_path):
    """.ci/wheels.py as a module, for another checkout."""
    spec = importlib.util.spec_from_file_location("wheels_command", ROOT / ".ci" / "wheels.py")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "DIST", tmp_path / "dist")
    return module


def test_the_matrix_goes_on_after_what_cannot_be_built(wheels, monkeypatch, capsys, tmp_path):
    archive = tmp_path / "source.tar.gz"
    archive.touch()
    monkeypatch.setattr(wheels, "source_distribution", lambda: archive)
    monkeypatch.setattr(wheels, "interpreter", lambda python: python)
    commands = []

    def fake(*command, **settings):
        commands.append((command, settings))
        if "auditwheel" in command:
            built = Path(command[-1])
            folder = Path(command[command.index("--wheel-dir") + 1])
            folder.mkdir()
            shutil.copy(built, folder / "repaired.whl")
        elif "wheel" in command:
            with zipfile.ZipFile(Path(command[command.index("--wheel-dir") + 1], "built.whl"), "w") as files:
                if "3.11" in command:
                    files.writestr("dtr_kernels/_C.abi.so", "")

    monkeypatch.setattr(wheels, "run", fake)
    monkeypatch.setattr(
        wheels.compilation, "find_nvcc", lambda version: "/cuda/bin/nvcc" if version == "13.1" else None
    )
    (tmp_path / "dist").mkdir()
    assert wheels.main(["--python", "3.10", "3.11", "--cuda", "12.8", "13.1", "none"]) == 1
    report = capsys.readouterr().out.partition("\nIn ")[2]
    assert report.count("repaired.whl") == 2 and report.count("NOT BUILT") == 4
    assert report.count("no nvcc of CUDA 12.8 was found, and PyPI has whole compilers of CUDA 13 alone") == 2
    assert "Python 3.10, CUDA none: it was built without compiled kernels" in report
    asked = [settings for command, settings in commands if "3.11" in command]
    assert asked == [{"DTR_CUDA": "13.1", "CUDA_HOME": "/cuda"}, {"DTR_CUDA": "0"}]


def test_a_compiler_that_no_folder_has_comes_from_pypi(wheels, monkeypatch, tmp_path):
    def fake(*command):
        assert {f"{name}==13.7.*" for name in wheels.COMPILER} < set(command)
        nvcc = Path(command[command.index("--target") + 1], "nvidia", "cu13", "bin", "nvcc")
        nvcc.parent.mkdir(parents=True)
        nvcc.touch()

    monkeypatch.setattr(wheels, "run", fake)
    monkeypatch.setattr(wheels.compilation, "find_nvcc", lambda version: None)
    expected = tmp_path / "build" / "cuda-13.7" / "nvidia" / "cu13" / "bin" / "nvcc"
    assert wheels.compiler("13.7") == str(expected)
    monkeypatch.setattr(wheels, "run", None)
    assert wheels.compiler("13.7") == str(expected), "installed already"


@pytest.mark.parametrize("python", ["3.99", "3.99t", "no-such-python"])
def test_an_interpreter_that_is_not_there_is_named(wheels, python):
    with pytest.raises(wheels.Impossible, match=f"python{python} is not on the PATH|^no-such-python is not"):
        wheels.interpreter(python)


def test_without_nvcc_a_wheel_is_not_built_as_something_else(wheels, monkeypatch):
    monkeypatch.setattr(wheels.compilation, "find_nvcc", lambda: None)
    with pytest.raises(SystemExit, match=r"nvcc was not found: .* choose, as in CUDA=13\.0 or CUDA=none"):
        wheels.main(["--python", "python3", "--cuda"])


def test_a_cuda_version_that_is_none_is_refused(wheels, capsys):
    with pytest.raises(SystemExit) as stopped:
        wheels.main(["--cuda", "thirteen"])
    assert stopped.value.code == 2 and "none or a version like 13.0, got 'thirteen'" in capsys.readouterr().err
