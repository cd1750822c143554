"""Sphinx's settings for the book; `python tools/book` calls it."""

import os
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

_config = ConfigParser(delimiters=["="], interpolation=None)
_config.read(Path(__file__).resolve().parents[2] / "settings.ini", encoding="utf-8")
_settings = _config["DEFAULT"]
_address = os.environ.get("BOOK_REPOSITORY", "")

project = "nano-vLLM, taught"
author, copyright = _settings["author"], _settings["copyright"]
version = release = _settings["version"]
extensions = ["myst_nb", "sphinx_copybutton"]
templates_path, html_static_path = ["templates"], ["static"]
if _formulas := find_spec("sphinx-mathjax-offline"):  # MathJax in the site: no other server
    html_static_path += [f"{_formulas.submodule_search_locations[0]}/static"]
    mathjax_path = "mathjax/tex-chtml.js"
exclude_patterns = ["**.ipynb_checkpoints"]

nb_execution_mode = "off"       # the notebooks have stored what they show
nb_merge_streams = True
nb_render_markdown_format = "myst"  # links of tables that a cell shows
nb_mime_priority_overrides = [("html", "image/png", 0), ("html", "text/markdown", 1)]
nb_code_prompt_show, nb_code_prompt_hide = "Show the code", "Hide the code"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
suppress_warnings = [
    "mystnb.unknown_mime_type", "misc.highlighting_failure", "myst.header",
    "config.cache",             # nothing here is worth a cache
]

html_theme = "sphinx_book_theme"
html_title = project
html_css_files, html_favicon = ["book.css"], "static/icon.svg"
html_search_scorer = os.environ["BOOK_SEARCH"]
html_context = {"default_mode": "auto"}
html_copy_source, html_show_sourcelink = True, False
html_theme_options = {
    "home_page_in_toc": True, "show_toc_level": 2, "show_navbar_depth": 1,
    "use_download_button": True, "use_fullscreen_button": False, "search_bar_text": "Search …",
}
if _address:
    html_theme_options.update(
        repository_url=_address, repository_branch=_settings.get("branch", "main"),
        repository_provider="gitlab" if "gitlab" in _address else "github",
        use_repository_button=True, use_source_button=True)
if _address.startswith("https://github.com/"):
    html_theme_options["launch_buttons"] = {"colab_url": "https://colab.research.google.com"}
