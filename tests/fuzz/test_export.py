"""Commits of any content and message: exported, applied on a fresh checkout and exported again they
are the same bytes, or refused with nothing written.
"""

import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.fuzz.strategies import fuzz
from workspace.core.console import Console, RunLog
from workspace.core.errors import PatchDrift
from workspace.core.paths import Layout
from workspace.repo import checkout, export, patches
from workspace.repo.patches import State
from workspace.repo.pins import Pin

PLAIN = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_COMMITTER_NAME": "c",
    "GIT_COMMITTER_EMAIL": "c@d",
}
HOSTILE = """
[diff]
 noprefix = true
 mnemonicPrefix = true
 external = /bin/false
 renames = copies
 context = 0
 suppressBlankEmpty = true
[format]
 signOff = true
 useAutoBase = true
 attach = true
 headers = "X-Mine: 1"
 numbered = true
[core]
 autocrlf = true
 safecrlf = true
 quotePath = false
 attributesFile = ATTRIBUTES
 hooksPath = /nowhere
[commit]
 gpgSign = true
[color]
 ui = always
[apply]
 whitespace = error
[i18n]
 commitEncoding = ISO-8859-1
[mailinfo]
 scissors = true
"""
TRAILER = "\n\nUpstream-Status: Pending\n"
# Git takes a path as bytes; these are what has broken one program or another.
NAMES = (
    "a.py",
    "dir/b.cu",
    "größe.h",
    "\udcff\udcfe.bin",
    'quote".txt',
    "tab\t.txt",
    "new\nline",
    " blank ",
    "back\\slash",
    "-x",
    "a b/c d",
    "b/b/a/a",
    "x.patch",
)
TEXTS: tuple[bytes, ...] = (
    b"",
    b"one\n",
    b"one\ntwo\nthree\n",
    b"no end",
    b"dos\r\nlines\r\n",
    b"mixed\r\nlines\n\r\r\n",
    b"\0binary\xff" * 9,
    b"latin \xe4\xf6\n",
    b"\xef\xbb\xbfmark\n",
    b"From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\nFrom: x\n",
    b"-- \n2.39\n",
    b"---\ndiff --git a/x b/x\n@@ -1 +1 @@\n",
    b"\n\n\n",
    b"trailing   \n\t\n \n",
    b"\x0c\x0b\x85 \x1a\n",
    "\u2028\u2029\n".encode(),
    b"x" * 5000 + b"\n",
    b"".join(b"%d\n" % number for number in range(60)),
)
SUBJECTS = (
    "Plain",
    "[Bugfix] x",
    "Größer",
    "a  b",
    "x: y",
    "=?UTF-8?q?x?=",
    "[a] [b]c",
    "ends.",
    "y" * 120,
    "quote \" ' `",
    "tab\tin",
    "two\nlines",
    "\x1b[1m",
)
BAD_SUBJECTS = ("Re: x", "[PATCH] x", "", "ß", ".dot", "z" * 300, "[x] re: y")
LINES = (
    "why",
    "",
    "  indented",
    "tail  ",
    "# remark",
    "> quote",
    "--",
    "-----",
    "From here",
    "Größe",
    "Signed-off-by: a <b@c>",
    "\ttab",
    "X: y",
    "a\rb",
    "-- ",
    "\x0c",
)
BAD_LINES = (
    "---",
    "diff --git a/x b/x",
    "--- a/x",
    "Index: x",
    "From: me",
    "Subject: x",
    "From x Mon Sep 17 00:00:00 2001",
    "8< ---- 8<",
    "[PATCH] x",
    "--- ",
    ">From x",
)
AUTHORS = (
    ("Ada", "ada@x"),
    ("J. Doe, Jr.", "j@x"),
    ("Ünal Ö", "u@x.org"),
    ("dep[bot]", "1+d[bot]@x"),
    ("(x) y", "a"),
    ('q "r" s', "q@x"),
    ("A" * 70, "a@x"),
    ("a@b", "c@d"),
    ("A", ""),
)
DATES = ("1700000000 +0000", "@0 +0000", "1700000000 -0330", "2500000000 +1345", "1234567890 -1200")


@dataclass(frozen=True)
class Change:
    """What a commit does to one path. A mode of 0 takes it away."""

    name: str
    mode: int
    content: bytes


@dataclass(frozen=True)
class Wanted:
    changes: tuple[Change, ...]
    message: str
    author: tuple[str, str]
    date: str
    latin: bool


def rarely(draw: st.DrawFn, usual: tuple[str, ...], rare: tuple[str, ...], share: int) -> str:
    return draw(st.sampled_from(rare if draw(st.integers(1, share)) == share else usual))


@st.composite
def commits(draw: st.DrawFn) -> Wanted:
    """Usually one that can be a patch."""
    changes = st.builds(
        Change,
        st.sampled_from(NAMES),
        st.sampled_from((0, 0o644, 0o644, 0o755, 0o777)),
        st.sampled_from(TEXTS),
    )
    subject = rarely(draw, SUBJECTS, BAD_SUBJECTS, 20)
    lines = [rarely(draw, LINES, BAD_LINES, 30) for _ in range(draw(st.integers(0, 4)))]
    message = (
        subject
        + "".join(f"\n{line}" for line in ["", *lines] if lines)
        + (TRAILER if draw(st.integers(0, 30)) else "\n")
    )
    return Wanted(
        tuple(draw(st.lists(changes, min_size=1, max_size=4))),
        message,
        draw(st.sampled_from(AUTHORS)),
        draw(st.sampled_from(DATES)),
        draw(st.booleans()),
    )


