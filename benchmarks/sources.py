"""Which source a result was measured on, so that a report can say when it is older than the checkout's."""

from __future__ import annotations

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent

# What the speed of routed blocks of DiT and of ADM, and of gradient surgery, depends on.
BLOCKS = (
    "csrc/types.h",
    "csrc/cpu/kernels.*",
    "dtr_kernels/ops/_[clr]*.py",
    "dtr_kernels/ops/tiles.py",
    "dtr_kernels/ops/g[ae]*.py",
    "dtr_kernels/ops/routed_[lm]*.py",
    "dtr_kernels/ops/window_linear.py",
    "dtr_kernels/tuned/*.json",
    "dtr_kernels/nn/[bd]*.py",
    "dtr_kernels/routing.py",
    "dtr_kernels/reference/dit.py",  # the baseline, and what small blocks on a CPU run
)
RES_BLOCK = (
    "dtr_kernels/ops/checks.py",
    "dtr_kernels/ops/conv.py",
    "dtr_kernels/nn/res_block.py",
    "dtr_kernels/routing.py",
    "dtr_kernels/reference/res_block.py",
)
SURGERY = (
    "csrc/types.h",
    "csrc/surgery.h",
    "csrc/cpu/surgery.*",
    "csrc/cuda/*",
    "dtr_kernels/ops/gradient_lists.py",
    "dtr_kernels/ops/gram_matrix.py",
    "dtr_kernels/ops/combine.py",
    "dtr_kernels/ops/pcgrad.py",
)
ENGINES = (*SURGERY, "dtr_kernels/surgery/*.py")


def fingerprint(patterns: Sequence[str], root: Path = ROOT) -> str:
    """A hash of what the files that match any of the patterns say. Comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for path in _files(patterns, root):
        digest.update(f"{path.relative_to(root).as_posix()}\0{_meaning(path)}\0".encode())
    return digest.hexdigest()[:16]


def _files(patterns: Sequence[str], root: Path) -> Iterable[Path]:
    found = {path for pattern in patterns for path in root.glob(pattern) if path.is_file()}
    return sorted(found)


def _meaning(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".py":
        return _python(text)
    if path.suffix == ".json":
        return text
    return " ".join(re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL).split())


def _python(text: str) -> str:
    """The tokens of a Python file without comments and docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    }
    tokens = [
        string
        for kind, string, line in _tokens(text)
        if kind not in (tokenize.COMMENT, tokenize.NL) and not (kind == tokenize.STRING and line in docstrings)
    ]
    # Indentation counts as a level, whatever its width.
    return " ".join(token if token.strip() else repr(token.strip(" ")) for token in tokens)


def _tokens(text: str) -> Iterable[tuple[int, str, int]]:
    """Kind, text and first line of each token. From Python 3.12 on an f-string is several tokens; here it is one."""
    lines = text.splitlines(keepends=True)
    depth, begin = 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name in ("FSTRING_START", "TSTRING_START"):
            begin = begin if depth else token.start
            depth += 1
        elif name in ("FSTRING_END", "TSTRING_END"):
            depth -= 1
            if not depth:
                (first, left), (last, right) = begin, token.end
                whole = "".join(lines[first - 1 : last])
                end = len(whole) - len(lines[last - 1]) + right
                yield tokenize.STRING, whole[left:end], first
        elif not depth:
            yield token.type, token.string, token.start[0]
