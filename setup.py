"""The description of attnc for a package index: README.md without what an index cannot show.

An index resolves relative links and pictures against its own address, so pictures are left out and a link to a file
becomes the file's path. Everything else about the package is in pyproject.toml.
"""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md")
PICTURE = re.compile(r"^!\[[^\]]*\]\((?!https?://)[^)]+\)\n\n", re.MULTILINE)
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?!https?://)(?P<path>[^)#]+)(#[^)]*)?\)")


def index_description() -> str:
    """Return README.md without relative links and pictures."""
    text = PICTURE.sub("", README.read_text(encoding="utf-8"))
    text = LINK.sub(lambda link: f"{link['text']} (`{link['path']}`)", text)
    return f"{text}\nPaths in parentheses are those of the source distribution.\n"


if __name__ == "__main__":
    setup(long_description=index_description(), long_description_content_type="text/markdown")
