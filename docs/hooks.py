"""What the site needs beside mkdocs.yml: README as its first page, docstrings in Markdown.

mkdocs loads this file as a hook; mkdocstrings loads it as an extension of griffe, which reads the
docstrings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

# The sections that griffe lays out itself.
LAID_OUT = ("Args:", "Returns:", "Raises:")
PARAGRAPH = re.compile(r"(Numerics|Source): ")
RANGE = re.compile(r"(    \w+: )(>)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The first page is README, whose links into docs/ are links within the site."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


class HouseDocstrings(griffe.Extension):
    """Docstrings of the house, as griffe's Google style expects them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)


def to_markdown(docstring: str) -> str:
    """A docstring whose sections stand apart, and whose indented blocks are code.

    "Numerics: ..." and "Source: ..." become paragraphs. "> 0", a range, is not a quotation.
    """
    lines: list[str] = []
    in_paragraph = False
    for line in docstring.replace("docs/method.md", "[docs/method.md](../method.md)").splitlines():
        before = lines[-1] if lines else ""
        if PARAGRAPH.match(line):
            lines += ["", PARAGRAPH.sub(r"**\1:** ", line)]
            in_paragraph = True
        elif line in LAID_OUT:
            lines += ["", line]
            in_paragraph = False
        elif in_paragraph and line:
            lines.append(line.strip())
        elif re.match(r"\S.*:$", before) and before not in LAID_OUT and line.startswith("    "):
            lines += ["", line]
        else:
            lines.append(RANGE.sub(r"\1\\\2", line))
            in_paragraph = False
    return "\n".join(lines)
