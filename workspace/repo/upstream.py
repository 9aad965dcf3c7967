"""Another release, tag or commit of an upstream project: found, fetched into a store, and proven.

The store borrows the objects of the checkout, so it holds both commits. Nothing in vendor/,
patches/ or the superproject changes.
"""

import datetime
import re
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
from workspace.repo.pins import COMMIT, Archive, Base, Pin, Wanted

_FINAL = re.compile(r"v\d+(\.\d+)+(\.post\d+)?")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*(?:[a-z.][a-z0-9.]*)?)")


@dataclass(frozen=True)
class Candidate:
    """A commit that a pin may move to, and the store that holds it.

    `base` is the commit for the patches, of the kind of the present checkout. `prefix` are the
    first digits of upstream's commit if only the archive names it: `pin.commit` is then the
    archive's own. `not_precompiled` is the reason for each key of pins.PRECOMPILED_KEYS without a
    precompiled wheel, `lacking` are sentences on what could not be proven. `argv` are the arguments
    of `inv pin.bump` to it.
    """

    pin: Pin
    base: str
    kind: Kind
    published: datetime.datetime | None
    store: Path
    prefix: str | None = None
    not_precompiled: Mapping[str, str] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Named:
    """A tag, branch or commit of the remote; `ref` is its whole name."""

    commit: str
    ref: str
    refspec: str

    @property
    def is_tag(self) -> bool:
        return self.ref.startswith("refs/tags/")


def find(
    layout: Layout,
    pin: Pin,
    wanted: Wanted,
    settings: Settings,
    there: Checkout,
    *,
    run_log: RunLog,
    step: Step,
) -> Candidate:
    """Find and fetch a release, branch or commit of upstream's, or any name at a fork's URL.

    All that a forecast reads is fetched. Raises SourceError for a name that does not exist, with
    the nearest, or that cannot be fetched or proven, and CheckoutError where there is no checkout
    to compare with.
    """
    ref, pin = wanted.name, pin.of_upstream
    if there.base is None or not there.kind.is_pinned:
        place = layout.relative(checkout.folder_of(layout, pin))
        raise CheckoutError(
            f"{place} is {there.detail}, so {ref} cannot be compared with it",
            hint=hints.text("inv.bootstrap"),
        )
    is_number = re.fullmatch(r"\d+(\.\d+)+\w*", ref) and not wanted.url
    name = f"v{ref}" if is_number and index.has_any_release(pin) else ref
    if wanted.url and wanted.url != pin.url:
        pin = replace(pin, url=wanted.url, upstream=pin.url)
    search = _Search(layout, pin, replace(wanted, name=name), settings, there, run_log, step)
    if wanted.base and search.version and not wanted.url:
        raise SettingsError(
            f"--base is for a branch or commit; {name} is a release with wheels of its own",
            hint=hints.text("repo.forecast_example"),
        )
    with lock.hold(search.lock, verb="inv pin", wait=True, on_wait=run_log.console.info):
        return search.by_archive() if search.is_archive else search.by_git()


