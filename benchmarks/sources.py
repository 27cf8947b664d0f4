"""The source that a result was measured on, so that a report can say if it is older than the checkout's.

A benchmark depends on the library functions that its module imports, on the modules that these import, and so on. If
these reach the extension, it also depends on the files compiled into the extension and on the compiler flags.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.cases import Benchmark

ROOT = Path(__file__).parent.parent

_EXTENSION = "dtr_kernels._C"
_COMPILATION = "dtr_kernels/compilation.py"
# The parts of the compilation that determine the compiled kernels; the rest finds programs and explains failures.
_FLAGS = ("CXX_FLAGS", "NVCC_FLAGS", "commands")
_BUILDING = ("dtr_kernels.compilation", "dtr_kernels.just_in_time")
# The CUDA kernels are those of gradient surgery, whose launchers all use this module.
_USES_CUDA = "dtr_kernels.ops.gradient_lists"
_USES_TILES, _TILES = "dtr_kernels.ops.tiles", "dtr_kernels/tuned/*.json"


def fingerprint(benchmark: Benchmark, root: Path | None = None) -> str:
    """Hash the library code that a benchmark's figures depend on, and the tuned tiles that it finds."""
    return fingerprint_of(benchmark.cases.__module__, *benchmark.modules, root=root, with_tiles=True)


def fingerprint_of(*modules: str, root: Path | None = None, with_tiles: bool = False) -> str:
    """Hash the content of library modules and of all that they import of it; of a package, all that it exports.

    Comments, docstrings and layout do not count.
    """
    root = root or ROOT
    reached = _reached(modules, root)
    counted = [path for name, path in reached.items() if name.startswith("dtr_kernels") and path.suffix == ".py"]
    meanings = {path: _python(path.read_text()) for path in counted}
    if _EXTENSION in reached:
        meanings |= {path: _c(path.read_text()) for path in _compiled(root, cuda=_USES_CUDA in reached)}
        meanings[root / _COMPILATION] = _python((root / _COMPILATION).read_text(), only=_FLAGS)
    if with_tiles and _USES_TILES in reached:
        meanings |= {path: path.read_text() for path in root.glob(_TILES)}
    digest = hashlib.sha256()
    for path, meaning in sorted(meanings.items()):
        digest.update(f"{path.relative_to(root).as_posix()}\0{meaning}\0".encode())
    return digest.hexdigest()[:16]


# --- imports ---------------------------------------------------------------------------------------------------------


def _reached(modules: Iterable[str], root: Path) -> dict[str, Path]:
    """Return the files of modules and of their imports from the library and the benchmarks' suite, by module name."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _path(name, root)
        if name in found or path is None or name in _BUILDING:
            continue
        if path.stem == "__init__" and name not in modules:
            continue  # its exports are followed to the modules that define them
        found[name] = path
        if path.suffix == ".py":
            waiting += _imports(path, root)
    return found


def _path(module: str, root: Path) -> Path | None:
    """Return the file of a module of the library or the suite; None for other modules."""
    if not module.startswith(("dtr_kernels", "benchmarks.suite")):
        return None
    whole = root / module.replace(".", "/")
    candidates = (whole.with_suffix(".py"), whole / "__init__.py", whole.with_suffix(".pyi"))
    return next((path for path in candidates if path.is_file()), None)


def _imports(path: Path, root: Path) -> set[str]:
    """Return the modules that define the names that a file imports."""
    found = set()
    for module, *names in _mentions(path.read_text()):
        for name in names:
            module = _home(module, name, root)
        found.add(module)
    return found


@functools.cache
def _mentions(text: str) -> set[tuple[str, ...]]:
    """Return the imports of a file and their uses: modules, each followed by a name in it, a name in that, ..."""
    tree = _parsed(text)
    names: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.partition(".")[0]: (alias.name,) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}

    def used(node: ast.expr) -> tuple[str, ...]:
        if isinstance(node, ast.Name):
            return names.get(node.id, ())
        base = used(node.value) if isinstance(node, ast.Attribute) else ()
        return (*base, node.attr) if base and isinstance(node, ast.Attribute) else ()

    return {*names.values(), *(used(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))} - {()}


def _home(module: str, name: str, root: Path) -> str:
    """Return the module that defines the result of ``from module import name``; the result itself, if a module."""
    path = _path(module, root)
    if path is None or path.stem != "__init__":
        return module
    for node in _parsed(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module not in (None, module):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _home(node.module, alias.name, root)
    return f"{module}.{name}"


# --- includes --------------------------------------------------------------------------------------------------------


def _compiled(root: Path, cuda: bool) -> set[Path]:
    """Return the files that are compiled into the extension, and the files that they include."""
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    waiting = [path for path in (root / "csrc").rglob("*.c*") if path.suffix in suffixes]
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file():  # the build writes one of them
            found.add(path)
            included = re.findall(r'^\s*#include "(.+?)"', path.read_text(), re.MULTILINE)
            waiting += [Path(os.path.normpath(path.parent / name)) for name in included]
    return found


# --- content of a file -----------------------------------------------------------------------------------------------


def _c(text: str) -> str:
    return " ".join(re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL).split())


_parsed = functools.cache(ast.parse)


@functools.cache
def _python(text: str, only: Sequence[str] = ()) -> str:
    """Return a file's syntax tree without docstrings, the same in all Python versions; ``only`` selects its names."""
    tree = _parsed(text)
    return _tree([node for node in tree.body if _names_of(node) & set(only)] if only else tree)


def _names_of(node: ast.stmt) -> set[str]:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {target.id for target in targets if isinstance(target, ast.Name)} | {getattr(node, "name", "")}


def _tree(node: object) -> str:
    if isinstance(node, list):
        return f"[{','.join(map(_tree, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    # Skip empty fields, some of which exist only in newer versions of Python.
    said = [f"{name}={_tree(value)}" for name, value in fields.items() if value is not None and value != []]
    return f"{type(node).__name__}({','.join(said)})"
