"""Markdown pages taken apart: fenced blocks, command lines, names of files, and the measures of their prose."""

import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "configs/README.md", "benchmarks/README.md", "k8s/README.md")
PAGES = [*(ROOT / name for name in TOP), *sorted((ROOT / "docs").glob("*.md"))]
MOST_CHARACTERS = 100
_PROMPT = re.compile(r"^[\w-]+\$ ")
_COMMENT = re.compile(r"(^|\s)#\s.*$")
_CODE = re.compile(r"`+[^`]*`+")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_ABBREVIATION = re.compile(r"\b(Eq|Sec|e\.g|i\.e|vs)\.")
_END = re.compile(r"""(?<=[.!?])["*)]*\s+""")
_ITEM = re.compile(r"\s*([-*]|\d+\.)\s+(?=\S)")
_LEAD = re.compile(r"^\*\*[^*]{1,40}[.?]\*\*\s+")  # what a paragraph or an item is called is no sentence


class Block(NamedTuple):
    """A fenced block: what stands behind its fence, and its lines."""

    language: str
    text: str


@dataclass(frozen=True, slots=True)
class Measures:
    """How a page reads."""

    median_words: float  # of a sentence, outside of tables and code
    semicolons: float  # in 1,000 words, tables included
    long_lines: list[str]  # that could be shorter


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(match[1].strip(), match[2]) for match in re.finditer(r"(?ms)^```(.*?)$\n(.*?)^```", text)]


def command_lines(block: Block) -> list[str]:
    """What is typed: continued lines are one, and prompts, comments and what stands in brackets are left out.

    Blocks of another language than a shell's have none.
    """
    if block.language not in ("", "bash"):
        return []
    joined = block.text.replace("\\\n", " ")
    lines = [_COMMENT.sub("", _PROMPT.sub("", line)).strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("(")]


def spans(text: str) -> list[str]:
    """Code within sentences and tables."""
    return [" ".join(match.strip("`").split()) for match in _CODE.findall(without_blocks(text))]


def links(text: str) -> list[str]:
    """Where a page's links and images lead."""
    return [match[1] for match in re.finditer(r"\[[^\]]*\]\(([^)\s]+)\)", without_blocks(text))]


def anchors(text: str) -> set[str]:
    """The names by which a page's headings are reached."""
    headings = re.findall(r"(?m)^#+\s+(.+)$", without_blocks(text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_blocks(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def without_code(text: str) -> str:
    """The words of a page, tables and headings included; code within a sentence is a single word."""
    return _plain(without_blocks(text))


def sentences(text: str) -> list[str]:
    """The sentences of a page, without code blocks, tables and headings; code within one is a single word."""
    found: list[str] = []
    for paragraph in _paragraphs(without_blocks(text)):
        plain = _ABBREVIATION.sub(r"\1", _plain(paragraph))
        found += [sentence for sentence in _END.split(plain) if _words(sentence)]
    return found


def measure(text: str) -> Measures:
    """How a page reads. A page without a sentence has a median of 0."""
    lengths = [len(_words(sentence)) for sentence in sentences(text)]
    plain = without_code(text)
    return Measures(
        median_words=statistics.median(lengths) if lengths else 0,
        semicolons=1000 * plain.count(";") / max(1, len(_words(plain))),
        long_lines=long_lines(text),
    )


def long_lines(text: str) -> list[str]:
    """Lines above the limit, but for code blocks, tables, images, and single words that cannot be broken."""
    lines = without_blocks(text).splitlines()
    return [line for line in lines if len(line) > MOST_CHARACTERS and not line.startswith(("|", "![")) and " " in line.strip()]


def _paragraphs(text: str) -> list[str]:
    """Paragraphs and items of lists, each as one line; tables, headings and images are left out."""
    found, lines = [], []
    for line in [*text.splitlines(), ""]:
        ends = not line.strip() or line.startswith(("|", "#", "!["))
        if lines and (ends or _ITEM.match(line)):
            found.append(_LEAD.sub("", " ".join(lines)))
            lines = []
        if not ends:
            lines.append(_ITEM.sub("", line, count=1).strip())
    return found


def _plain(text: str) -> str:
    return _LINK.sub(r"\1", _CODE.sub("code", text))


def _words(text: str) -> list[str]:
    return [word for word in text.split() if re.search(r"\w", word)]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