@dataclass(frozen=True)
class _Search:
    """One search, and the objects that its steps share.

    `pin` is the present pin with the address to search at, `there` the present checkout.
    """

    layout: Layout
    pin: Pin
    wanted: Wanted
    settings: Settings
    there: Checkout
    run_log: RunLog
    step: Step

    @property
    def name(self) -> str:
        return self.wanted.name

    @property
    def base(self) -> str:
        assert self.there.base
        return self.there.base

    @property
    def is_archive(self) -> bool:
        """Whether the release archive is taken: the checkout is from one, and so is the name."""
        return self.there.kind is Kind.RELEASE and bool(self.version) and not self.wanted.url

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
        assert self.version
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
            ref=None,
            base=None,
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
            (self.name,),
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
        self._fetch(into, named)
        is_release = named.is_tag and not self.wanted.url
        made, release, base = None, None, None
        if is_release:
            made, release = self._release_of(into, named, lacking)
            into.set_ref(f"refs/tags/{self.name}", named.commit)
        elif index.has_any_release(self.pin):
            base = self._base_of(into, named.commit, lacking)
            release = self._wheels_of(base, lacking)
        # After the archive, which has the content of nearly every file.
        self._complete(into, named)
        is_commit = not is_release and index.has_any_release(self.pin)
        pin = replace(
            self.pin,
            tag=pins.short_name(named.ref) if is_commit else self.name,
            version=self._version_of(into, named, base),
            commit=named.commit,
            archive=made,
            precompiled=dict(release.precompiled) if release else {},
            ref=named.ref if is_commit else None,
            base=base,
        )
        reasons = dict(release.not_precompiled) if release else {}
        return Candidate(
            pin,
            named.commit,
            Kind.GIT,
            (release.published if release and is_release else None)
            or history.date_of(into, named.commit),
            into.path,
            None,
            reasons,
            tuple(lacking),
            tuple(self.wanted.argv) if is_commit else (self.name,),
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

    def _fetch(self, into: Git, named: _Named) -> None:
        """Fetch the commit into the store. Raises SourceError where it is no tree of the project.

        A fork is asked even for a commit that is here: who fetches the pin later has only the URL.
        """
        if self.pin.upstream or named.commit not in into.present((named.commit,)):
            into.set_setting("remote.origin.url", self.url)
            into.fetch(self._remote, (named.refspec,), whole=False)
        if named.commit not in into.present((named.commit,)):
            raise SourceError(
                f"{without_user(self.url)} did not serve {self.name}, commit {named.commit}",
                hint=hints.text("repo.network_or_copy"),
            )
        name = self.pin.name
        if name == "vllm" and not into.has_path(named.commit, name):
            raise SourceError(
                f"{self.name} at {without_user(self.url)} is no commit of {name}: it has no folder"
                f" {name}",
                hint=hints.text("repo.fork_example"),
            )

    def _base_of(self, into: Git, commit: str, lacking: list[str]) -> Base | None:
        """Return the release of --base, or the nearest one whose tag is an ancestor; None without.

        Raises SourceError where nobody has the tag of --base, and where it cannot be fetched.
        """
        known, wanted = self._releases(lacking), self.wanted.base
        tags = [(tag, oid) for tag, oid in known if wanted in (None, tag)]
        if wanted and not tags:
            near = index.nearest(wanted[1:], [tag[1:] for tag, _ in known])
            raise SourceError(
                f"--base {wanted} is no release with a tag; nearest:"
                f" {', '.join(f'v{version}' for version in near) or 'none'}",
                hint=hints.text("repo.newer_releases"),
            )
        found = history.nearest_tag(into, commit, tags) or (tags[0] if wanted else None)
        if found is None:
            return None
        tag, oid = found
        if oid not in into.present((oid,)):
            pin = self.pin.of_upstream
            remote = checkout.remote(self.layout, pin, self.settings, self.run_log, self.step)
            into.fetch(remote, (f"+refs/tags/{tag}:refs/tags/{tag}",), whole=False)
        into.set_ref(f"refs/tags/{tag}", oid)
        return Base(tag, tag[1:], oid)

    def _releases(self, lacking: list[str]) -> list[tuple[str, str]]:
        """Return the tags of final releases with their commits: upstream's, and the pin's.

        A fork's own tags do not count: a tag of upstream's name may be at another commit there, and
        compiled sources would be compared with sources that the wheel does not have.
        """
        url = checkout.url_of(self.layout, self.pin.of_upstream, self.settings)
        known: Mapping[str, str] = {}
        try:
            known = git.advertised(
                url, ("refs/tags/v*",), cwd=self.layout.root, settings=self.settings
            )
        except SourceError as exc:
            lacking.append(f"{exc.message}; only the pinned release can be the base")
        tags = [
            (name.removeprefix("refs/tags/"), known.get(f"{name}^{{}}", oid))
            for name, oid in known.items()
            if not name.endswith("^{}")
        ]
        if base := self.pin.base:
            tags.append((base.tag, base.commit))
        elif self.pin.ref is None:
            # A checkout from an archive has the release under another commit than upstream.
            tags.append((self.pin.tag, self.base))
        return [(tag, oid) for tag, oid in tags if _FINAL.fullmatch(tag)]

    def _wheels_of(self, base: Base | None, lacking: list[str]) -> index.Release | None:
        """Return the release of the base with its wheels: the pin's own, or those of the index."""
        if base is None:
            why = f"no release is an ancestor of {self.name}, and --base names none"
            reasons = dict.fromkeys(pins.PRECOMPILED_KEYS, why)
            return index.Release("", None, None, {}, reasons)
        if base.version == self.pin.release and self.pin.precompiled:
            return index.Release(base.version, None, None, self.pin.precompiled)
        try:
            return index.find_release(self.pin, base.version, settings=self.settings)
        except SourceError as exc:
            lacking.append(f"{exc.message}; precompiled wheels are unknown")
            return None

    def _store(self) -> Git:
        into = remotes.open_store(
            self.layout.upstream(self.pin.name), checkout.folder_of(self.layout, self.pin)
        )
        if self.pin.ref is None:
            into.set_ref(f"refs/tags/{self.pin.tag}", self.base)
        return into

    def _named(self, into: Git, lacking: list[str]) -> _Named:
        """Return the tag, branch or commit of the name.

        Where the remote cannot be reached, a tag of the checkout or the store is used.
        """
        if COMMIT.fullmatch(self.name):
            return _Named(self.name, self.name, self.name)
        here = Git(checkout.folder_of(self.layout, self.pin))
        try:
            found = self._query()
        except SourceError as exc:
            tag = f"refs/tags/{self.name}"
            kept = None if self.wanted.url else here.resolve(tag) or into.resolve(tag)
            if kept is None:
                raise
            lacking.append(f"{exc.message}: using {self.name} of the checkout")
            return _Named(kept, tag, kept)
        if (
            found is None
            and not self.wanted.url
            and re.fullmatch(r"[0-9a-f]{7,39}", self.name)
            and (commit := into.resolve(self.name))
        ):
            return _Named(commit, commit, commit)
        if found is None:
            raise self._unknown_name()
        return found

    def _query(self) -> _Named | None:
        """Return the remote's tag or branch of this name, or None.

        Raises SourceError where the remote cannot be reached, and where a tag and a branch of this
        name are different commits.
        """
        name = self.name
        names = (name,) if name.startswith("refs/") else (f"refs/tags/{name}", f"refs/heads/{name}")
        references = git.advertised(
            self.url,
            [spelled for ref in names for spelled in (ref, f"{ref}^{{}}")],
            cwd=self.layout.root,
            settings=self.settings,
        )
        found = [
            _Named(references.get(f"{ref}^{{}}", references[ref]), ref, f"+{ref}:refs/found/{name}")
            for ref in names
            if ref in references
        ]
        if len({named.commit for named in found}) > 1:
            raise SourceError(
                f"{without_user(self.url)} has a tag and a branch {name}: {found[0].commit[:12]}"
                f" and {found[1].commit[:12]}",
                hint=hints.text(
                    "repo.whole_name", text=self.wanted.text.removesuffix(name), name=name
                ),
            )
        return found[0] if found else None

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
        if re.fullmatch(r"[0-9a-f]{7,39}", self.name):
            hint = hints.text("repo.whole_commit")
        elif self.wanted.url:
            hint = hints.text("repo.heads", url=without_user(self.url))
        else:
            hint = hints.text("repo.newer_releases")
        return SourceError(
            f"{without_user(self.url)} has no tag or branch {self.name}; nearest tags:"
            f" {', '.join(near) or 'none'}",
            hint=hint,
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
                into.set_setting(key, pins.commit_id(file, self.pin) or "unknown")
                into.fetch_from(folder / "tree", f"+HEAD:{ref}")
        prefix = into.setting(key)
        return Archive(sdist.filename, sdist.sha256, commit, into.tree(commit)), (
            prefix if prefix != "unknown" else None
        )

    def _version_of(self, into: Git, named: _Named, base: Base | None) -> str:
        """Return the version of a tag, or the one that setuptools-scm derives from known tags."""
        if named.is_tag and self.version and not self.wanted.url:
            return self.version
        if self.pin.version == self.pin.tag:
            return self.name
        found = history.described(into, named.commit)
        if base:
            found = base.tag, history.ahead(into, base.commit, named.commit)
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
