"""How Sphinx makes a site of these pages (`make docs`).

Every page is Markdown that reads as well without the site. Formulas become MathML, by what docutils
brings, so that the site needs no script from elsewhere.
"""

import re
import tomllib
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]

project = "qkd_jax"
copyright = "The qkd_jax developers"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"qkd_jax {release}"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_math_renderer = "mathml"
html_copy_source = False
highlight_language = "text"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

default_role = "code"  # docstrings put code between single backticks
napoleon_use_ivar = True  # fields of a named tuple stand in the index once
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True


def as_written(app, what, name, obj, options, lines) -> None:
    """Lets `|` and `*` of a docstring mean themselves, as they do to its other readers."""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[number] = re.sub(r"(`[^`]+`)|([|*])", lambda m: m[1] or "\\" + m[2], line)


def write_formula(writer, node) -> None:
    block = node.tagname == "math_block"
    writer.body.append(latex2mathml.tex2mathml(node.astext(), as_block=block))
    raise SkipNode


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", as_written)
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
