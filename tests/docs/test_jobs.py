"""The pages of docs/reference agree with the docstrings, flags and fields of the code."""

from __future__ import annotations

import pytest

from linearsr.cli.job import parser as parser_of
from tools.generate_docs import FOLDER, JOBS, NOTICE, pages


def test_reference_pages_equal_the_output_of_the_generator() -> None:
    texts = pages()
    assert {path.stem for path in FOLDER.glob("*.md")} == set(texts)
    for name, text in texts.items():
        assert (FOLDER / f"{name}.md").read_text() == text, (
            f"docs/reference/{name}.md: run `make docs`"
        )


@pytest.mark.parametrize("job", JOBS)
def test_every_flag_is_explained_on_the_page_as_in_help(job: str) -> None:
    parser = parser_of(job.replace("_", "-"))
    help_text = " ".join(parser.format_help().split())
    flags = [line for line in pages()[job].splitlines() if line.startswith("| `")]
    assert len(flags) == len(parser._actions) - 1
    for flag in flags:
        explained = flag.split(" | ")[-1].removesuffix(" |")
        assert explained and explained.replace("- ", "-") in help_text.replace("- ", "-"), flag


@pytest.mark.parametrize("name", ["serve", "recipe"])
def test_every_field_is_explained(name: str) -> None:
    page = pages()[name].split("## Where they differ")[0]
    for row in page.splitlines():
        if row.startswith("| `"):
            assert row.split(" | ")[-1].removesuffix("|").strip(), row
    assert NOTICE in page
