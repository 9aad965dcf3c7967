"""Pull requests of a real forge: a git remote with refs/pull, and a server of mails and diffs."""

import base64
import contextlib
import functools
import http.server
import quopri
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.repo import two_releases
from tests.repo.conftest import LINES, Snapshot, Upstream, Workspace, commit, sh_git, write
from tests.repo.test_importing import state
from workspace.bump import forecast
from workspace.core.console import Console
from workspace.core.errors import PatchConflict, PatchDrift, SettingsError, SourceError
from workspace.repo import export, patching
from workspace.repo.export import Export
from workspace.repo.patches import ImportOptions, State
from workspace.repo.pins import Wanted

ANN, BOB, EVE = ("Ann Ö <ann@a.example>", "Bob (QA) <bob@b.example>", "Doe, Eve <eve@c.example>")
LONG = "[Bugfix] Größenänderung " + "über mehrere Wörter, 日本語, " * 9
# Of github.com, for the tests alone: nothing trusts it.
CERTIFICATE = Path(__file__).with_name("github.pem")
BINARY = bytes(range(256)) * 3
FILE = "csrc/a.cu"


def made(work: Path, author: str, message: str, files: Mapping[str, str | bytes]) -> None:
    """Commit as an author; without files, conclude a merge or make an empty commit."""
    write(work, files)
    sh_git(work, "add", "--all", "--force")
    flags = ("--quiet", "--allow-empty", f"--author={author}", f"--message={message}")
    sh_git(work, "commit", *flags)


def merge_main(work: Path, files: Mapping[str, str]) -> None:
    """Merge main; `files` is what the merge changes besides."""
    sh_git(work, "merge", "--quiet", "--no-ff", "--no-commit", "main")
    made(work, ANN, "Merge branch 'main' into mine", files)


