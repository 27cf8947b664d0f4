"""Docstrings and comments begin with their subject or their verb."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("dtr_kernels", "benchmarks", "examples", "tests", "csrc", ".ci", "docs")
FILES = [ROOT / "setup.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
WORDS = ("What", "Of", "Whether", "That")
FIRST = rf"\s*({'|'.join(WORDS)})\b"


def found_in_python(source):
    """Yield the lines where a docstring or a comment begins with one of ``WORDS``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and re.match(FIRST, ast.get_docstring(node) or ""):
            yield node.body[0].lineno
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and re.match(f"#:?{FIRST}", token.string):
            yield token.start[0]


def found_in_compiled(source):
    """Yield the lines of C++ or CUDA where a comment begins with one of ``WORDS``."""
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(rf"(//|/\*|^\s*\*){FIRST}", line):
            yield number


LANGUAGES = {
    "Python": ({".py", ".pyi"}, found_in_python),
    "C++": ({".cpp", ".h", ".cu", ".cuh", ".inl"}, found_in_compiled),
}


@pytest.mark.parametrize("suffixes, found_in", LANGUAGES.values(), ids=LANGUAGES)
def test_first_words(suffixes, found_in):
    paths = [path for path in FILES if path.suffix in suffixes]
    assert {path.suffix for path in paths} == suffixes
    assert not [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in found_in(path.read_text("utf-8"))]


@pytest.mark.parametrize("word", WORDS)
def test_first_words_are_found(word):
    python = f'"""\n{word} it does."""\nx = 1  # {word}\n#: {word} it holds.\nclass A:\n    """{word} it is."""\n'
    assert sorted(found_in_python(python)) == [1, 3, 4, 6]
    assert not list(found_in_python(f'"""It does {word}."""\nx = "# {word}"  # {word}ever {word}\n'))
    assert list(found_in_compiled(f"// {word}\nint x;  // {word}\n/* {word}\n * {word} */\n// x {word}\n")) == [
        1,
        2,
        3,
        4,
    ]
