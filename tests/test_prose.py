"""The sentences of the documents are short, their words plain, and their lines fit."""

import re

import documents
import pytest
from documents import PAGES, ROOT, name_of

PLAIN_WORDS = {  # what was written before, and what is written now
    "the usual way": "baseline",
    "by hand": "measured once",
    "mend": "fix",
    "anew": "again",
    "milestone": "nothing outside the repository",
    "the design": "nothing outside the repository",
}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_sentences_are_short_and_lines_fit(page):
    found = documents.measure(documents.read(page))
    assert found.median_words <= 18
    assert found.semicolons <= 2
    assert found.long_lines == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_words_are_plain(page):
    text = " ".join(documents.without_code(documents.read(page)).lower().split())
    assert [word for word in PLAIN_WORDS if re.search(rf"\b{word}\b", text)] == []


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_lines_of_configurations_fit(file):
    assert [line for line in documents.read(file).splitlines() if len(line) > documents.MOST_CHARACTERS] == []


def test_the_readme_is_a_screen_and_a_half():
    assert len(documents.read(ROOT / "README.md").splitlines()) <= 90


def test_measures_count_what_they_say():
    text = """# A heading; not prose

One two three. Four `five; six` seven; eight nine? See Eq. (5) too.

| a | b; c |
|---|---|

- an item of
  five words

```
code; code; code. Not a sentence.
```
"""
    assert documents.sentences(text) == [
        "One two three.",
        "Four code seven; eight nine?",
        "See Eq (5) too.",
        "an item of five words",
    ]
    found = documents.measure(text)
    assert found.median_words == 4.5
    assert found.semicolons == pytest.approx(1000 * 3 / 24)
    assert found.long_lines == []
    assert documents.long_lines(f"{'word ' * 30}\n| {'cell ' * 30}\n{'x' * 130}\n") == ["word " * 30]
    assert documents.anchors("## What may be deleted\n### `a.b`, twice") == {"what-may-be-deleted", "ab-twice"}