@pytest.fixture(scope="session")
def forge(tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Path:
    """Return a repository with requests as refs/pull/N/head, and a folder www beside it."""
    root = tmp_path_factory.mktemp("forge")
    work = root / "work"
    sh_git(root, "clone", "--quiet", str(upstream.work), str(work))

    def begin(at: str = "v1.0.0") -> None:
        sh_git(work, "checkout", "--quiet", "--detach", at)

    def end(number: int) -> None:
        sh_git(work, "update-ref", f"refs/pull/{number}/head", "HEAD")
        for name, text in (
            ("patch", sh_git(work, "format-patch", "--stdout", "main..HEAD")),
            ("diff", sh_git(work, "diff", "main...HEAD")),
        ):
            write(root, {f"www/{number}.{name}": f"{text}\n" if text else ""})

    sh_git(work, "switch", "--quiet", "main")
    commit(work, "[CI] A test that the release lacks", {"tests/later.py": "later\n"})
    begin()
    made(work, ANN, f"[Misc] Say\n\nWhy.\n\nSigned-off-by: {ANN}", {FILE: "one\n"})
    made(work, BOB, f"address comments\n\nCo-authored-by: {ANN}", {FILE: "two\n"})
    made(work, EVE, "address comments\n\nAnd more.", {FILE: "three\n"})
    end(1)
    begin()
    made(work, ANN, "[Core] A feature", {"vllm/feature.py": "1\n"})
    merge_main(work, {"vllm/feature.py": "1\nresolved\n"})
    made(work, BOB, "Follow the resolution", {"vllm/feature.py": "1\nresolved!\n"})
    end(2)
    begin("main")
    end(3)
    begin()
    made(work, ANN, LONG, {"vllm/data.bin": BINARY, "csrc/dos2.h": b"a\r\nb\r\n"})
    sh_git(work, "mv", "README", "NEWS")
    made(work, ANN, "Move a file", {})
    end(4)
    begin("main")
    files = {"tests/later.py": "changed\n", "tests/new.py": "new\n", FILE: "tested\n"}
    made(work, ANN, "[Core] With tests", files)
    made(work, ANN, "Tests only", {"tests/new.py": "newer\n"})
    end(5)
    begin()
    made(work, ANN, "Twenty", {"vllm/lines.py": LINES.replace("line 20\n", "line 2O\n")})
    made(work, BOB, "Other", {FILE: "other\n"})
    end(6)
    for number, besides in ((7, "line 35"), (8, "")):
        begin()
        text = LINES.replace("line 5\n", "five\n")
        made(work, ANN, "Five", {"vllm/lines.py": text})
        text = text.replace(f"{besides}\n", f"{besides}, merged\n") if besides else text
        merge_main(work, {"vllm/lines.py": text})
        made(work, ANN, "Ten", {"vllm/lines.py": text.replace("line 10\n", "ten\n")})
        end(number)
    begin()
    made(work, ANN, "There", {FILE: "there\n"})
    made(work, ANN, "and back", {FILE: "a\n"})
    end(9)
    begin()
    made(work, ANN, "Merged", {"vllm/merged.py": "1\n"})
    end(10)
    sh_git(work, "switch", "--quiet", "main")
    sh_git(work, "merge", "--quiet", "--no-ff", "--message=Merge 10", "refs/pull/10/head")
    write(root, {"www/login.html": "<!DOCTYPE html>\n<html>Sign in</html>\n"})
    return work


def take(
    workspace: Workspace, forge: Path, source: int | str, stops: bool = False, **options: object
) -> Export:
    """Import a request of the forge, which stands in for the remote of the pin."""
    chosen = ImportOptions(str(source), stops, **options)  # type: ignore[arg-type]
    return patching.take(workspace.session(VLLM_MIRROR=str(forge)), chosen)


def log(workspace: Workspace, form: str, count: int = 1) -> list[str]:
    return sh_git(workspace.vllm, "log", f"-{count}", "--reverse", f"--format={form}").split("\n")


@pytest.fixture
def www(forge: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the mails and diffs of the requests, and a page instead of request 404."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.startswith("/404"):
                self.send_response(302)
                self.send_header("Location", "/login.html")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None:
            pass

    serve = functools.partial(Handler, directory=str(forge.parent / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def github(forge: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve the mails and diffs at the addresses of GitHub, behind a proxy; yield what is asked."""
    asked: list[str] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)

    class Proxy(http.server.SimpleHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            assert self.path == "github.com:443"
            self.send_response(200)
            self.end_headers()
            with context.wrap_socket(self.connection, server_side=True) as secure:
                self.rfile = secure.makefile("rb")
                self.wfile = secure.makefile("wb", buffering=0)
                self.handle_one_request()
                self.rfile.close()

        def do_GET(self) -> None:
            asked.append(self.path)
            self.path = self.path.removeprefix("/o/r/pull")
            super().do_GET()
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    for name in ("NO_PROXY", "no_proxy", "https_proxy", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    serve = functools.partial(Proxy, directory=str(forge.parent / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        server.daemon_threads = True
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield asked
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("github")
def test_mails_of_github_are_taken_where_git_cannot_reach_the_remote(
    applied: Workspace, forge: Path
) -> None:
    applied.pin = replace(applied.pin, url="https://github.com/o/r.git")
    gone = forge.parent / "gone"
    assert len(take(applied, gone, "https://github.com/o/r/pull/1/files").written) == 3
    assert "the mails of https://github.com/o/r/pull/1 are taken" in applied.err.getvalue()
    assert "Submitted [https://github.com/o/r/pull/1]" in "\n".join(log(applied, "%B"))
    take(applied, gone, 2, squash=True)
    assert (applied.vllm / "vllm/feature.py").read_text() == "1\nresolved!\n"
    with pytest.raises(SourceError, match=r"pull/77.patch: the server answers 404.*; with git: "):
        take(applied, gone, 77)


def test_commits_of_three_authors_are_taken_one_by_one(
    either_applied: Workspace, forge: Path
) -> None:
    names = ("Misc-Say.patch", "address-comments.patch", "address-comments-2.patch")
    assert take(either_applied, forge, 1).written == names
    assert log(either_applied, "%an <%ae>", 3) == [ANN, BOB, EVE]
    head = either_applied.stack().head
    either_applied.unapply()
    assert either_applied.apply().head == head


def test_squash_is_one_patch_with_all_authors_once(applied: Workspace, forge: Path) -> None:
    done = take(applied, forge, 1, squash=True, subject="[Core] Größer")
    assert len(done.written) == 1
    assert log(applied, "%an <%ae>") == [ANN]
    assert "\n".join(log(applied, "%B")) == (
        "[Core] Größer\n\n* [Misc] Say\n\nWhy.\n\n* address comments\n\n* address comments\n\n"
        f"And more.\n\nSigned-off-by: {ANN}\nCo-authored-by: {BOB}\nCo-authored-by: {EVE}\n"
        "Upstream-Status: Pending"
    )
    assert (applied.vllm / FILE).read_text() == "three\n"
    with pytest.raises(PatchDrift, match="upstreamed: '.Misc. Say' changes nothing"):
        take(applied, forge, 1, squash=True)


def test_squash_of_a_file_takes_the_change_of_its_commits(applied: Workspace, forge: Path) -> None:
    done = take(applied, forge, str(forge.parent / "www" / "1.patch"), squash=True)
    assert (done.written, (applied.vllm / FILE).read_text()) == (("Misc-Say.patch",), "three\n")


@pytest.mark.parametrize("number", [2, 7])
def test_merge_of_main_that_changes_something_gives_the_net_change(
    either_applied: Workspace, forge: Path, number: int
) -> None:
    done = take(either_applied, forge, number)
    assert len(done.written) == 1
    assert "merges main, so its net change is taken" in either_applied.err.getvalue()
    wanted = {2: ("vllm/feature.py", "1\nresolved!\n"), 7: ("vllm/lines.py", "line 35, merged\n")}
    path, text = wanted[number]
    assert text in (either_applied.vllm / path).read_text()
    assert not (either_applied.vllm / "tests").exists(), "main's own change is not taken"
    assert either_applied.stack().state is State.APPLIED


def test_merge_of_main_that_only_merges_leaves_the_commits(applied: Workspace, forge: Path) -> None:
    assert take(applied, forge, "#8").written == ("Five.patch", "Ten.patch")


def test_binary_rename_line_ends_and_a_long_subject_arrive_whole(
    applied: Workspace, forge: Path
) -> None:
    names = take(applied, forge, 4).written
    assert all(len(name) <= 200 for name in names)
    assert log(applied, "%s", 2)[0] == LONG.strip()
    assert (applied.vllm / "vllm/data.bin").read_bytes() == BINARY
    assert (applied.vllm / "csrc/dos2.h").read_bytes() == b"a\r\nb\r\n"
    assert (applied.vllm / "NEWS").read_text() == "two\n"
    assert not (applied.vllm / "README").exists()


def test_test_that_the_release_lacks_is_left_out_and_named(applied: Workspace, forge: Path) -> None:
    assert len(take(applied, forge, 5).written) == 2
    assert "tests/later.py is left out: vendor/vllm has no such file" in applied.err.getvalue()
    assert (applied.vllm / "tests/new.py").read_text() == "newer\n"
    assert (applied.vllm / FILE).read_text() == "tested\n"


@pytest.mark.parametrize("squash", [False, True])
def test_all_tests_are_left_out_on_request(applied: Workspace, forge: Path, squash: bool) -> None:
    done = take(applied, forge, 5, without_tests=True, squash=squash)
    assert done.written == ("Core-With-tests.patch",)
    assert "tests/new.py is left out: on request" in applied.err.getvalue()
    assert not (applied.vllm / "tests").exists()
    assert (applied.vllm / FILE).read_text() == "tested\n"


@pytest.mark.parametrize("encode", [base64.encodebytes, quopri.encodestring])
def test_encoded_mail_is_read_as_any_other(
    applied: Workspace, forge: Path, tmp_path: Path, encode: Callable[[bytes], bytes]
) -> None:
    mails = (forge.parent / "www" / "5.patch").read_bytes().split(b"\nFrom ")
    head, _, body = mails[0].partition(b"\n\n")
    name = b"base64" if encode is base64.encodebytes else b"quoted-printable"
    head += b"\nContent-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: " + name
    write(tmp_path, {"encoded.patch": head + b"\n\n" + encode(body)})
    done = take(applied, forge, str(tmp_path / "encoded.patch"), without_tests=True)
    assert done.written == ("Core-With-tests.patch",)
    assert not (applied.vllm / "tests").exists()
    assert (applied.vllm / FILE).read_text() == "tested\n"


@pytest.mark.parametrize("squash", [False, True])
def test_conflict_has_the_squash_in_its_hint_and_both_ways_lead_on(
    applied: Workspace, forge: Path, snapshot: Snapshot, squash: bool
) -> None:
    take(applied, forge, 1, squash=True)
    with pytest.raises(PatchConflict, match=r"patch 1 of 2, 'Twenty'") as failure:
        take(applied, forge, 6)
    hint = failure.value.hint or ""
    assert hint.startswith("./scripts/inv patch.import 6 --squash --merge   ")
    assert "or ./scripts/inv patch.import 6 --merge, then ./scripts/inv patch.continue" in hint
    before = state(applied, snapshot)
    with pytest.raises(PatchConflict, match="nothing was changed"):
        take(applied, forge, 6, squash=True)
    assert state(applied, snapshot) == before
    with pytest.raises(PatchConflict):
        take(applied, forge, 6, squash=squash, stops=True)
    stopped = 0
    while applied.stack().state is State.IN_PROGRESS:
        stopped += 1
        write(applied.vllm, {"vllm/lines.py": "both\n", FILE: f"both, {stopped}\n"})
        sh_git(applied.vllm, "add", "--update")
        with contextlib.suppress(PatchConflict):
            applied.resume("continue")
    done = export.run(
        applied.layout,
        "vllm",
        applied.pin,
        applied.observe(),
        run_log=applied.run_log,
    )
    assert (done.written[0], len(done.written)) == ("Twenty.patch", 1 if squash else 2)
    names = [ANN, BOB] if not squash else [f"Co-authored-by: {BOB}"]
    form = "%b" if squash else "%an <%ae>"
    assert set(names) <= set(log(applied, form, len(done.written)))


def test_squash_is_offered_where_only_the_net_change_applies(
    applied: Workspace, www: str, forge: Path
) -> None:
    with pytest.raises(PatchConflict, match="patch 2 of 2, 'Follow the resolution'") as failure:
        take(applied, forge, f"{www}/2.patch")
    command = f"./scripts/inv patch.import {www}/2.patch --squash"
    assert (failure.value.hint or "").startswith(f"{command}    ")
    assert take(applied, forge, f"{www}/2.patch", squash=True).written == ("Core-A-feature.patch",)
    assert (applied.vllm / "vllm/feature.py").read_text() == "1\nresolved!\n"
    assert f"Submitted [{www}/2.patch]" in "\n".join(log(applied, "%B"))


def test_diff_of_a_request_takes_its_subject(applied: Workspace, www: str, forge: Path) -> None:
    identity = (("user.name", "Me"), ("user.email", "me@example.org"))
    for key, value in identity:
        sh_git(applied.vllm, "config", key, value)
    done = take(applied, forge, f"{www}/2.diff", subject="[Core] Mine: ä")
    assert (done.written, log(applied, "%s")) == (("Core-Mine.patch",), ["[Core] Mine: ä"])
    take(applied, forge, f"{www}/1.diff")
    assert "another subject: --subject" in applied.err.getvalue()


def test_subject_for_several_patches_is_refused_with_the_squash(
    applied: Workspace, forge: Path
) -> None:
    with pytest.raises(SettingsError, match="--subject is for one patch, and pull-1 has 3") as no:
        take(applied, forge, 1, subject="One")
    hint = no.value.hint or ""
    assert hint.startswith("./scripts/inv patch.import 1 --squash --subject One   ")
    assert take(applied, forge, 1, squash=True, subject="One").written == ("One.patch",)


def test_request_without_commits_is_refused(
    applied: Workspace, www: str, forge: Path, snapshot: Snapshot
) -> None:
    with pytest.raises(PatchDrift, match="are in main already, or it is empty") as failure:
        take(applied, forge, 3)
    assert failure.value.hint
    before = state(applied, snapshot)
    with pytest.raises(SettingsError, match="it is empty"):
        take(applied, forge, f"{www}/3.patch")
    with pytest.raises(PatchDrift, match="its commits change nothing together"):
        take(applied, forge, 9, squash=True)
    assert state(applied, snapshot)[:2] == before[:2]  # type: ignore[index]


def test_request_that_main_has_is_refused_at_once(
    applied: Workspace, forge: Path, github: list[str]
) -> None:
    """No page is asked: without a network that would take half a minute."""
    applied.pin = replace(applied.pin, url="https://github.com/o/r.git")
    with pytest.raises(PatchDrift, match="request 10 are in main already") as failure:
        take(applied, forge, 10)
    assert github == []
    hint = failure.value.hint or ""
    argv = hint.partition("    ")[0].split()
    for key, value in (("user.name", "Me"), ("user.email", "me@example.org")):
        sh_git(applied.vllm, "config", key, value)
    assert argv[:2] == ["./scripts/inv", "patch.import"]
    assert take(applied, forge, argv[2], subject=argv[4]).written == ("SUBJECT.patch",)
    assert (applied.vllm / "vllm/merged.py").read_text() == "1\n"


def test_page_of_a_login_is_named(applied: Workspace, www: str, forge: Path) -> None:
    with pytest.raises(SettingsError, match="it is a web page") as failure:
        take(applied, forge, f"{www}/404.patch")
    assert failure.value.hint


def test_number_that_does_not_exist_and_a_remote_that_is_gone(
    applied: Workspace, forge: Path
) -> None:
    with pytest.raises(SourceError, match=r"has no refs/pull/77/head") as failure:
        take(applied, forge, 77)
    assert failure.value.hint
    with pytest.raises(SourceError, match="cannot be fetched: .* cannot be read"):
        take(applied, forge.parent / "gone", 1)


def test_file_of_another_project_is_named_so(
    applied: Workspace, forge: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    sh_git(other, "init", "--quiet", "--initial-branch=main")
    commit(other, "first", {"src/main.c": "int main() { return 1; }\n"})
    commit(other, "second", {"src/main.c": "int main() { return 2; }\n"})
    mails = sh_git(other, "format-patch", "--stdout", "-1")
    write(tmp_path, {"other.patch": f"{mails}\n"})
    with pytest.raises(PatchConflict, match="has none of its files: it may be of another project"):
        take(applied, forge, str(tmp_path / "other.patch"))
    sh_git(other, "update-ref", "refs/pull/1/head", "HEAD")
    sh_git(other, "reset", "--quiet", "--hard", "HEAD~1")
    with pytest.raises(PatchConflict, match="pull-1: .* may be of another project"):
        take(applied, other, 1)
    sh_git(other, "checkout", "--quiet", "--orphan", "alone")
    commit(other, "alone", {"src/main.c": "\n"})
    sh_git(other, "update-ref", "refs/pull/2/head", "HEAD")
    sh_git(other, "checkout", "--quiet", "main")
    with pytest.raises(SourceError, match="no history in common"):
        take(applied, other, 2)


def test_partial_checkout_fetches_what_a_request_needs(
    workspace: Workspace, forge: Path, hostile: Path
) -> None:
    bare = forge.parent / "bare.git"
    if not bare.exists():
        sh_git(forge.parent, "clone", "--quiet", "--mirror", str(forge), str(bare))
        for key in ("uploadpack.allowFilter", "uploadpack.allowAnySHA1InWant"):
            sh_git(bare, "config", key, "true")
    mirror = f"file://{bare}"
    workspace.ensure("git", VLLM_MIRROR=mirror)
    workspace.apply()
    promisor = ("git", "-C", str(workspace.vllm), "config", "remote.origin.promisor")
    assert subprocess.run(promisor, capture_output=True, check=False).stdout == b"true\n"
    done = patching.take(workspace.session(VLLM_MIRROR=mirror), ImportOptions("7"))
    assert len(done.written) == 1
    assert "line 35, merged\n" in (workspace.vllm / "vllm/lines.py").read_text()


@pytest.mark.parametrize(
    ("home", "squash", "fates"),
    [
        ("https://github.com/o/r.git", True, ["upstreamed"]),
        ("https://github.com/o/r.git", False, ["upstreamed", "upstreamed"]),
        # Nothing shows that these patches are one request.
        ("file:///nowhere/vllm.git", False, ["conflicts", "upstreamed"]),
    ],
)
def test_forecast_knows_a_request_that_upstream_took_by_its_net_change(
    tmp_path: Path, hostile: Path, home: str, squash: bool, fates: list[str]
) -> None:
    """Also between a patch of the user and a request of which upstream has nothing."""
    releases = two_releases.build(tmp_path)
    sh_git(releases.work, "checkout", "--quiet", "--detach", "v1.0.0")
    for author, text in ((ANN, "almost"), (BOB, "ten")):
        made(releases.work, author, text, {"vllm/taken.py": two_releases.lines("taken", l10=text)})
    sh_git(releases.work, "push", "--quiet", str(releases.bare), "HEAD:refs/pull/2/head")
    sh_git(releases.work, "checkout", "--quiet", "--detach", "v1.0.0")
    made(releases.work, ANN, "new", {"vllm/feature.py": "1\n"})
    conflicting = {"vllm/conflict.py": two_releases.lines("conflict", l20="twenty")}
    made(releases.work, ANN, "otherwise", conflicting)
    sh_git(releases.work, "push", "--quiet", str(releases.bare), "HEAD:refs/pull/3/head")
    with (
        two_releases.serve(releases) as index,
        two_releases.cloned(tmp_path / "clone", releases, index) as clone,
    ):
        clone.pin = replace(clone.pin, url=home)
        clone.series({"Local-clean.patch": releases.series["Local-clean.patch"]})
        clone.ensure("git")
        clone.apply()
        done = patching.take(clone.session(), ImportOptions("2", squash=squash))
        assert len(done.written) == len(fates)
        patching.take(clone.session(), ImportOptions("3"))
        console = Console(out=clone.out, err=clone.err)
        judged = forecast.run(
            clone.layout, clone.settings(), Wanted.read("v1.1.0"), console=console
        )
        states = [patch.state for patch in judged.patches]
        assert states == ["clean", *fates, "clean", "conflicts"]
