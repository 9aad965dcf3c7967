"""What README and docs/ say of a GB10 names a record of ours or a public source."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPARK = ROOT / "docs" / "spark.md"
# A GB10 by a name of its own, or a figure of a Spark.
CLAIM = re.compile(
    r"\bGB10\b|\bsm_121|(?<![\d.=])12\.1[af]?(?![\d.])"
    r"|\bSparks?\b[^|]*?\b\d[\d.,]*[  ]?(?:GB|GiB|W|MHz|tok/s|cores|minutes|hours|s)\b"
)
CODE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
# An address; a thread, such as vllm-project/vllm#29472; one of upstream's files; a record of ours.
PRIMARY = (
    r"https?://\S+|\b[\w.-]+/[\w.-]+#\d+|^Source: \S+|\bvllm/[\w/]+\.py\b"
    r"|\]\((?:docs/)?evidence/[\w-]+\.md"
)
SOURCE = re.compile(rf"{PRIMARY}|\]\((?:docs/)?spark\.md", re.MULTILINE)
OF_SECTION = re.compile(r"^Sources?: .+", re.MULTILINE)
GENERATED = "<!-- Generated from"


@dataclass(frozen=True)
class Part:
    """A paragraph, a row of a table, a point of a list or a heading, with its whole section."""

    text: str
    section: str

    def has_source(self, source: re.Pattern[str]) -> bool:
        said = self.section if self.text.startswith("#") else self.text
        named = "\n".join(OF_SECTION.findall(self.section))
        return bool(source.search(said) or source.search(named))


def parts(page: str) -> Iterator[Part]:
    """Yield the parts of a page, blocks of code left out. A generated page has its sources at the
    beginning, above its sections.
    """
    head, *sections = re.split(r"^(?=#{1,6} )", CODE.sub("", page), flags=re.MULTILINE)
    general = "\n".join(OF_SECTION.findall(sections[0])) if GENERATED in page else ""
    for section in (head, *sections):
        for block in re.split(r"\n\s*\n|\n(?=\||[-*] |\d+\. )|(?<=\|)\n", section):
            first, _, rest = block.partition("\n")
            for text in (first, rest) if first.startswith("#") else (block,):
                if text.strip():
                    yield Part(text, f"{section}\n{general}")


def without_source(page: Path) -> list[str]:
    source = re.compile(PRIMARY, re.MULTILINE) if page == SPARK else SOURCE
    return [
        f"{page.relative_to(ROOT)}: {part.text.strip()[:90]}"
        for part in parts(page.read_text(encoding="utf-8"))
        if CLAIM.search(part.text) and not part.has_source(source)
    ]


def test_every_line_that_says_gb10_names_a_record_or_a_source() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert [line for page in pages for line in without_source(page)] == []


def test_every_row_of_the_page_on_the_spark_names_its_source() -> None:
    rows = [part.text for part in parts(SPARK.read_text(encoding="utf-8")) if part.text[0] == "|"]
    facts = [row for row in rows if not re.match(r"\| (?:fact|what) \||\|---", row)]
    assert len(facts) > 30
    assert [row for row in facts if not re.search(PRIMARY, row, re.MULTILINE)] == []


PARAGRAPH = "A GB10 is fast.\n\nSee [the record](evidence/gpu.md).\n"


@pytest.mark.parametrize(
    ("page", "count"),
    [
        (PARAGRAPH, 1),
        (PARAGRAPH.replace("\n\n", "\n"), 0),
        (f"# T\n\n{PARAGRAPH}\nSources: [the record](evidence/gpu.md)\n", 0),
        ("# T\n\nSources: mine\n\n## A GB10\n\nIt is fast.\n", 1),
        ("| a | b |\n|---|---|\n| sm_121 | fast |\n| 12.1 | x/y#3 |\n", 1),
        ("- 12.1a\n- see https://example.org\n", 1),
        ("A Spark has\n240 W.\n\nA Spark works. 12.10 and 3.12.1 are others.\n", 1),
        ("```sh\nexport A=12.1a\n```\n", 0),
        (f"# T\n\n{GENERATED} x -->\n\nSources: [a](spark.md)\n\n## N\n\n| GB10 | it |\n", 0),
    ],
)
def test_a_line_without_a_source_is_found(page: str, count: int) -> None:
    found = [p for p in parts(page) if CLAIM.search(p.text) and not p.has_source(SOURCE)]
    assert len(found) == count
