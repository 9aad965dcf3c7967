"""Situations of archives, remotes and addresses, and of what is imported from them."""

import re
import shutil
import subprocess
import sys
import tarfile

from tests.proof.hints.following import User, runs
from tests.proof.hints.stack_situations import git_name
from tests.small import releases
from tests.small.index import Fault
from tests.small.materials import git
from tests.small.releases import CLEAN
from tests.small.wheels import sha256

NEW = (
    "diff --git a/vllm/note.py b/vllm/note.py\nnew file mode 100644\n--- /dev/null\n"
    "+++ b/vllm/note.py\n@@ -0,0 +1,2 @@\n+x = 1\n+y = 2\n"
)


def mail_of(diff: str = NEW, *, date: str = "Mon, 1 Jun 2026 10:00:00 +0000") -> str:
    return f"From: Eve <eve@example.com>\nDate: {date}\nSubject: A note\n\nwhy\n---\n\n{diff}"


def mail(user: User, text: str) -> str:
    path = user.root / "it.patch"
    path.write_text(text)
    return str(path)


def anew(user: User) -> None:
    """Let bootstrap make the checkout again."""
    shutil.rmtree(user.vllm)
    user.vllm.mkdir()


@runs("repo.check_diff", "repo.github_patch", "repo.import_url", "repo.address_or_file")
def content_that_cannot_be_imported(user: User) -> None:
    git_name(user)
    # It shows git's own words for the fault, and leaves nothing under way.
    command = user.meets(
        "repo.check_diff", "patch.import", mail(user, mail_of(NEW.replace(",2 @", ",9 @")))
    )
    shown = user.type(command)
    assert (shown.code, "corrupt patch at line" in shown.err) == (128, True), shown.output
    user.followed.add("repo.check_diff")
    assert user.world.status()["patches"] == "ok"
    folder = user.root / "www"
    folder.mkdir()
    (folder / "1.patch").write_text(mail_of())
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "--directory", folder, "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={"PYTHONUNBUFFERED": "1"},
    ) as server:  # fmt: skip
        try:
            assert server.stdout
            found = re.search(r"port (\d+)", server.stdout.readline())
            assert found
            url = f"http://127.0.0.1:{found[1]}/1"
            user.follow(
                "repo.github_patch", "patch.import", mail(user, "no diff\n"),
                put={"URL": url}, then=False,
            )  # fmt: skip
            off(user)
            user.follow(
                "repo.import_url", "patch.import", "7", put={"URL": f"{url}.patch"}, then=False
            )
            off(user)
            user.follow(
                "repo.address_or_file", "patch.import", f"{url}.no",
                put={"FILE": mail(user, mail_of())}, then=False,
            )  # fmt: skip
        finally:
            server.kill()
    assert (user.vllm / "vllm" / "note.py").exists()


def off(user: User) -> None:
    """Take the note out of the series."""
    assert (user.vllm / "vllm" / "note.py").exists()
    done = user.type("git -C vendor/vllm reset --quiet --hard HEAD~1 && ./scripts/inv patch.export")
    assert done.code == 0, done.output


@runs("repo.other_patches")
def mails_of_which_the_stack_has_one(user: User) -> None:
    git_name(user)
    base = user.world.git("rev-parse", "HEAD")
    one = user.commit("[Core] One", vllm__one_py="one = 1\n")
    two = user.commit("[Core] Two", vllm__two_py="two = 1\n")
    both = user.world.git("format-patch", "--stdout", f"{base}..{two}") + "\n"
    user.world.git("reset", "--quiet", "--hard", one)
    assert user.inv("patch.export").code == 0
    command = user.meets("repo.other_patches", "patch.import", mail(user, both))
    done = user.type(command)
    assert done.code == 0, done.output
    assert (user.vllm / "vllm" / "two.py").exists()
    user.followed.add("repo.other_patches")


@runs("repo.source_git")
def pins_of_what_is_not_there(user: User) -> None:
    pins = user.world.layout.pins
    text = pins.read_text()
    anew(user)
    pins.write_text(re.sub(r"\[vllm\.archive\][^\[]*", "", text))
    user.follow("repo.source_git", "bootstrap", "--source", "release", then=False)
    assert user.world.status()["source"] == "ok"


