"""Imports of files and URLs, and refusals with nothing changed."""

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.conftest import LINES, Snapshot, Upstream, Workspace, commit, export, sh_git, write
from workspace.core.errors import (
    CheckoutError,
    PatchConflict,
    PatchDrift,
    SettingsError,
    SourceError,
)
from workspace.repo import patching
from workspace.repo.export import Export
from workspace.repo.git import remotes
from workspace.repo.patches import ImportOptions, State


def take(workspace: Workspace, source: Path | str, **settings: str) -> Export:
    return patching.take(workspace.session(**settings), ImportOptions(str(source)))


def state(workspace: Workspace, snapshot: Snapshot) -> object:
    """Return all that an import may change."""
    tracked = {
        name: entry for name, entry in snapshot(workspace.vllm).items() if "/.git" not in name
    }
    return (
        tracked,
        snapshot(workspace.layout.root / "patches"),
        sh_git(workspace.vllm, "for-each-ref"),
        sh_git(workspace.vllm, "rev-parse", "HEAD"),
    )


@pytest.fixture(scope="session")
def mails(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Path:
    """Return a folder with the mails of two commits, and of one that conflicts."""
    root = tmp_path_factory.mktemp("mails")
    work = root / "work"
    sh_git(root, "clone", "--quiet", str(upstream.work), str(work))
    sh_git(work, "checkout", "--quiet", "-b", "one", "v1.0.0")
    (root / "first.patch").write_bytes(
        export(
            work,
            commit(
                work,
                "[Core] Ä first one\n\nWhy.\n\nSigned-off-by: a <a@b>",
                {"csrc/a.cu": "first\n"},
            ),
        )
    )
    second = commit(
        work,
        "A second one\n\nUpstream-Status: Backport [0123456]",
        {"csrc/größe.cu": b"g\r\nsecond\r\n"},
    )
    (root / "second.patch").write_bytes(export(work, second))
    (root / "both.mbox").write_bytes(
        (root / "first.patch").read_bytes() + b"\n" + (root / "second.patch").read_bytes()
    )
    conflict = commit(
        work, "Twenty again", {"vllm/lines.py": LINES.replace("line 20\n", "line 2O\n")}
    )
    (root / "conflict.patch").write_bytes(export(work, conflict))
    sh_git(work, "switch", "--quiet", "main")
    return root


def test_file_lands_as_commit_and_patch_with_author_and_date(
    either_applied: Workspace, mails: Path
) -> None:
    done = take(either_applied, mails / "first.patch")
    assert done.written == ("Core-first-one.patch",)
    stack = either_applied.stack()
    assert (stack.state, stack.dirty) == (State.APPLIED, ())
    assert (
        sh_git(either_applied.vllm, "log", "-1", "--format=%an %ae %ad", "--date=raw")
        == "Ünal u@example.invalid 1767323045 +0000"
    )
    assert (
        sh_git(either_applied.vllm, "log", "-1", "--format=%B")
        == "[Core] Ä first one\n\nWhy.\n\nSigned-off-by: a <a@b>\nUpstream-Status: Pending"
    )
    assert (either_applied.vllm / "csrc/a.cu").read_text() == "first\n"
    head = stack.head
    either_applied.unapply()
    assert either_applied.apply().head == head, "as every machine makes it of the series"


def test_several_commits_land_in_order_and_a_status_of_their_own_stays(
    applied: Workspace, mails: Path
) -> None:
    assert take(applied, mails / "both.mbox").written == (
        "Core-first-one.patch",
        "A-second-one.patch",
    )
    assert "Backport [0123456]" in sh_git(applied.vllm, "log", "-1", "--format=%B")
    assert (applied.vllm / "csrc/größe.cu").read_bytes() == b"g\r\nsecond\r\n"


def test_commits_that_are_not_exported_yet_are_exported_along(
    applied: Workspace, mails: Path
) -> None:
    commit(applied.vllm, "mine\n\nUpstream-Status: Pending", {"vllm/mine.py": "mine\n"})
    assert take(applied, mails / "first.patch").written == ("mine.patch", "Core-first-one.patch")


def test_conflict_is_refused_with_its_files_and_nothing_changed(
    either_applied: Workspace, mails: Path, snapshot: Snapshot
) -> None:
    before = state(either_applied, snapshot)
    with pytest.raises(
        PatchConflict, match=r"'Twenty again', conflicts \(vllm/lines.py\); nothing was changed"
    ) as failure:
        take(either_applied, mails / "conflict.patch")
    assert state(either_applied, snapshot) == before
    hint = failure.value.hint
    assert hint
    file = mails / "conflict.patch"
    assert hint.split("    ")[0] == f"./scripts/inv patch.import {file} --merge"
    with pytest.raises(PatchConflict, match="'Twenty again'") as stopped:
        patching.take(either_applied.session(), ImportOptions(str(file), stops=True))
    assert "git -C vendor/vllm add vllm/lines.py && ./scripts/inv patch.continue" in (
        stopped.value.hint or ""
    )
    assert either_applied.stack().state is State.IN_PROGRESS
    assert "line 2O" in (either_applied.vllm / "vllm/lines.py").read_text(), (
        "the conflict stands in the file"
    )


def test_import_that_was_interrupted_before_its_export_is_exported(
    applied: Workspace, mails: Path
) -> None:
    before = {path.name: path.read_bytes() for path in applied.layout.patches("vllm").iterdir()}
    take(applied, mails / "both.mbox")
    head = applied.stack().head
    applied.series({name: content for name, content in before.items() if name != "series"})
    assert applied.stack().state is State.UNEXPORTED
    assert take(applied, mails / "both.mbox").written == (
        "Core-first-one.patch",
        "A-second-one.patch",
    )
    assert (applied.stack().state, applied.stack().head) == (State.APPLIED, head)


def test_same_subjects_of_the_users_own_are_not_taken_for_an_import(
    applied: Workspace, mails: Path
) -> None:
    commit(
        applied.vllm, "[Core] Ä first one\n\nUpstream-Status: Pending", {"csrc/a.cu": "of my own\n"}
    )
    head = applied.stack().head
    with pytest.raises(PatchConflict, match="conflicts"):
        take(applied, mails / "first.patch")
    assert applied.stack().head == head


def test_patch_that_changes_nothing_is_upstreamed(
    applied: Workspace, mails: Path, upstream: Upstream, snapshot: Snapshot, tmp_path: Path
) -> None:
    first = next(iter(upstream.patches))
    (tmp_path / "again.patch").write_bytes(upstream.patches[first])
    before = state(applied, snapshot)
    with pytest.raises(PatchDrift, match="upstreamed: ") as failure:
        take(applied, tmp_path / "again.patch")
    assert failure.value.hint
    assert state(applied, snapshot) == before


def test_edits_an_unapplied_series_and_a_missing_checkout_are_in_the_way(
    release: Workspace, mails: Path, snapshot: Snapshot
) -> None:
    with pytest.raises(CheckoutError, match="without 2 patches") as failure:
        take(release, mails / "first.patch")
    assert failure.value.hint == "./scripts/inv patch.apply"
    release.apply()
    write(release.vllm, {"README": "edited\n"})
    before = state(release, snapshot)
    with pytest.raises(
        CheckoutError,
        match=r"has edits \(README\), but commits would be imported there",
    ) as failure:
        take(release, mails / "first.patch")
    assert "stash" in (failure.value.hint or "")
    assert state(release, snapshot) == before


def test_missing_checkout_is_reported(workspace: Workspace, mails: Path) -> None:
    with pytest.raises(CheckoutError, match="does not exist"):
        take(workspace, mails / "first.patch")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"<!DOCTYPE html><html>\n--- x\n</html>", "is neither a mail"),
        (b"", "is neither a mail"),
        (b"\xff\0" * 100, "is neither a mail"),
    ],
)
def test_content_that_is_no_patch_is_refused_with_a_hint(
    applied: Workspace, tmp_path: Path, content: bytes, match: str
) -> None:
    (tmp_path / "x.patch").write_bytes(content)
    with pytest.raises(SettingsError, match=match) as failure:
        take(applied, tmp_path / "x.patch")
    assert failure.value.hint


