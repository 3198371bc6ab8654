"""The table of formats in the docs names tests that exist."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)(?:\[([^\]]+)\])?`", DOCS.read_text(encoding="utf-8"))))


def test_the_table_names_tests():
    assert len(NAMED) > 25


@pytest.mark.parametrize(("file", "function", "case"), NAMED)
def test_a_named_test_exists(file, function, case):
    source = (Path(__file__).parent / file).read_text(encoding="utf-8")
    assert f"def {function}(" in source
    assert not case or f'"{case}"' in source
