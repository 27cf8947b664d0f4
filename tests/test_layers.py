"""Who may import whom: the layers of the library only look down."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dtr_kernels"
# Of each part the others that it may import. What is not listed stands above all and may import everything below.
ALLOWED = {
    "compilation": set(),
    "files": set(),
    "just_in_time": {"compilation", "files"},
    "routing": set(),
    "reference": {"routing"},
    "ops": {"_C", "compilation", "files", "just_in_time", "reference", "routing"},
    "nn": {"ops", "reference", "routing"},
    "swap": {"nn", "ops", "reference", "routing"},
    "surgery": {"ops", "reference", "routing"},
    "clusters": {"files", "routing"},
    "analysis": {"files", "clusters", "routing", "surgery"},
}


def imported(path):
    """Dotted names that a file imports; of ``from a import b`` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts(names):
    """The parts of the library among dotted names."""
    return {name.split(".")[1] for name in names if name.startswith("dtr_kernels.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_a_layer_looks_down(part):
    files = list((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    for path in files:
        assert parts(imported(path)) <= ALLOWED[part] | {part}, path


def test_the_order_has_no_circle():
    TopologicalSorter(ALLOWED).prepare()


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
