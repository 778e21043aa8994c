"""How the site is built, from the root of the repository: `python -m sphinx -W docs build/docs`."""

import os
import re
import sys
from pathlib import Path

import jax
import optax
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import stringify_annotation

import florax

DOCS = Path(__file__).parent
ROOT = DOCS.parent

project = "florax"
author = "The florax authors"
copyright = "The florax authors"
version = release = florax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
templates_path = ["_templates"]

# Pages. Notebooks are Markdown, without outputs: they run when the site is built.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_update_mathjax = False
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 180
nb_execution_show_tb = True
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
copybutton_exclude = ".linenos, .gp, .go"  # what one copies is the input

# The reference is the docstrings.
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autosummary_generate = True
default_role = "py:obj"
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Nothing comes from another host: formulas are MathML, which browsers know.
html_theme = "furo"
html_theme_options = {"top_of_page_buttons": []}

html_title = "florax"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["florax.css"]
html_show_sphinx = False
html_copy_source = False
toc_object_entries = False


class Results(SphinxDirective):
    """A table of what was measured, by its name in the READMEs: made of the results themselves."""

    required_arguments = 1

    def run(self) -> list:
        sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
        from florax_benchmarks import pages, results

        for file in (Path(pages.__file__), *results.FOLDER.glob("*.jsonl")):
            self.env.note_dependency(str(file))
        return self.parse_text_to_nodes(pages.BLOCKS[self.arguments[0]](results.FOLDER))


def visit_math(translator, node) -> None:
    """Inline formulas, and those that stand by themselves, as MathML."""
    is_block = node.tagname == "math_block"
    before, after = ('<div class="math">', "</div>\n") if is_block else ("", "")
    translator.body.append(before + tex2mathml(node.astext(), as_block=is_block) + after)
    raise nodes.SkipNode


# Where the READMEs lead, here: those that are pages of the site.
PAGES = {
    ROOT / "README.md": DOCS / "index.md",
    ROOT / "benchmarks/README.md": DOCS / "benchmarks.md",
    ROOT / "examples/README.md": DOCS / "examples.md",
}
LINK = re.compile(r"\[([^][]*)\]\((?!https?:)([^)#\s]+)(#[\w-]+)?\)")


def lead_inside(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Turn the links of an included README into those of the page that includes it."""
    source = (DOCS / path).resolve()
    page = DOCS / f"{parent}.md"

    def inside(found: re.Match) -> str:
        target = (source.parent / found[2]).resolve()
        is_page = target in PAGES or DOCS in target.parents
        if target.is_dir() or (target.suffix == ".md" and not is_page):
            return found[1]  # there is nothing to show
        # Headings of the front page are here on other pages: which, moves with them.
        anchor = "" if target == ROOT / "README.md" else found[3] or ""
        own = os.path.relpath(PAGES.get(target, target), page.parent)
        return f"[{found[1]}]({own}{anchor})"

    content[0] = LINK.sub(inside, content[0])


def end_blocks(app: Sphinx, page: str, content: list[str]) -> None:
    """Drop the empty line that ends a doctest before the fence of its block."""
    content[0] = content[0].replace("\n\n```\n", "\n```\n")


# Types that jax and optax have a word for; in a signature they would be a line each.
WORDS = {
    stringify_annotation(own, "smart"): word
    for word, own in {
        "ScalarOrSchedule": optax.ScalarOrSchedule,
        "ArrayTree": optax.Updates,
        "ArrayLike": jax.typing.ArrayLike,
        "DTypeLike": jax.typing.DTypeLike,
    }.items()
}


def shorten(app, what, name, obj, options, signature, returns) -> tuple:
    """A signature and what it returns, with those words for their types."""
    for long, word in WORDS.items():
        signature, returns = (own and own.replace(long, word) for own in (signature, returns))
    return signature, returns


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.add_directive("results", Results)
    app.connect("source-read", end_blocks)
    app.connect("include-read", lead_inside)
    app.connect("autodoc-process-signature", shorten)
