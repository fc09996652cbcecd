"""Sphinx configuration of the site; ``make docs`` builds it in docs/_build/html.

The source folder is the repository's root, so links between pages are the same here and there.
"""

import hashlib
import os
import sys
from pathlib import Path

from docutils.nodes import Element, Text, document, literal
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parent.parent
NAVIGATION = {
    "README": ROOT / "docs/navigation/site.txt",
    "experiments/README": ROOT / "docs/navigation/results.txt",
}


def digest() -> str:
    """Returns a digest of the code that notebooks import."""
    files = sorted([*ROOT.glob("scoresde/**/*.py"), *ROOT.glob("conf/**/*.yaml")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def add_navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Adds the table of contents to a page of the repository that has none of its own."""
    if name in NAVIGATION:
        source[0] += "\n" + NAVIGATION[name].read_text(encoding="utf-8")


def shorten_tests(app: Sphinx, tree: document) -> None:
    """Shows the name of a test without its file, in a small font."""
    for node in tree.findall(literal):
        _, separator, name = node.astext().partition("::")
        if separator and name.startswith("test_"):
            node.children, node["classes"] = [Text(name)], ["test"]


def find(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> Element | None:
    """Resolves a reference by the last part of a name, if one object has this name."""
    domain, target = env.domains.python_domain, node.get("reftarget", "")
    found = [name for name in domain.objects if name.endswith(f".{target}")]
    homes = {(domain.objects[name].docname, domain.objects[name].node_id) for name in found}
    if node.get("refdomain") != "py" or len(homes) != 1:
        return None
    ((page, place),) = homes
    return make_refnode(app.builder, node["refdoc"], page, place, content, target)


def setup(app: Sphinx) -> None:
    """Connects the hooks."""
    app.connect("source-read", add_navigation)
    app.connect("doctree-read", shorten_tests)
    app.connect("missing-reference", find)


project = "scoresde"
copyright = "the scoresde authors"
html_title = "scoresde"
root_doc = "README"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/**/*.md",
    "experiments/README.md",
    "experiments/*/README.md",
    "experiments/likelihood_cutoff/table.md",
    "experiments/restoration/table.md",
]
exclude_patterns = ["docs/_build", ".venv", "build", "dist", "runs", "multirun", ".*"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
templates_path = ["_templates"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "home.html"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Notebooks are executed anew if they or the code changed. `!python` in a cell is this interpreter.
nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build/notebooks" / digest())
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

profile = ROOT / "build/ipython/profile_default"
profile.mkdir(parents=True, exist_ok=True)
(profile / "ipython_kernel_config.py").write_text("c.InlineBackend.figure_formats = {'retina'}\n")
os.environ |= {
    "IPYTHONDIR": str(profile.parent),
    "MATPLOTLIBRC": str(ROOT / "docs/matplotlibrc"),
    "OMP_NUM_THREADS": "1",  # faster for networks this small
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}
