"""What the docs name exists."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
TEXT = (DOCS / "expectations.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_named_test_exists(file, name):
    assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE)


def test_every_row_names_a_test_and_has_no_gap():
    tables = [block.splitlines() for block in TEXT.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 2
    for header, _, *rows in tables:
        assert len(rows) > 10
        for row in rows:
            assert "::test_" in row
            cells = [cell.strip() for cell in row.strip().split("|")[1:-1]]
            assert len(cells) == header.count("|") - 1
            assert all(cells)


@pytest.mark.parametrize("page", ["../README.md", *sorted(p.name for p in DOCS.glob("*.md"))])
def test_linked_files_exist(page):
    path = DOCS / page
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
