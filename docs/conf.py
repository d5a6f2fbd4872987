"""How the documentation is built: `make docs`, offline, warnings are errors."""

from mpd import __version__

project = "mpd"
author = "the mpd authors"
copyright = "2026, the mpd authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
default_role = "code"  # docstrings put names in single backticks
exclude_patterns = ["examples"]

html_theme = "furo"
html_title = f"mpd {version}"
html_static_path = ["_static"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_class_signature = "mixed"
