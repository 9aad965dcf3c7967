"""Another release, tag or commit of an upstream project than the pinned one: found, fetched into a
store aside, and proven.

The store borrows the checkout's objects, so both bases are in one place and nothing in vendor/,
patches/ or the superproject is touched.
"""

import contextlib
import datetime
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from workspace.core import files, lock
from workspace.core.console import Step
from workspace.core.errors import CheckoutError, SettingsError, SourceError
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import checkout, git, index, pins, series
from workspace.repo.checkout import Checkout, Kind
from workspace.repo.git import Git, history, remotes, worktree
from workspace.repo.pins import COMMIT, Archive, Pin

_REF = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9][A-Za-z0-9._/+-]{0,98}")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*(?:[a-z.][a-z0-9.]*)?)")
# setuptools-scm's line in the archive's vllm/_version.py, the g is that of `git describe`.
_COMMIT_ID = re.compile(rb"commit_id = '?g([0-9a-f]{7,40})\b")
# What a forecast reads of both trees, patches aside.
_LOOKED_AT = re.compile(
    r"requirements/.*\.txt|pyproject\.toml|CMakeLists\.txt|cmake/.*\.cmake|vllm/envs\.py|vllm/engine/arg_utils\.py|vllm/entrypoints/.*cli_args\.py"
)


@dataclass(frozen=True)
class Candidate:
    """What a pin may be moved to, and where it can be looked at.

    `base` is the commit that patches would go on, of the kind of the present checkout. `prefix` are
    the first digits of upstream's commit where only the archive names it: `pin.commit` is then the
    archive's own. `undonated` says by key of pins.PRECOMPILED_KEYS why there is no precompiled
    wheel, `lacking` are sentences on what could not be found out.
    """

    pin: Pin
    base: str
    kind: Kind
    published: datetime.datetime | None
    store: Path
    prefix: str | None = None
    not_precompiled: Mapping[str, str] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Named:
    """What a remote calls by a name: a tag, a branch, or a commit itself."""

    commit: str
    refspec: str
    is_tag: bool


def is_looked_at(path: str) -> bool:
    """Whether a forecast reads this file of both trees."""
    return _LOOKED_AT.fullmatch(path) is not None


def find(
    layout: Layout,
    pin: Pin,
    ref: str,
    settings: Settings,
    there: Checkout,
    *,
    run_log: RunLog,
    step: Step,
) -> Candidate:
    """Find a tag, a version, or where the checkout is from git a branch or commit, and have all of
    it that a forecast reads.

    Raises SettingsError for a name that is none, SourceError for one that exists nowhere, with the
    nearest, or cannot be fetched or proven, and CheckoutError where there is no checkout to compare
    with.
    """
    if there.base is None or there.kind not in (Kind.GIT, Kind.RELEASE):
        place = layout.relative(checkout.folder_of(layout, pin))
        raise CheckoutError(
            f"{place} is {there.detail}, so there is nothing that {ref} could be compared with",
            hint="./scripts/inv bootstrap",
        )
    if not _REF.fullmatch(ref):
        raise SettingsError(
            f"{ref!r} is not the name of a tag, branch or commit",
            hint="./scripts/inv pin.forecast v0.33.0   # for example",
        )
    name = f"v{ref}" if pin.tag.startswith("v") and re.fullmatch(r"\d+(\.\d+)+\w*", ref) else ref
    search = _Search(layout, pin, name, settings, there.base, run_log, step)
    with lock.hold(search.lock, verb="inv pin", wait=True, on_wait=run_log.console.info):
        return search.by_git() if there.kind is Kind.GIT else search.by_archive()


