"""Sphinx configuration. ``make docs`` builds the pages of this folder, and the API reference from docstrings.

Nothing is fetched while it builds. Formulas are drawn in the reader's browser by MathJax, which the page asks for.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).parent

project = "dtr_kernels"
html_title = "dtr_kernels"
html_theme = "furo"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["demo/*.md"]  # a table that another page includes

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_use_rtype = False  # what stands before a colon in "Returns:" is a shape more often than a type

nitpick_ignore_regex = [
    # Types of other libraries: links to them would take their indexes from the network.
    ("py:.*", r"(torch|collections|pathlib|matplotlib)\..*"),
    ("py:.*", r"Tensor|nn\.\w+|Path|Figure"),
    # Type variables have no place of their own.
    ("py:class", r"dtr_kernels\.swap\..*\.(Model|NewFamily)|dtr_kernels\.clusters\._Kind"),
    # Described by its whole name, and raised by its last.
    ("py:exc", "Unfit"),
    # The engine's module is private.
    ("py:exc", r"one_pass\.Unsupported"),
]


def adapt_links(_: Sphinx, page: str, source: list[str]) -> None:
    """Links are written for the repository. Here its files are downloads, and its folders have no page.

    The page "contributing" is CONTRIBUTING.md, which lies in the folder above.
    """
    here = (DOCS / page).parent
    written_for = here
    if page == "contributing":
        written_for = DOCS.parent
        source[0] = (written_for / "CONTRIBUTING.md").read_text(encoding="utf-8")

    def adapted(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = Path(os.path.normpath(written_for / target))
        if not path.exists():
            return link[0]  # no link, or one that Sphinx complains about
        if path.is_dir():
            return text
        scheme = "" if path.is_relative_to(DOCS) else "path:"
        return f"[{text}]({scheme}{os.path.relpath(path, here)}{anchor})"

    source[0] = re.sub(r"\[([^][]+)\]\(([^)#:\s]+)(#[^)]*)?\)", adapted, source[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", adapt_links)
