"""Sphinx configuration of the documentation; `make docs` builds it into docs/_build/html."""

import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

_DOCS = Path(__file__).parent
sys.path[:0] = [str(_DOCS.parent), str(_DOCS / "_extensions")]

from mlet_dist import __version__

project = "mlet_dist"
author = "the mlet_dist authors"
copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "code_reference",
    "repository_pages",
]
exclude_patterns = ["_build", "_extensions"]

# Links and anchors mean the same here and on a code host: an anchor is GitHub's slug of a heading.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

# References into mlet_dist must resolve. Pages of other libraries are not read, so that a build needs no network.
nitpicky = True
# Types that appear in signatures and belong to no public module have no page.
nitpick_ignore_regex = [
    ("py:.*", r"(?!mlet_dist\b).*"),
    ("py:class", r"mlet_dist\.embeddings\.(planning|sharded)\..*"),
    ("py:class", r"mlet_dist\.config\..*"),
]

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# An argument a line, so that a signature fits a phone.
maximum_signature_line_length = 60
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

html_theme = "pydata_sphinx_theme"
html_title = "mlet_dist"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
templates_path = ["_templates"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "mlet_dist"},
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "navigation_with_keys": False,
    "back_to_top_button": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
# The whole contents on every page: the theme itself shows only the pages below the current one.
html_sidebars = {"**": ["contents.html"]}

linkcheck_anchors = False
linkcheck_timeout = 20
linkcheck_retries = 2


def setup(app: Sphinx) -> None:
    """Blocks of indented or unlabelled code are shell commands."""
    app.connect("doctree-read", _label_shell_commands)


def _label_shell_commands(app: Sphinx, document: nodes.document) -> None:
    commands = ("mlet ", "make ", "pip ", "python ", ". .venv", "torchrun ", "kubectl ", "torchx ", "git ")
    for block in document.findall(nodes.literal_block):
        if block.get("language", "default") in ("default", "none") and block.astext().startswith(commands):
            block["language"] = "bash"
