"""The house's order: layers that only look down, no circles, and names that say what they name."""

from __future__ import annotations

import ast
import re
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dtr_kernels"
# The parts that each part may import. A part that is not listed stands above all and may import everything below.
ALLOWED = {
    "compilation": set(),
    "quoting": set(),
    "files": {"quoting"},
    "just_in_time": {"compilation", "files"},
    "routing": {"quoting"},
    "reference": {"routing"},
    "ops": {"_C", "compilation", "files", "just_in_time", "quoting", "reference", "routing"},
    "nn": {"ops", "reference", "routing"},
    "swap": {"nn", "ops", "quoting", "reference", "routing"},
    "surgery": {"ops", "quoting", "reference", "routing"},
    "clusters": {"files", "quoting", "routing"},
    "continuous": {"clusters", "quoting", "routing"},
    "analysis": {"files", "clusters", "continuous", "quoting", "routing", "surgery"},
}


OURS = ("dtr_kernels", "benchmarks", "examples")
SHIPPED = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in OURS
    for path in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.pyi"))
}


def imported(path):
    """Dotted names that a file imports, anywhere in it; of ``from a import b`` a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts(names):
    """The parts of the library among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("dtr_kernels.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_a_layer_looks_down(part):
    files = list((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    for path in files:
        assert parts(imported(path)) <= ALLOWED[part] | {part}, path


def test_no_circle():
    """Neither in the order above nor among modules, with imports inside of functions and those for types alone."""
    TopologicalSorter(ALLOWED).prepare()
    modules = {
        module: {name if name in SHIPPED else name.rpartition(".")[0] for name in imported(path)}
        for module, path in SHIPPED.items()
    }
    TopologicalSorter(modules).prepare()


def test_the_library_imports_none_of_what_stands_around_it():
    for path in PACKAGE.rglob("*.py"):
        outside = {name.split(".")[0] for name in imported(path)} & {"benchmarks", "examples", "tests", "setup"}
        assert not outside, path


def test_analysis_takes_of_surgery_only_what_it_knows_of_parameters():
    names = {name for path in (PACKAGE / "analysis").rglob("*.py") for name in imported(path)}
    assert {name for name in names if name.startswith("dtr_kernels.surgery.")} <= {
        "dtr_kernels.surgery.parameters",
        *(f"dtr_kernels.surgery.parameters.{name}" for name in ("device_of", "named", "trainable")),
    }


def test_private_names_stay_in_their_package():
    for module, path in SHIPPED.items():
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        for name in set(imported(path)) - {"dtr_kernels._C"}:
            owner, private, _ = name.partition("._")
            owner = owner if (ROOT / owner.replace(".", "/")).is_dir() else owner.rpartition(".")[0]
            assert not private or owner == package or not owner.startswith(OURS), f"{path} imports {name}"


def test_no_function_hides_a_module():
    """``import package.name`` would then give the function."""
    for module, path in SHIPPED.items():
        if path.stem == "__init__":
            exported = {name.rpartition(".")[2] for name in imported(path) if name not in SHIPPED}
            assert not exported & {name.rpartition(".")[2] for name in SHIPPED if name.startswith(module + ".")}, path


def test_kernels_have_names_of_their_own():
    """By which profilers and compute-sanitizer tell them apart."""
    sources = "\n".join(path.read_text() for path in (PACKAGE / "ops").glob("*.py"))
    launched = set(re.findall(r"\blaunch\(\s*(\w+),", sources))
    defined = Counter(re.findall(r"^@triton\.jit(?:\(.*\))?\ndef (\w+)\(", sources, re.MULTILINE))
    assert len(launched) >= 10 and {name: defined[name] for name in launched} == dict.fromkeys(launched, 1)
    assert {name for name in defined if name.endswith("_kernel")} == launched


def test_nothing_that_is_shipped_mocks():
    for module, path in SHIPPED.items():
        assert not any(name.startswith("unittest") for name in imported(path)), (module, path)


def test_the_architecture_page_lists_the_modules():
    """But those of single ops, of which there is one for each."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = {
        folder: sorted(names.split())
        for folder, names in re.findall(r"^    (dtr_kernels/\S*)((?:\s+\w+)+)$", text, re.MULTILINE)
    }
    assert listed == {
        f"{folder.relative_to(ROOT)}/": sorted(
            path.stem
            for path in folder.glob("*.py")
            if path.stem[0] != "_"
            and not (folder.stem == "ops" and re.search(r"^(KERNELS = \[|@op\()", path.read_text(), re.MULTILINE))
        )
        for folder in (PACKAGE, *(path.parent for path in PACKAGE.glob("*/__init__.py")))
    }
