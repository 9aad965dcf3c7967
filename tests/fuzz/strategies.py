"""Damage: what may be wrong with a text, a document, a word or a value, from an editor's slip to
malice.
"""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

HUGE = "9" * 4400
# Each has broken a program that reads text: line ends, marks, controls, look-alikes, escapes,
# numbers beyond every type.
_MARKS = (
    "",
    " ",
    "\t",
    "\n",
    "\r",
    "\r\n",
    "\0",
    "\ufeff",
    "\x0b",
    "\x0c",
    "\x1b[31m",
    "\x85",
    "\u2028",
    "\u202e",
    "\u200b",
    "\xa0",
)
_LETTERS = (
    "é",
    "e\u0301",
    "а",
    "Ａ",
    "١",
    "²",
    "#",
    "'",
    '"',
    "\\",
    "\\n",
    "=",
    "==",
    "%s",
    "{0}",
    "[/red]",
    "export ",
    ";",
    ",",
)
_EXPANDED = ("${", "${HOME}", "${HF_TOKEN}", "${MAX_JOBS:-7}", "$(id)", "`id`")
_NUMBERS = (
    "-",
    "--",
    "-1",
    "0",
    "00",
    "1",
    "1.5",
    "1e400",
    "nan",
    "inf",
    "0x10",
    "1_000",
    "+3",
    "2147483",
    "99999999",
    HUGE,
)
_PATHS = (
    "/",
    "//",
    "..",
    "../..",
    "/dev/null",
    "/dev/zero",
    "~",
    "~nobody-of-this-name/x",
    "a" * 300,
    "/" + "a" * 4200,
    ".",
    ".patch",
    "x.lock",
)
_FORMS = (
    "1" * 39,
    "1" * 40,
    "1" * 41,
    "A" * 40,
    "g" * 40,
    "0" * 64,
    f"# base: {'1' * 40}",
    "true",
    "None",
    "[]",
    "{}",
    "[vllm]",
    "[[vllm]]",
)
_ADDRESSES = ("https://me:hunter2@host/x", "file:///", "ftp://x")
TOKENS = (*_MARKS, *_LETTERS, *_EXPANDED, *_NUMBERS, *_PATHS, *_FORMS, *_ADDRESSES)
tokens = st.sampled_from(TOKENS)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
args = tokens | texts
# As the shell hands them over: any bytes but zero.
arguments = (
    args
    | st.binary(max_size=12).map(lambda raw: raw.decode(errors="surrogateescape"))
    | st.just("\udcff\udcfe")
).map(lambda text: text.replace("\0", ""))


def is_deep() -> bool:
    return settings.get_current_profile_name() == "deep"


def fuzz(*, fast: int, deep: int) -> Callable[..., Any]:
    """How many examples: by default few and the same ones each time, in the deep profile many and
    others each time.
    """
    return settings(
        max_examples=deep if is_deep() else fast,
        derandomize=not is_deep(),
        database=None,
        deadline=None,
        # A fixture is made once for all examples here; each example puts back what it changed.
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
        ],
    )


@st.composite
def damaged(draw: st.DrawFn, original: str) -> bytes:
    """The text of a file after some slips of an editor; seldom bytes that are no text at all."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=60))
    lines = original.splitlines(keepends=True)
    for _ in range(draw(st.integers(1, 4))):
        lines = draw(_slip(lines))
    raw = "".join(lines).encode(errors="surrogateescape")
    if draw(st.integers(0, 9)) == 0:
        raw = raw[: draw(st.integers(0, len(raw)))]
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(st.binary(min_size=1, max_size=3)) + raw[at:]
    return raw


@st.composite
def _slip(draw: st.DrawFn, lines: list[str]) -> list[str]:
    """One line gone, twice, elsewhere, cut, or with something foreign in it, before it or in the
    place of a part of it.
    """
    if not lines:
        return [draw(args)]
    at = draw(st.integers(0, len(lines) - 1))
    line, lines = lines[at], list(lines)
    manner = draw(
        st.sampled_from(
            ("gone", "twice", "swapped", "cut", "inserted", "before", "value", "value", "word")
        )
    )
    if manner == "gone":
        del lines[at]
    elif manner == "twice":
        lines.insert(draw(st.integers(0, len(lines))), line)
    elif manner == "swapped":
        other = draw(st.integers(0, len(lines) - 1))
        lines[at], lines[other] = lines[other], line
    elif manner == "cut":
        lines[at] = line[: draw(st.integers(0, len(line)))]
    elif manner == "inserted":
        place = draw(st.integers(0, len(line)))
        lines[at] = line[:place] + draw(args) + line[place:]
    elif manner == "before":
        lines.insert(at, draw(args) + "\n")
    elif manner == "value":
        head, equals, _ = line.partition("=")
        lines[at] = f"{head}{equals}{draw(args | tokens.map(json.dumps))}\n"
    else:
        parts = line.split(" ")
        parts[draw(st.integers(0, len(parts) - 1))] = draw(args)
        lines[at] = " ".join(parts)
    return lines


NUMBERS = (0, 1, -1, 2**63, 10**400, 1.5, float("nan"), float("inf"), True, False)
values = st.recursive(
    st.none()
    | st.sampled_from(NUMBERS)
    | args
    | st.sampled_from(("\ud800", "a\0b", "../../etc/passwd", "/etc/passwd")),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(args, inner, max_size=2),
    max_leaves=4,
)
# Beyond what Python's recursion takes.
DEEP = ("[" * 3000, '{"a":' * 1500, "[" * 1500 + "]" * 1500)


@st.composite
def damaged_document(draw: st.DrawFn, original: object) -> bytes:
    """A JSON document in which one or two parts are gone or of another type; seldom damaged as a
    text, or nested beyond all reason.
    """
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(DEEP)).encode()
    text = json.dumps(original, indent=1)
    if draw(st.integers(0, 4)) == 0:
        return draw(damaged(text))
    document = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(document))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        manner = draw(st.sampled_from(("gone", "other", "other")))
        if manner == "gone":
            del holder[key]
        else:
            holder[key] = draw(values)
    return json.dumps(document, indent=1).encode()


def _places(document: Any) -> Any:
    items = (
        list(document.items())
        if isinstance(document, dict)
        else list(enumerate(document))
        if isinstance(document, list)
        else []
    )
    for key, part in items:
        yield document, key
        yield from _places(part)
