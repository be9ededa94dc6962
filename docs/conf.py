"""The documentation site: ``sphinx-build -W --keep-going docs site`` (``pip install 'dopt-api[docs]'``).

Pages are plain Markdown that reads as well where the repository is browsed. What the site adds is navigation, search,
and equations: these become MathML while the site is built, so that the pages need no script and no network for them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from latex2mathml.converter import convert

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from dopt_api._version import __version__  # noqa: E402 - after the path to it

project = "dopt"
author = "the dopt project"
version = release = __version__
extensions = ["myst_parser", "sphinx_copybutton"]
root_doc = "index"
exclude_patterns = ["_*"]
nitpicky = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # the anchors that the repository's own pages have
suppress_warnings = ["misc.highlighting_failure"]  # a strategy file may have comments that JSON has not

highlight_language = "text"  # of blocks that do not say theirs

html_theme = "furo"
html_title = f"dopt {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_math_renderer = "mathml"
copybutton_prompt_text = "$ "

OUTSIDE = {"../benchmarks/README.md": "benchmarks.md"}
"""Where links that leave this folder lead in the site."""


def keep_links_inside(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Turn links to files beside the documentation into links to their pages in the site."""
    for outside, inside in OUTSIDE.items():
        source[0] = source[0].replace(f"]({outside}", f"]({inside}")


def inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Write an equation in a line."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def display(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write an equation of its own."""
    translator.body.append(f'<div class="equation">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register what the pages need beyond the extensions."""
    app.connect("source-read", keep_links_inside)
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