def test_mail_without_a_diff_and_missing_file_are_refused(
    applied: Workspace, tmp_path: Path
) -> None:
    (tmp_path / "x.patch").write_bytes(b"From: a <a@b>\nSubject: x\n\nonly words\n")
    with pytest.raises(SettingsError, match="has no diff, so there is nothing to import"):
        take(applied, tmp_path / "x.patch")
    with pytest.raises(SettingsError, match="cannot be read"):
        take(applied, tmp_path / "nothing.patch")
    with pytest.raises(SettingsError, match="cannot be read"):
        take(applied, tmp_path)


def test_mail_with_the_line_ends_of_another_system(
    applied: Workspace, mails: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.eml").write_bytes((mails / "first.patch").read_bytes().replace(b"\n", b"\r\n"))
    assert take(applied, tmp_path / "x.eml").written == ("Core-first-one.patch",)


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content = content
        self.seen: list[str | None] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get("Authorization"))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/pull/1.patch")
            self.end_headers()
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * (1 << 20))
            except OSError:
                pass
        elif self.path == "/pull/1.patch":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.content)
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(mails: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[_Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with _Server((mails / "first.patch").read_bytes()) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_address_is_followed_and_named_in_the_status_without_credentials(
    applied: Workspace, server: _Server
) -> None:
    take(applied, f"http://me:hunter2@127.0.0.1:{server.server_port}/moved")
    assert f"Upstream-Status: Submitted [http://127.0.0.1:{server.server_port}/moved]" in sh_git(
        applied.vllm, "log", "-1", "--format=%B"
    )
    assert "hunter2" not in applied.err.getvalue()
    assert not [
        path
        for path in applied.layout.root.rglob("*")
        if path.is_file() and b"hunter2" in path.read_bytes()
    ]


def test_no_credentials_of_the_user_are_sent_and_failures_are_sentences(
    applied: Workspace, server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remotes, "LARGEST_BYTES", 3 << 20)
    place = f"http://127.0.0.1:{server.server_port}"
    for path, match in (
        ("/nothing", "the server answers 404"),
        ("/endless", "is larger than 3 MiB"),
    ):
        with pytest.raises(SourceError, match=match) as failure:
            take(applied, place + path)
        assert failure.value.hint
    assert server.seen == [None, None]
    with pytest.raises(
        SourceError, match=re.escape("http://127.0.0.1:1/x could not be fetched: ")
    ) as failure:
        take(applied, "http://me:hunter2@127.0.0.1:1/x")
    assert "hunter2" not in failure.value.message


@pytest.mark.parametrize(
    ("source", "fetched"),
    [
        (
            "https://github.com/vllm-project/vllm/pull/12",
            "https://github.com/vllm-project/vllm/pull/12",
        ),
        (
            "https://github.com/vllm-project/vllm/pull/12/files?w=1#x",
            "https://github.com/vllm-project/vllm/pull/12",
        ),
        (
            "https://github.com/vllm-project/vllm/pull/12.patch",
            "https://github.com/vllm-project/vllm/pull/12",
        ),
        (
            "https://github.com/o/r/pull/12/commits/0123456789",
            "https://github.com/o/r/commit/0123456789",
        ),
        ("https://github.com/o/r/commit/0123456789", "https://github.com/o/r/commit/0123456789"),
        ("https://example.invalid/pull/12", None),
    ],
)
def test_addresses_of_github_lead_to_the_mail(source: str, fetched: str | None) -> None:
    assert patching.public_of(source) == fetched
