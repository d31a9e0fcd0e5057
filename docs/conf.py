"""Sphinx configuration; build with `make docs`. Nothing is executed or fetched while the site is built."""

import shutil
import sys
from pathlib import Path

from pmcmc import __version__

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

# Copies, since links between pages are resolved where a page really lies: notebooks must lie among the other pages.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns("*.py", ".*"))

project = "pmcmc"
author = "the pmcmc authors"
copyright = author
release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "public_names",
    "benchmark_tables",
]
default_role = "py:obj"  # single backticks in docstrings

html_theme = "furo"
html_title = "pmcmc"
html_static_path = ["_static"]
html_css_files = ["pmcmc.css"]
html_show_sourcelink = False
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

# Notebooks are shown with the outputs they were committed with, and load no script from the network.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

html_math_renderer = "mathml"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True}
autodoc_typehints = "none"  # docstrings say shapes, and most types are Any: a pytree, a number or an array
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style"), "Source"]
add_module_names = False
toc_object_entries = False
