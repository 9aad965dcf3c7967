"""Clones of the workspace in tests, and a git configuration that breaks nearly everything."""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.repo.shell import sh_git, write
from workspace.core import settings as settings_module
from workspace.core.console import RunLog, Step
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.repo import checkout, overview, patches
from workspace.repo.checkout import Checkout, Choice
from workspace.repo.patches import Session, Stack
from workspace.repo.pins import Pin

HOSTILE = {
    "user.useConfigOnly": "true",
    "core.autocrlf": "true",
    "core.safecrlf": "true",
    "core.quotePath": "true",
    "core.sparseCheckout": "true",
    "filter.broken.clean": "false",
    "filter.broken.smudge": "false",
    "filter.broken.required": "true",
    "init.defaultBranch": "trunk",
    "commit.gpgSign": "true",
    "tag.gpgSign": "true",
    "gpg.program": "/bin/false",
    "log.showSignature": "true",
    "color.ui": "always",
    "apply.whitespace": "error",
    "am.threeWay": "false",
    "mailinfo.scissors": "true",
    "merge.default": "broken",
    "merge.broken.driver": "false",
    "format.signOff": "true",
    "format.useAutoBase": "true",
    "diff.noprefix": "true",
    "diff.mnemonicPrefix": "true",
    "diff.external": "/bin/false",
    "diff.autoRefreshIndex": "false",
    "status.showUntrackedFiles": "no",
    "status.branch": "true",
    "rerere.enabled": "true",
    "i18n.commitEncoding": "ISO-8859-1",
    "fetch.recurseSubmodules": "true",
    "submodule.recurse": "true",
    # A recommended hardening, which breaks each git in the store of commits.
    "safe.bareRepository": "explicit",
    "core.fsmonitor": "true",
    "core.untrackedCache": "true",
    "core.splitIndex": "true",
    "core.logAllRefUpdates": "false",
    "core.fileMode": "false",
    "core.symlinks": "false",
    "core.ignoreCase": "true",
    "core.commentChar": "auto",
    "core.abbrev": "no",
    "core.worktree": "/nowhere",
    "core.whitespace": "tab-in-indent,cr-at-eol",
    "index.sparse": "true",
    "index.version": "2",
    "feature.manyFiles": "true",
    "feature.experimental": "true",
    "merge.conflictStyle": "zdiff3",
    "merge.renames": "false",
    "merge.ff": "only",
    "rebase.autoStash": "true",
    "rebase.instructionFormat": "%an",
    "commit.cleanup": "verbatim",
    "commit.verbose": "true",
    "log.date": "relative",
    "log.decorate": "full",
    "log.follow": "true",
    "log.mailmap": "false",
    "column.ui": "always",
    "diff.ignoreSubmodules": "all",
    "diff.orderFile": "/nowhere",
    "diff.relative": "true",
    "diff.renames": "copies",
    "diff.submodule": "log",
    "format.attach": "true",
    "format.coverLetter": "true",
    "format.headers": "X-Mine: 1",
    "format.outputDirectory": "mails",
    "format.pretty": "oneline",
    "format.subjectPrefix": "MINE",
    "am.keepcr": "false",
    "mailinfo.quotedCr": "strip",
    "fetch.fsckObjects": "true",
    "fetch.prune": "true",
    "fetch.pruneTags": "true",
    "gc.auto": "1",
    "gc.pruneExpire": "now",
    "init.defaultObjectFormat": "sha256",
    "init.defaultRefFormat": "reftable",
    "push.default": "nothing",
    "checkout.workers": "0",
    "worktree.guessRemote": "true",
    "status.renames": "copies",
    "submodule.propagateBranches": "true",
}


def write_config(path: Path, settings: Mapping[str, str]) -> None:
    """Write a git configuration."""
    with path.open("w") as file:
        for key, value in settings.items():
            section, _, name = key.rpartition(".")
            section, _, inner = section.partition(".")
            head = f'{section} "{inner}"' if inner else section
            file.write(f'[{head}]\n\t{name} = "{value}"\n')


@dataclass
class Workspace:
    """A clone of the superproject with its own pins."""

    layout: Layout
    pin: Pin
    run_log: RunLog
    err: io.StringIO
    environ: dict[str, str] = field(default_factory=dict)
    out: io.StringIO = field(default_factory=io.StringIO)

    @property
    def vllm(self) -> Path:
        return self.layout.vllm

    def settings(self, **more: str) -> Settings:
        return settings_module.load(self.layout, environ={**os.environ, **self.environ, **more})

    def ensure(self, choice: Choice = "git", **more: str) -> Checkout:
        return checkout.ensure(
            self.layout,
            self.pin,
            self.settings(**more),
            choice=choice,
            run_log=self.run_log,
            step=Step("source"),
        )

    def observe(self) -> Checkout:
        return checkout.observe(self.layout, self.pin)

    def session(self, **settings: str) -> Session:
        return Session(
            self.layout,
            self.settings(**settings),
            "vllm",
            self.pin,
            self.observe(),
            self.run_log,
        )

    def stack(self) -> Stack:
        return patches.observe(self.layout, "vllm", self.pin, self.observe())

    def apply(self, *, stop_at_conflict: bool = False) -> Stack:
        return patches.apply(
            self.layout,
            "vllm",
            self.pin,
            self.observe(),
            run_log=self.run_log,
            stop_at_conflict=stop_at_conflict,
        )

    def unapply(self) -> Stack:
        return patches.unapply(self.layout, "vllm", self.pin, self.observe(), run_log=self.run_log)

    def begin_move(self, target: str) -> None:
        """Write the record that exists before the first file of a move is touched."""
        write(
            self.layout.root,
            {
                ".workspace/moving/vllm.json": json.dumps(
                    {"from": sh_git(self.vllm, "rev-parse", "HEAD"), "to": target}
                )
            },
        )

    def resume(self, how: overview.How) -> Stack:
        return overview.resume(
            self.layout, "vllm", self.pin, self.observe(), how=how, run_log=self.run_log
        )

    def rows(self) -> tuple[overview.Entry, ...]:
        """The rows of `inv patch`."""
        checkout, stack = self.observe(), self.stack()
        move = overview.moved(self.layout, self.pin, checkout, stack)
        return overview.entries(self.layout, "vllm", self.pin, checkout, stack, move)

    def series(self, content: Mapping[str, bytes], *, base: str | None = None) -> None:
        """Replace the series."""
        folder = self.layout.patches("vllm")
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        write(folder, content)
        write(
            folder,
            {
                "series": (
                    f"# Patches\n# base: {base or self.pin.commit}\n"
                    + "".join(f"{name}\n" for name in content)
                )
            },
        )

    def offline(self) -> None:
        """Make the remote unreachable; the archive is in the cache."""
        self.pin = replace(self.pin, url="file:///nowhere/vllm.git")
