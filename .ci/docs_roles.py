"""Sphinx roles of docstrings, such as ``:class:``, which mkdocs would print."""

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """The page with the names alone."""
    return re.sub(r":(?:class|func|meth|data|mod|attr):(?=<code>)", "", html)
