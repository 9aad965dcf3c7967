"""Another release, tag or commit of an upstream project: found, fetched into a store, and proven.

The store borrows the objects of the checkout, so it holds both commits. Nothing in vendor/,
patches/ or the superproject changes.
"""

import contextlib
import datetime
import re
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from workspace.core import files, hints, lock
from workspace.core.console import RunLog, Step
from workspace.core.errors import CheckoutError, SettingsError, SourceError
from workspace.core.paths import Layout
from workspace.core.settings import Settings, without_user
from workspace.repo import checkout, git, index, pins
from workspace.repo.checkout import Checkout, Kind
from workspace.repo.git import Git, Remote, history, remotes
from workspace.repo.pins import COMMIT, Archive, Pin

_REF = re.compile(r"(?!.*(?:\.\.|//|@\{))[A-Za-z0-9][A-Za-z0-9._/+-]{0,98}")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*(?:[a-z.][a-z0-9.]*)?)")
# setuptools-scm's line in the archive's vllm/_version.py; `g` is the prefix of `git describe`.
_COMMIT_ID = re.compile(rb"commit_id = '?g([0-9a-f]{7,40})\b")
# Files that a forecast reads of both trees, besides those of the patches.
_LOOKED_AT = re.compile(
    r"requirements/.*\.txt|pyproject\.toml|CMakeLists\.txt|cmake/.*\.cmake|vllm/envs\.py"
    r"|vllm/engine/arg_utils\.py|vllm/entrypoints/.*cli_args\.py"
    r"|vllm/sampling_params\.py|vllm/entrypoints/openai/(chat_)?completion/protocol\.py"
    r"|vllm/config/\w+\.py"
)