@runs("repo.index_that_has_it", "core.wrong_hash", "core.network_resumes", "repo.network_or_index")
def archive_that_the_index_does_not_give(user: User) -> None:
    anew(user)
    shutil.rmtree(user.world.folder / "cache")
    (user.world.folder / "cache").mkdir()
    archive = user.world.materials.archive.name
    verb = ("bootstrap", "--source", "release")
    user.world.index.faults[archive] = Fault(cut_after=100)
    shown = user.type(user.meets("core.network_resumes", *verb))
    assert "index" in shown.out, shown.output
    user.followed.add("core.network_resumes")
    del user.world.index.faults[archive]
    user.world.index.faults["vllm"] = Fault(status=503)
    shown = user.type(user.meets("repo.network_or_index", *verb))
    assert "index" in shown.out, shown.output
    user.followed.add("repo.network_or_index")
    user.world.index.faults.clear()
    user.world.index.hide(archive)
    command = user.meets("repo.index_that_has_it", *verb)
    user.world.index.files = dict(user.world.materials.index.files)
    url = user.world.index.url
    wrong = user.root / archive
    wrong.write_bytes(b"wrong")
    right = user.world.index.files[archive]
    user.world.index.files[archive] = wrong
    user.world.index.faults[archive] = Fault(says_sha256=sha256(right))
    user.look("core.wrong_hash", *verb, shows=url)
    user.world.index.files[archive] = right
    user.world.index.faults.clear()
    done = user.type(f"{command.replace('URL', url)} && ./scripts/inv bootstrap --source release")
    assert done.code == 0, done.output
    user.followed.add("repo.index_that_has_it")


@runs("repo.whole_commit")
def commit_that_is_cut(user: User) -> None:
    made = releases.make(user.world.materials)
    user.world.env["VLLM_MIRROR"] = made.upstream.as_uri()
    anew(user)
    assert user.inv("bootstrap", "--source", "git").code == 0
    whole = made.commit(CLEAN)
    verb = ("pin.forecast", whole[:12])
    user.follow("repo.whole_commit", *verb, put={"COMMIT": whole}, then=False)


@runs("repo.source_release")
def mirror_without_the_pinned_release(user: User) -> None:
    mirror = user.root / ".workspace" / "mirror.git"
    git(user.root, "clone", "--quiet", "--bare", str(user.world.materials.upstream), str(mirror))
    other = git(mirror, "commit-tree", "-m", "Other", "HEAD^{tree}")
    git(mirror, "update-ref", "HEAD", other)
    for name in git(mirror, "for-each-ref", "--format=%(refname)").split():
        if git(mirror, "rev-parse", name) != other:
            git(mirror, "update-ref", "-d", name)
    git(mirror, "reflog", "expire", "--expire=now", "--all")
    git(mirror, "gc", "--quiet", "--prune=now")
    user.world.env["VLLM_MIRROR"] = mirror.as_uri()
    anew(user)
    shutil.rmtree(user.root / ".git" / "modules", ignore_errors=True)
    user.follow("repo.source_release", "bootstrap", "--source", "git", then=False)
    assert user.world.status()["source"] == "ok"


@runs("repo.heads")
def upstream_without_a_branch_main(user: User) -> None:
    git_name(user)
    mirror = user.root / ".workspace" / "mirror.git"
    git(user.root, "clone", "--quiet", "--bare", str(user.world.materials.upstream), str(mirror))
    git(mirror, "branch", "-m", "main", "trunk")
    user.world.env["VLLM_MIRROR"] = mirror.as_uri()
    name = next(user.world.layout.patches("vllm").glob("*.patch")).name
    user.look("repo.heads", "patch.export", "--branch", "a", "--patch", name, shows="trunk")


@runs("repo.network_or_copy")
def remote_that_fails_in_a_verb(user: User) -> None:
    user.world.env["VLLM_MIRROR"] = (user.world.folder / "nowhere").as_uri()
    name = next(user.world.layout.patches("vllm").glob("*.patch")).name
    git_name(user)
    shown = user.type(
        user.meets("repo.network_or_copy", "patch.export", "--branch", "a", "--patch", name)
    )
    assert "vllm mirror" in shown.out, shown.output
    user.followed.add("repo.network_or_copy")


@runs("repo.delete_file_again")
def archive_that_is_damaged(user: User) -> None:
    anew(user)
    archive = user.world.materials.archive
    damaged = user.root / archive.name
    damaged.write_bytes(archive.read_bytes()[:-2000])
    pins = user.world.layout.pins
    text = pins.read_text()
    pins.write_text(text.replace(sha256(archive), sha256(damaged)))
    user.world.index.add(damaged)
    verb = ("bootstrap", "--source", "release")
    command = user.meets("repo.delete_file_again", *verb)
    pins.write_text(text)
    user.world.index.add(archive)
    assert user.type(command).code == 0
    assert user.inv(*verb).code == 0
    user.followed.add("repo.delete_file_again")


@runs("repo.archive_layout")
def archive_with_a_link_that_leads_out(user: User) -> None:
    anew(user)
    archive = user.world.materials.archive
    wrong = user.root / archive.name
    with tarfile.open(wrong, "w:gz") as made:
        for name in ("one/a", "two/b"):
            made.addfile(tarfile.TarInfo(name))
    pins = user.world.layout.pins
    pins.write_text(pins.read_text().replace(sha256(archive), sha256(wrong)))
    user.world.index.add(wrong)
    user.look("repo.archive_layout", "bootstrap", "--source", "release", shows=archive.name)