def git(path: Path, *args: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        ["git", "-C", str(path), *args],
        env={**os.environ, **PLAIN, **(env or {})},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(errors="surrogateescape").strip()


def put(root: Path, change: Change) -> None:
    """A file, a link (mode 777), or nothing; what is in the way of a folder goes."""
    path = root / change.name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    if not change.mode:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if change.mode == 0o777:
        os.symlink(change.content.replace(b"\0", b"")[:200] or b"x", os.fsencode(path))
    else:
        path.write_bytes(change.content)
        path.chmod(change.mode)


def make(root: Path, wanted: Wanted, parked: Path) -> None:
    for change in wanted.changes:
        put(root, change)
    git(root, "add", "--all", "--force", ".")
    encoding = "ISO-8859-1" if wanted.latin and wanted.message.isascii() is False else "UTF-8"
    parked.write_bytes(wanted.message.encode(encoding))
    env = {
        "GIT_AUTHOR_NAME": wanted.author[0],
        "GIT_AUTHOR_EMAIL": wanted.author[1],
        "GIT_AUTHOR_DATE": wanted.date,
        "GIT_COMMITTER_DATE": "1700000000 +0000",
    }
    tree = git(root, "write-tree")
    commit = git(
        root,
        "-c",
        f"i18n.commitEncoding={encoding}",
        "commit-tree",
        "-p",
        "HEAD",
        "-F",
        str(parked),
        tree,
        env=env,
    )
    git(root, "update-ref", "--no-deref", "HEAD", commit)


@dataclass(frozen=True)
class Pair:
    """Two workspaces on one pin: `mine`, in which is committed, and `fresh`, which gets the patches
    only.
    """

    mine: Layout
    fresh: Layout
    pin: Pin

    def reset(self) -> None:
        for layout in (self.mine, self.fresh):
            git(layout.vllm, "checkout", "--quiet", "--force", "--detach", self.pin.commit)
            git(layout.vllm, "clean", "--quiet", "-ffdx")
            for ref in git(
                layout.vllm, "for-each-ref", "--format=%(refname)", "refs/patches"
            ).split():
                git(layout.vllm, "update-ref", "-d", ref)
            shutil.rmtree(layout.patches("vllm"), ignore_errors=True)
            layout.patches("vllm").mkdir(parents=True)
            (layout.patches("vllm") / "series").write_text(f"# x\n# base: {self.pin.commit}\n")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root = tmp_path_factory.mktemp("pair")
    work = root / "work"
    work.mkdir()
    git(work, "init", "--quiet")
    for name, content in zip(NAMES, TEXTS[1:], strict=False):
        put(work, Change(name, 0o644, content))
    put(work, Change("link", 0o777, b"a.py"))
    git(work, "add", "--all", "--force", ".")
    base = git(
        work,
        "commit-tree",
        "-m",
        "base",
        git(work, "write-tree"),
        env={"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b"},
    )
    git(work, "update-ref", "HEAD", base)
    layouts = [Layout(root / name) for name in ("mine", "fresh")]
    for layout in layouts:
        layout.vllm.parent.mkdir(parents=True)
        git(root, "clone", "--quiet", "--no-local", str(work), str(layout.vllm))
    (root / "attributes").write_text("* text eol=crlf -diff\n")
    (root / "config").write_text(HOSTILE.replace("ATTRIBUTES", str(root / "attributes")))
    with (layouts[0].vllm / ".git" / "config").open("a") as file:
        file.write(HOSTILE.partition("[core]")[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GIT_CONFIG_GLOBAL", str(root / "config"))
        yield Pair(
            layouts[0], layouts[1], Pin("vllm", "v1", "1", base, "https://x.invalid/y", None, {})
        )


def run(layout: Layout, pin: Pin, *, check: bool = False) -> export.Export:
    with RunLog(Console(out=io.StringIO(), err=io.StringIO()), layout.logs, verb="test") as run_log:
        return export.run(
            layout, "vllm", pin, checkout.observe(layout, pin), run_log=run_log, check=check
        )


def files(layout: Layout) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in layout.patches("vllm").iterdir()}


@fuzz(fast=10, deep=3000)
@given(st.lists(commits(), min_size=1, max_size=3))
def test_export_apply_and_export_again_give_the_same_bytes_or_a_reason(
    pair: Pair, tmp_path: Path, wanted: list[Wanted]
) -> None:
    pair.reset()
    for one in wanted:
        make(pair.mine.vllm, one, tmp_path / "message")
    before = files(pair.mine)
    try:
        done = run(pair.mine, pair.pin)
    except PatchDrift as exc:
        assert "cannot be a patch: " in exc.message, exc.message
        assert exc.hint
        assert files(pair.mine) == before
        return
    assume(done.names)
    exported = files(pair.mine)
    for name, content in exported.items():
        (pair.fresh.patches("vllm") / name).write_bytes(content)
    with RunLog(
        Console(out=io.StringIO(), err=io.StringIO()), pair.fresh.logs, verb="test"
    ) as run_log:
        stack = patches.apply(
            pair.fresh, "vllm", pair.pin, checkout.observe(pair.fresh, pair.pin), run_log=run_log
        )
    assert (stack.state, stack.tree) == (
        State.APPLIED,
        git(pair.mine.vllm, "rev-parse", "HEAD^{tree}"),
    )
    assert run(pair.fresh, pair.pin, check=True).names == done.names
    for name in done.names:
        (pair.fresh.patches("vllm") / name).unlink()
    assert run(pair.fresh, pair.pin).written == done.names
    assert files(pair.fresh) == exported
    assert (
        patches.observe(pair.mine, "vllm", pair.pin, checkout.observe(pair.mine, pair.pin)).state
        is State.APPLIED
    )