@dataclass(frozen=True)
class Candidate:
    """A commit that a pin may move to, and the store that holds it.

    `base` is the commit for the patches, of the kind of the present checkout. `prefix` are the
    first digits of upstream's commit if only the archive names it: `pin.commit` is then the
    archive's own. `not_precompiled` is the reason for each key of pins.PRECOMPILED_KEYS without a
    precompiled wheel, `lacking` are sentences on what could not be proven.
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
    """A tag, branch or commit of the remote."""

    commit: str
    refspec: str
    is_tag: bool


def is_looked_at(path: str) -> bool:
    """Return whether a forecast reads this file of both trees."""
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
    """Find and fetch a tag, a version, or for a git checkout a branch or commit.

    All that a forecast reads is fetched. Raises SettingsError for an invalid name, SourceError for
    a name that does not exist, with the nearest, or that cannot be fetched or proven, and
    CheckoutError where there is no checkout to compare with.
    """
    if there.base is None or not there.kind.is_pinned:
        place = layout.relative(checkout.folder_of(layout, pin))
        raise CheckoutError(
            f"{place} is {there.detail}, so {ref} cannot be compared with it",
            hint=hints.text("inv.bootstrap"),
        )
    if not _REF.fullmatch(ref):
        raise SettingsError(
            f"{ref!r} is not the name of a tag, branch or commit",
            hint=hints.text("repo.forecast_example"),
        )
    name = f"v{ref}" if pin.tag.startswith("v") and re.fullmatch(r"\d+(\.\d+)+\w*", ref) else ref
    search = _Search(layout, pin, name, settings, there.base, run_log, step)
    with lock.hold(search.lock, verb="inv pin", wait=True, on_wait=run_log.console.info):
        return search.by_git() if there.kind is Kind.GIT else search.by_archive()


@dataclass(frozen=True)
class _Search:
    """One search, and the objects that its steps share; `base` is that of the present checkout."""

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
    def _remote(self) -> Remote:
        return checkout.remote(self.layout, self.pin, self.settings, self.run_log, self.step)

    @property
    def version(self) -> str | None:
        """The version that the name spells, None for a branch or commit."""
        found = _VERSION.fullmatch(self.name)
        return found[1] if found and not COMMIT.fullmatch(self.name) else None

    def by_archive(self) -> Candidate:
        """Take the release archive, and prove its commit by the remote's tag if possible."""
        if self.version is None or not index.has_any_release(self.pin):
            raise SettingsError(
                f"{self.name} is not a release of {self.pin.name}; the checkout is from a release"
                " archive, and branches and commits need a git checkout",
                hint=hints.text("repo.newer_releases"),
            )
        release = index.find_release(self.pin, self.version, settings=self.settings)
        if release.sdist is None:
            raise SourceError(
                f"the package index has no archive of {self.pin.name} {self.version}",
                hint=hints.text("inv.pin_show"),
            )
        into = self._store()
        made, prefix = self._archive(into, release.sdist)
        into.set_ref(f"refs/tags/{self.name}", made.commit)
        lacking = list(release.lacking)
        commit = self._proven_commit(prefix, lacking) or made.commit
        pin = replace(
            self.pin,
            tag=self.name,
            version=self.version,
            commit=commit,
            archive=made,
            precompiled=release.precompiled,
        )
        return Candidate(
            pin,
            made.commit,
            Kind.RELEASE,
            release.published,
            into.path,
            prefix if commit == made.commit else None,
            release.not_precompiled,
            tuple(lacking),
        )

    def _proven_commit(self, prefix: str | None, lacking: list[str]) -> str | None:
        """Return the commit of the remote's tag; add a sentence to `lacking` if it has none."""
        try:
            named = self._query()
        except SourceError as exc:
            lacking.append(
                f"{exc.message}; upstream's commit is not proven"
                + (f", only that it begins with {prefix}" if prefix else "")
            )
            return None
        if named is None or not named.is_tag:
            lacking.append(
                f"{without_user(self.url)} has no tag {self.name}; upstream's commit is not proven"
            )
            return None
        self._require_same(named.commit, prefix)
        return named.commit

    def by_git(self) -> Candidate:
        """Fetch the name from the remote, and its archive and wheels from the index."""
        into = self._store()
        lacking: list[str] = []
        named = self._named(into, lacking)
        if named.commit not in into.present((named.commit,)):
            into.set_setting("remote.origin.url", self.url)
            into.fetch(self._remote, (named.refspec,), whole=False)
        if named.commit not in into.present((named.commit,)):
            raise SourceError(
                f"{without_user(self.url)} did not serve {self.name}, commit {named.commit}",
                hint=hints.text("repo.network_or_copy"),
            )
        made, release = self._release_of(into, named, lacking)
        if named.is_tag:
            into.set_ref(f"refs/tags/{self.name}", named.commit)
        # After the archive, which has the content of nearly every file.
        self._complete(into, named)
        pin = replace(
            self.pin,
            tag=self.name,
            version=self._version_of(into, named),
            commit=named.commit,
            archive=made,
            precompiled=dict(release.precompiled) if release else {},
        )
        reasons = dict.fromkeys(self.pin.precompiled, f"{self.name} is not a release")
        if named.is_tag:
            reasons = dict(release.not_precompiled) if release else {}
        return Candidate(
            pin,
            named.commit,
            Kind.GIT,
            (release.published if release else None) or history.date_of(into, named.commit),
            into.path,
            None,
            reasons,
            tuple(lacking),
        )

    def _release_of(
        self, into: Git, named: _Named, lacking: list[str]
    ) -> tuple[Archive | None, index.Release | None]:
        """Return the archive and the release of a tag, as far as the index can be reached."""
        made: Archive | None = None
        if not (named.is_tag and self.version and index.has_any_release(self.pin)):
            return None, None
        try:
            release = index.find_release(self.pin, self.version, settings=self.settings)
            if release.sdist:
                made, prefix = self._archive(into, release.sdist)
                self._require_same(named.commit, prefix)
        except _Unequal:
            raise
        except SourceError as exc:
            lacking.append(
                f"{exc.message}; release archive and precompiled wheels are unknown, and the age is"
                " that of the commit"
            )
            return made, None
        lacking += release.lacking
        return made, release

    def _store(self) -> Git:
        into = remotes.open_store(
            self.layout.upstream(self.pin.name), checkout.folder_of(self.layout, self.pin)
        )
        into.set_ref(f"refs/tags/{self.pin.tag}", self.base)
        return into

    def _named(self, into: Git, lacking: list[str]) -> _Named:
        """Return the tag, branch or commit of the name.

        Where the remote cannot be reached, a tag of the checkout or the store is used.
        """
        if COMMIT.fullmatch(self.name):
            return _Named(self.name, self.name, False)
        here = Git(checkout.folder_of(self.layout, self.pin))
        try:
            found = self._query()
        except SourceError as exc:
            kept = here.resolve(f"refs/tags/{self.name}") or into.resolve(f"refs/tags/{self.name}")
            if kept is None:
                raise
            lacking.append(f"{exc.message}: using {self.name} of the checkout")
            return _Named(kept, kept, True)
        if (
            found is None
            and re.fullmatch(r"[0-9a-f]{7,39}", self.name)
            and (commit := into.resolve(self.name))
        ):
            return _Named(commit, commit, False)
        if found is None:
            raise self._unknown_name()
        return found

    def _query(self) -> _Named | None:
        """Return the remote's tag or branch of this name, or None.

        Raises SourceError where the remote cannot be reached.
        """
        tag, branch = f"refs/tags/{self.name}", f"refs/heads/{self.name}"
        references = git.advertised(
            self.url,
            (tag, f"{tag}^{{}}", branch),
            cwd=self.layout.root,
            settings=self.settings,
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

    def _unknown_name(self) -> SourceError:
        """Return the error for a name that the remote lacks, with the nearest tags."""
        known = git.advertised(
            self.url, ("refs/tags/*",), cwd=self.layout.root, settings=self.settings
        )
        tags = {name.removeprefix("refs/tags/") for name in known if not name.endswith("^{}")}
        near = [
            f"v{version}"
            for version in index.nearest(
                self.version or "", [tag[1:] for tag in tags if tag.startswith("v")]
            )
        ]
        return SourceError(
            f"{without_user(self.url)} has no tag or branch {self.name}; nearest tags:"
            f" {', '.join(near) or 'none'}",
            hint=(
                hints.text("repo.whole_commit")
                if re.fullmatch(r"[0-9a-f]{7,39}", self.name)
                else hints.text("repo.newer_releases")
            ),
        )

    def _require_same(self, commit: str, prefix: str | None) -> None:
        """Raise _Unequal where tag and archive name different commits."""
        if prefix and not commit.startswith(prefix):
            raise _Unequal(
                f"tag {self.name} at {without_user(self.url)} is commit {commit}, but the release"
                f" archive was made from {prefix}…; neither is used",
                hint=hints.text("repo.moved_tag"),
            )

    def _archive(self, into: Git, sdist: index.Sdist) -> tuple[Archive, str | None]:
        """Return the archive as one commit in the store, and the prefix of upstream's commit.

        The commit is made unless the store has it. The prefix is None where the archive names no
        commit.
        """
        ref, key = f"refs/archives/{sdist.sha256}", f"archive.{sdist.sha256}.upstream"
        commit = into.resolve(ref)
        if commit is None:
            unit = f"bytes of {sdist.filename}"
            file = index.fetch(
                self.pin.name,
                sdist.filename,
                sdist.sha256,
                settings=self.settings,
                on_progress=lambda done, total: self.step.progress(done, total, unit),
            )
            with files.folder_beside(into.path) as folder:
                of = replace(self.pin, tag=self.name, version=self.version or self.name)
                commit, _ = pins.build_archive(file, folder / "tree", of, step=self.step)
                self.step.progress(0, None, f"keeping the commit of {sdist.filename}")
                into.set_setting(key, _commit_id(file, self.pin) or "unknown")
                into.fetch_from(folder / "tree", f"+HEAD:{ref}")
        prefix = into.setting(key)
        return Archive(sdist.filename, sdist.sha256, commit, into.tree(commit)), (
            prefix if prefix != "unknown" else None
        )

    def _version_of(self, into: Git, named: _Named) -> str:
        """Return the version of a tag, or the one that setuptools-scm derives from known tags."""
        if named.is_tag and self.version:
            return self.version
        if self.pin.version == self.pin.tag:
            return self.name

        found = history.described(into, named.commit)
        if found is None:
            return f"{self.pin.version}.post0.dev0"
        *head, last = found[0].removeprefix("v").split(".")
        return ".".join([*head, str(int(re.sub(r"\D.*", "", last) or 0) + 1), f"dev{found[1]}"])

    def _complete(self, into: Git, named: _Named) -> None:
        """Fetch what a partial clone lacks of the files that a forecast compares."""
        here = Git(checkout.folder_of(self.layout, self.pin))
        if not (into.is_partial or here.is_partial):
            return
        ends = (self.base, named.commit)
        remotes.complete_store(into, ends, self._remote, named.refspec)


class _Unequal(SourceError):
    """Two sources contradict each other: neither may be used alone."""


def _commit_id(file: Path, pin: Pin) -> str | None:
    """Return the first digits of the commit that an archive names as its source, or None.

    They are in vllm/_version.py, which is no part of the checkout.
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
                found = _COMMIT_ID.search(content.read(1 << 16))
                return found[1].decode() if found else None
    return None
