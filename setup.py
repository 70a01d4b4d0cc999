"""The README as the long description; all else of the package is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def long_description() -> str:
    """Without pictures and links to files, which lead nowhere on a package index."""
    text = (Path(__file__).parent / "README.md").read_text("utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(long_description=long_description(), long_description_content_type="text/markdown")
