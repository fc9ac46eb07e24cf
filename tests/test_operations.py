"""docs/operations.md promises that each row of its tables has a test; here is that those tests exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = ROOT / "docs/operations.md"
_TEST = re.compile(r"`([\w/]*\.py)?::(test_\w+)`")


def functions_of(file: Path) -> set[str]:
    """Names of the tests that a file defines."""
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


def rows_with_tests(text: str) -> list[tuple[str, str]]:
    """Each row of the tables whose last column is ``test``, and what stands in that column."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells[-1:] == ["test"]:
            inside = True
        elif not cells:
            inside = False
        elif inside and set(cells[-1]) - set("-: "):
            found.append((line, cells[-1]))
        elif inside and not cells[-1]:
            found.append((line, ""))
    return found


def missing(text: str) -> list[str]:
    """Named tests that do not exist, anywhere in the text, and rows that name none."""
    wrong = [f"no test: {row}" for row, cell in rows_with_tests(text) if not _TEST.search(cell)]
    file = None
    for match in _TEST.finditer(text):
        if match[1]:
            (file,) = list((ROOT / "tests").rglob(match[1])) or [None]
        if not file or match[2] not in functions_of(file):
            wrong.append(match[0])
    return wrong


def test_every_row_of_the_contract_names_a_test_that_exists() -> None:
    assert len(rows_with_tests(OPERATIONS.read_text())) > 25
    assert missing(OPERATIONS.read_text()) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("| what | test |\n|---|---|\n| a | `test_agent.py::test_no_such_thing` |\n", ["`test_agent.py::test_no_such_thing`"]),
        ("| what | test |\n|---|---|\n| a | |\n", ["no test: | a | |"]),
        ("| what | test |\n|---|---|\n| a | `test_none.py::test_x` |\n", ["`test_none.py::test_x`"]),
        ("| what | seconds |\n|---|---|\n| a | 3 |\n", []),
    ],
)
def test_a_row_without_its_test_is_found(text: str, wrong: list[str]) -> None:
    assert missing(text) == wrong
