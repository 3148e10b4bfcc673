"""What the docs name exists, and what they say of the package is what it is."""

import inspect
import re
from ast import literal_eval
from pathlib import Path
from runpy import run_path

import pytest

import gls_fused

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md"))]
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


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_readme_is_what_a_newcomer_reads():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for page in DOCS.glob("*.md"):
        assert f"](docs/{page.name})" in text


def test_one_description():
    project = (ROOT / "pyproject.toml").read_text()
    (line,) = re.findall(r'^description = "(.*)"$', project, re.MULTILINE)
    paragraph = (ROOT / "README.md").read_text().split("\n\n")[1]
    assert " ".join(paragraph.split()).startswith(line)
    what = line.split(":")[0]
    assert "first-order" in what
    assert gls_fused.__doc__.startswith(what)
    assert f"site_description: {what}\n" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.parametrize("name", [name for name in gls_fused.__all__ if name != "__version__"])
def test_public_name_has_a_page(name):
    page = (DOCS / "api" / f"{name}.md").read_text()
    assert page.startswith(f"::: gls_fused.{name}\n")
    assert f"[`{name}`]({name}.md)" in (DOCS / "api" / "index.md").read_text()


def test_table_of_options_has_each_default():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (DOCS / "usage.md").read_text(), re.MULTILINE)
    parameters = inspect.signature(gls_fused.GLS).parameters.values()
    expected = {p.name: p.default for p in parameters if p.name != "params"}
    assert {name: literal_eval(default) for name, default in rows} == expected


def test_docstrings_as_the_site_shows_them():
    pytest.importorskip("mkdocs", reason="needs the extra 'docs'")
    to_markdown = run_path(str(DOCS / "hooks.py"))["to_markdown"]
    given = """Contract.

        a = b

    Letters:
        A [n, d]    rows
    Args:
        lr: > 0; see docs/method.md.
    Numerics: one sentence, that
        goes on.
    Raises:
        ValueError: never.
    """
    expected = """Contract.

        a = b

    Letters:

        A [n, d]    rows

    Args:
        lr: \\> 0; see [docs/method.md](../method.md).

    **Numerics:** one sentence, that
    goes on.

    Raises:
        ValueError: never."""
    assert to_markdown(inspect.cleandoc(given)) == inspect.cleandoc(expected)