@dataclass(frozen=True)
class _Search:
    """One search, and what its steps share. `base` is the present one."""

    layout: Layout
    pin: Pin
    name: str
    settings: Settings
    base: str
    run_log: RunLog
    step: Step

    @property
    def lock(self) -> Path:
        return self.layout.upstream(self.pin.name).with_suffix(".lock")

    @property
    def url(self) -> str:
        return checkout.url_of(self.layout, self.pin, self.settings)

    @property
    def _remote(self) -> remotes.Remote:
        return remotes.Remote(
            self.url, self.settings, self.run_log, on_line=checkout.shown(self.step)
        )

    @property
    def version(self) -> str | None:
        """The version that the name spells, None where it is a branch or commit."""
        found = _VERSION.fullmatch(self.name)
        return found[1] if found and not COMMIT.fullmatch(self.name) else None

    def by_archive(self) -> Candidate:
        if self.version is None or not index.has_any_release(self.pin):
            raise SettingsError(
                f"{self.name} is no release of {self.pin.name}; the checkout is from a release"
                " archive, and branches and commits can be had from git only",
                hint="./scripts/inv pin.show   # lists the newer releases",
            )
        release = index.find_release(self.pin, self.version, settings=self.settings)
        if release.sdist is None:
            raise SourceError(
                f"the package index has no archive of {self.pin.name} {self.version}",
                hint="./scripts/inv pin.show",
            )
        into = self._store()
        made, prefix = self._archive(into, release.sdist)
        into.set_ref(f"refs/tags/{self.name}", made.commit)
        lacking = list(release.lacking)
        commit = made.commit
        try:
            named = self._ask()
        except SourceError as exc:
            named = None
            lacking.append(
                f"{exc.message}: upstream's commit is not proven"
                + (f", only that it begins with {prefix}" if prefix else "")
            )
        else:
            if named is None or not named.is_tag:
                lacking.append(
                    f"{git.without_user(self.url)} has no tag {self.name}: upstream's commit is not"
                    " proven"
                )
        if named and named.is_tag:
            self._hold_against(named.commit, prefix)
            commit = named.commit
        pin = replace(
            self.pin,
            tag=self.name,
            version=self.version,
            commit=commit,
            archive=made,
            precompiled=release.precompiled,
        )
        unproven = prefix if commit == made.commit else None
        return Candidate(
            pin,
            made.commit,
            Kind.RELEASE,
            release.published,
            into.path,
            unproven,
            release.not_precompiled,
            tuple(lacking),
        )

    def by_git(self) -> Candidate:
        into = self._store()
        lacking: list[str] = []
        named = self._named(into, lacking)
        if named.commit not in into.present((named.commit,)):
            remotes.fetch_into_store(into, self._remote, (named.refspec,))
        if named.commit not in into.present((named.commit,)):
            raise SourceError(
                f"{git.without_user(self.url)} did not serve {self.name}, commit {named.commit}",
                hint="set VLLM_MIRROR to a copy that has it",
            )
        made, published, precompiled = None, None, {}
        not_precompiled = (
            {}
            if named.is_tag
            else dict.fromkeys(self.pin.precompiled, f"{self.name} is no release")
        )
        if named.is_tag and self.version and index.has_any_release(self.pin):
            try:
                release = index.find_release(self.pin, self.version, settings=self.settings)
                if release.sdist:
                    made, prefix = self._archive(into, release.sdist)
                    self._hold_against(named.commit, prefix)
                precompiled, not_precompiled, published = (
                    dict(release.precompiled),
                    dict(release.not_precompiled),
                    release.published,
                )
                lacking += release.lacking
            except _Unequal:
                raise
            except SourceError as exc:
                lacking.append(
                    f"{exc.message}: release archive and precompiled wheels are not known, and the"
                    " age is that of the commit"
                )
        if named.is_tag:
            into.set_ref(f"refs/tags/{self.name}", named.commit)
        # After the archive, which has the content of nearly every file.
        self._complete(into, named)
        version = self._version_of(into, named)
        pin = replace(
            self.pin,
            tag=self.name,
            version=version,
            commit=named.commit,
            archive=made,
            precompiled=precompiled,
        )
        return Candidate(
            pin,
            named.commit,
            Kind.GIT,
            published or history.date_of(into, named.commit),
            into.path,
            None,
            not_precompiled,
            tuple(lacking),
        )

    def _store(self) -> Git:
        into = remotes.open_store(
            self.layout.upstream(self.pin.name), checkout.folder_of(self.layout, self.pin)
        )
        into.set_ref(f"refs/tags/{self.pin.tag}", self.base)
        return into

    def _named(self, into: Git, lacking: list[str]) -> _Named:
        """What the name stands for: at the remote, or in what is there already where it cannot be
        reached.
        """
        if COMMIT.fullmatch(self.name):
            return _Named(self.name, self.name, False)
        here = Git(checkout.folder_of(self.layout, self.pin))
        try:
            found = self._ask()
        except SourceError as exc:
            kept = here.resolve(f"refs/tags/{self.name}") or into.resolve(f"refs/tags/{self.name}")
            if kept is None:
                raise
            lacking.append(f"{exc.message}: {self.name} is taken from the checkout")
            return _Named(kept, kept, True)
        if (
            found is None
            and re.fullmatch(r"[0-9a-f]{7,39}", self.name)
            and (commit := into.resolve(self.name))
        ):
            return _Named(commit, commit, False)
        if found is None:
            raise self._nowhere()
        return found

    def _ask(self) -> _Named | None:
        """Ask the remote what it calls by this name; None where it knows none. Raises SourceError
        where it cannot be reached.
        """
        tag, branch = f"refs/tags/{self.name}", f"refs/heads/{self.name}"
        references = git.advertised(
            self.url,
            (tag, f"{tag}^{{}}", branch),
            cwd=self.layout.root,
            settings=self.settings,
            timeout_s=float(self.settings.count("CONNECT_TIMEOUT_S") or 5),
        )
        if tag in references:
            return _Named(
                references.get(f"{tag}^{{}}", references[tag]),
                f"+{tag}:refs/found/{self.name}",
                True,
            )
        if branch in references:
            return _Named(references[branch], f"+{branch}:refs/found/{self.name}", False)
        return None

    def _nowhere(self) -> SourceError:
        timeout_s = float(self.settings.count("CONNECT_TIMEOUT_S") or 5)
        known = git.advertised(
            self.url,
            ("refs/tags/*",),
            cwd=self.layout.root,
            settings=self.settings,
            timeout_s=timeout_s,
        )
        tags = {name.removeprefix("refs/tags/") for name in known if not name.endswith("^{}")}
        near = [
            f"v{version}"
            for version in index.nearest(
                self.version or "", [tag[1:] for tag in tags if tag.startswith("v")]
            )
        ]
        return SourceError(
            f"{git.without_user(self.url)} has no tag or branch {self.name}; the nearest tags are"
            f" {', '.join(near) or 'none'}",
            hint=(
                "a commit needs all of its 40 digits"
                if re.fullmatch(r"[0-9a-f]{7,39}", self.name)
                else "./scripts/inv pin.show   # lists the newer releases"
            ),
        )

    def _hold_against(self, commit: str, prefix: str | None) -> None:
        if prefix and not commit.startswith(prefix):
            raise _Unequal(
                f"tag {self.name} at {git.without_user(self.url)} is commit {commit}, the release"
                f" archive was made from {prefix}…; neither was taken",
                hint=(
                    "a tag that moved is not to be trusted: compare with the project's release page"
                ),
            )

    def _archive(self, into: Git, sdist: index.Sdist) -> tuple[Archive, str | None]:
        """The archive's one commit, made in the store where that has not been done yet, and what it
        says of upstream's commit.
        """
        ref, key = f"refs/archives/{sdist.sha256}", f"archive.{sdist.sha256}.upstream"
        commit = into.resolve(ref)
        if commit is None:
            what = f"bytes of {sdist.filename}"
            file = index.fetch(
                self.pin.name,
                sdist.filename,
                sdist.sha256,
                settings=self.settings,
                on_progress=lambda done, total: self.step.progress(done, total, what),
            )
            with files.folder_beside(into.path) as folder:
                of = replace(self.pin, tag=self.name, version=self.version or self.name)
                commit, _ = pins.build_archive(
                    file,
                    folder / "tree",
                    of,
                    on_progress=lambda done, total: self.step.progress(
                        done, total, f"unpacking {sdist.filename}"
                    ),
                )
                into.set_setting(key, _commit_id(file, self.pin) or "unknown")
                remotes.take_in(into, folder / "tree", ref)
        prefix = into.setting(key)
        return Archive(sdist.filename, sdist.sha256, commit, into.tree(commit)), (
            prefix if prefix != "unknown" else None
        )

    def _version_of(self, into: Git, named: _Named) -> str:
        if named.is_tag and self.version:
            return self.version
        if self.pin.version == self.pin.tag:
            return self.name
        # As setuptools-scm would call it, from the tags that are known here.
        found = history.described(into, named.commit)
        if found is None:
            return f"{self.pin.version}.post0.dev0"
        *head, last = found[0].removeprefix("v").split(".")
        return ".".join([*head, str(int(re.sub(r"\D.*", "", last) or 0) + 1), f"dev{found[1]}"])

    def _complete(self, into: Git, named: _Named) -> None:
        """Fetch, in one go, what a partial clone lacks of the files that a forecast reads."""
        here = Git(checkout.folder_of(self.layout, self.pin))
        if "true" not in (
            into.setting("remote.origin.promisor"),
            here.setting("remote.origin.promisor"),
        ):
            return
        wanted = history.absent(into, self._read(into, named.commit))
        if wanted:
            remotes.complete_store(into, wanted, self._remote, (named.refspec,))

    def _read(self, into: Git, commit: str) -> Sequence[str]:
        patches = _patches(self.layout, self.pin)
        touched = worktree.paths_of(into, patches)
        every = frozenset().union(*touched)
        differing = history.changed(into, self.base, commit)
        # A merge holds every file that is gone against every one that is new: either may be a
        # touched one under another name.
        read = {
            path
            for path, pair in differing.items()
            if is_looked_at(path) or path in every or None in pair
        }
        pairs = [differing[path] for path in read]
        for commit_ in history.candidates_of(
            history.log(into, self.base, commit, sorted(every)), touched
        ):
            pairs += commit_.paths.values()
        return [oid for pair in pairs for oid in pair if oid]


class _Unequal(SourceError):
    """Two sources that contradict each other: no reason to go on with one of them."""


def _patches(layout: Layout, pin: Pin) -> list[Path]:
    folder = layout.patches(pin.name)
    return [folder / name for name in series.read_series(folder, pin=pin.commit).names]


def _commit_id(file: Path, pin: Pin) -> str | None:
    """The first digits of the commit that an archive says it was made from; vllm/_version.py is no
    part of the checkout.
    """
    with (
        contextlib.suppress(tarfile.TarError, OSError, EOFError, zlib.error),
        tarfile.open(file, mode="r:gz") as packed,
    ):
        for member in packed:
            if (
                member.isfile()
                and member.name.split("/")[1:] == [pin.name, "_version.py"]
                and (content := packed.extractfile(member))
            ):
                found = _COMMIT_ID.search(content.read())
                return found[1].decode() if found else None
    return None
