"""The documentation: it builds without a warning, its examples run, and what it names exists.

External links are not followed: ``make linkcheck`` does that where there is a network.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import any_torchvision  # noqa: F401  # before diffusers
import pytest

import dtr_kernels as dtr
from dtr_kernels.swap import registry

pytest.importorskip("diffusers", reason="NOT RUN: needs diffusers; pip install '.[demo,test]'")
pytest.importorskip("furo", reason="NOT RUN: needs furo; pip install '.[demo,test]'")
pytest.importorskip("myst_parser", reason="NOT RUN: needs myst_parser; pip install '.[demo,test]'")
pytest.importorskip("sklearn", reason="NOT RUN: needs sklearn; pip install '.[demo,test]'")
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Pages written by hand, and pages that commands generate.
WRITTEN = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(DOCS.glob("*.md"))])
GENERATED = sorted([*DOCS.glob("*/*.md"), *ROOT.glob("benchmarks/results/*/*.md"), *ROOT.glob("dtr_kernels/**/*.md")])
LANGUAGES = {"", "bash", "python", "text", "{eval-rst}", "{include}", "{toctree}"}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def fences(text):
    """Language and content of every fenced block."""
    return re.findall(r"^```([^\s`]*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The lines of the blocks for a shell, without comments."""
    for language, block in fences(text):
        if language == "bash":
            yield from filter(None, (line.split("#")[0].strip() for line in block.splitlines()))


def pages_with(find):
    return [pytest.param(page, id=name_of(page)) for page in WRITTEN if list(find(page.read_text()))]


# --- examples --------------------------------------------------------------------------------------------------------


def examples(text):
    return [block for language, block in fences(text) if language == "python"]


@pytest.mark.parametrize("page", pages_with(examples))
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, one_thread):
    """All Python blocks that a reader sees, pasted in order into one file."""
    text = page.read_text()
    for package in set(re.findall(r"^from (peft|accelerate|timm)|^import (pytorch_lightning)", text, re.MULTILINE)):
        pytest.importorskip("".join(package), reason=f"NOT RUN: needs {''.join(package)}; pip install '.[demo,test]'")
    monkeypatch.chdir(tmp_path)  # which takes the files that they write
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(registry, "FAMILIES", list(registry.FAMILIES))
    Path("page.py").write_text("\n".join(examples(text)))
    runpy.run_path("page.py", run_name="__main__")


def test_no_code_is_hidden_from_readers():
    for page in WRITTEN:
        assert "invisible-code-block" not in page.read_text(), page


@pytest.mark.parametrize("page", pages_with(fences))
def test_every_block_says_what_it_is_in_a_word_that_is_known_here(page):
    assert {language for language, _ in fences(page.read_text())} <= LANGUAGES


# --- commands --------------------------------------------------------------------------------------------------------


def help_of(words, monkeypatch, capsys):
    """Return the output of ``python -m <words> --help``."""
    module, *subcommand = words
    package = importlib.util.find_spec(module)
    name = f"{module}.__main__" if package.submodule_search_locations else module
    monkeypatch.setattr(sys, "argv", [module, *subcommand, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert ended.value.code == 0, words
    return capsys.readouterr().out


@pytest.mark.parametrize("page", pages_with(commands))
def test_commands_exist_and_take_these_options(page, monkeypatch, capsys):
    makefile = (ROOT / "Makefile").read_text()
    for command in commands(page.read_text()):
        words = shlex.split(command)
        if words[0] == "make":
            for word in words[1:]:
                variable = word.partition("=")[0]
                known = rf"^{variable} \?=|\$\({variable}\)" if "=" in word else rf"^{word}:"
                assert re.search(known, makefile, re.MULTILINE), command
        elif "-m" in words and (module := words[words.index("-m") + 1]).partition(".")[0] in OURS:
            rest = words[words.index("-m") + 2 :]
            subcommand = rest[:1] if module in ("dtr_kernels", "benchmarks") else []
            shown = help_of([module, *subcommand], monkeypatch, capsys)
            for option in (word for word in rest if word.startswith("--")):
                assert re.search(rf"{option}\b", shown), command


OURS = ("dtr_kernels", "benchmarks", "examples")


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(page):
    """Those of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        yield re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", WRITTEN + GENERATED, ids=name_of)
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT) and linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


# --- messages --------------------------------------------------------------------------------------------------------


def strings(tree):
    """The strings of a module, with … for what is filled in; those that are joined are one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def messages():
    """All strings of our code, of the scripts in .ci too."""
    texts = [path.read_text() for folder in (*OURS, ".ci") for path in ROOT.glob(f"{folder}/**/*.py")]
    return "\n".join(string for text in texts for string in strings(ast.parse(text)))


def quoted(text):
    """The messages of a page's table of errors."""
    _, _, table = text.partition("## Errors people meet")
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


@pytest.mark.parametrize("page", pages_with(quoted))
def test_quoted_messages_are_the_librarys(page, messages):
    for message in quoted(page.read_text()):
        pattern = ".*".join(re.escape(part) for part in message.split("…"))
        assert re.search(pattern, messages), message


# --- the site --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--nitpicky", "--quiet"]
    built = subprocess.run([*command, DOCS, folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_public_name_is_in_the_api(site):
    *_, compressed = (site / "objects.inv").read_bytes().split(b"\n", 4)  # behind four lines of text
    documented = {line.split()[0] for line in zlib.decompress(compressed).decode().splitlines()}
    for module in (dtr, dtr.nn, dtr.ops, dtr.reference, dtr.swap):
        for name in module.__all__:
            # A name of several modules is described in one of them.
            described = {f"{module.__name__}.{name}", f"dtr_kernels.{name}"} & documented
            assert described or not callable(getattr(module, name)), name


def test_every_page_is_in_the_site(site):
    for page in DOCS.glob("*.md"):
        assert (site / f"{page.stem}.html").exists()


# --- the notebook ----------------------------------------------------------------------------------------------------


def test_the_tour_runs_and_is_saved_with_its_outputs(tmp_path, monkeypatch, one_thread):
    """With fewer steps here; every cell of code shows something."""
    pytest.importorskip("matplotlib", reason="NOT RUN: needs matplotlib; pip install '.[demo,test]'")
    monkeypatch.chdir(ROOT)
    cells = json.loads((ROOT / "examples/tour.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code)
    kinds = [kind for cell in code for output in cell["outputs"] for kind in output.get("data", {})]
    assert kinds.count("image/png") == 5 and not any(
        o["output_type"] == "error" for cell in code for o in cell["outputs"]
    )
    source = "\n".join("".join(cell["source"]) for cell in code)
    assert source.count("STEPS = 500") == 1 and source.startswith("%matplotlib inline\n")
    script = tmp_path / "tour.py"
    script.write_text(source.partition("\n")[2].replace("STEPS = 500", "STEPS = 3"))
    runpy.run_path(str(script))
