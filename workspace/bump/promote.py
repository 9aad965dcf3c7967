"""Promotion: the working state moves to the state of a green bump's sandbox.

That state becomes known-good, and the move to it is that of a rollback. After an interruption, the
next `inv pin.bump` or `inv patch.continue` finishes it. Nothing is fetched or compiled.
"""

from collections.abc import Mapping
from pathlib import Path

from workspace.bump import known_good, staging
from workspace.bump.known_good import KnownGood
from workspace.bump.staging import BumpSandbox
from workspace.core import hints
from workspace.core.console import RunLog
from workspace.core.errors import CheckoutError, PatchDrift
from workspace.core.files import write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import plan
from workspace.repo import pins, series
from workspace.repo.git import Git, worktree

SUBJECT_WIDTH = 72
# Most lines of a range-diff in a commit message; a longer one needs a pager.
LONGEST_RANGE_DIFF = 300


def message_file(layout: Layout) -> Path:
    """Return the path of the prepared commit message."""
    return layout.state / "bump-message.txt"


def require_unmoved(bump_sandbox: BumpSandbox) -> None:
    """Raise CheckoutError or PatchDrift if the clone changed after the bump began.

    A promotion would lose that change.
    """
    layout, start = bump_sandbox.outer, bump_sandbox.start
    git, pin = Git(layout.vllm), pins.load(layout.pins).vllm
    again = hints.text("bump.export_then_again", ref=start.ref)
    if verb := git.under_way():
        raise CheckoutError(
            f"vendor/vllm is in the middle of a git {verb}; nothing was promoted",
            hint=hints.text("bump.git_continue", verb=verb),
        )
    if git.head() != start.tip:
        raise CheckoutError(
            f"vendor/vllm is no longer at {start.tip[:12]}, where this bump began; nothing was"
            " promoted",
            hint=again,
        )
    if edited := git.edits():
        raise CheckoutError(
            f"vendor/vllm has edits ({', '.join(edited[:3])}); nothing was promoted",
            hint=hints.text("bump.stash_then_again", shown="vendor/vllm"),
        )
    if staging.digest_of(layout.patches("vllm"), pin=pin.commit) != start.patches:
        raise PatchDrift(
            "patches/vllm changed after this bump began; nothing was promoted", hint=again
        )


def begin(bump_sandbox: BumpSandbox, settings: Settings, *, tip: str, run_log: RunLog) -> None:
    """Record the sandbox as a known-good state, and write the redo log of the move to it.

    From here on the promotion can only be finished. `tip` is the commit that was exported and
    tested. Raises what require_unmoved and require_way raise, and CheckoutError if the sandbox
    changed.
    """
    layout, made = bump_sandbox.outer, Git(bump_sandbox.layout.vllm)
    require_unmoved(bump_sandbox)
    if made.head() != tip or made.edits():
        raise CheckoutError(
            f"{bump_sandbox.shown} changed while its smoke ran; nothing was promoted",
            hint=hints.text("bump.test_present"),
        )
    worktree.require_way(Git(layout.vllm), tip)
    observed, left = plan.observe(layout, settings), known_good.timestamp()
    if why := known_good.refusal(layout, observed):
        run_log.console.info(f"{observed.pin.tag} is not kept as a known-good state: {why}")
        known_good.keep_present(layout, f"Before the bump to {bump_sandbox.pin.tag}", name=left)
    present = "" if why else known_good.keep(observed, run_log=run_log).name
    # Only a commit of upstream's belongs into the superproject: nobody could fetch a commit that
    # is made from an archive.
    gitlink = None if is_archives(bump_sandbox.pin) else bump_sandbox.pin.commit
    tested = plan.observe(bump_sandbox.layout, settings)
    wanted = known_good.keep(tested, run_log=run_log, outer=layout, gitlink=gitlink)
    staging.begin_move(layout.promoting, layout, wanted, present=present, left=left)


def finish(bump_sandbox: BumpSandbox, settings: Settings, *, run_log: RunLog) -> KnownGood:
    """Do the remaining steps of a promotion, then remove the sandbox; return the new state."""
    layout = bump_sandbox.outer
    redo_log = staging.find_redo_log(layout.promoting)
    assert redo_log is not None
    wanted = staging.finish_move(layout.promoting, layout, settings, redo_log, run_log)
    _write_message(bump_sandbox, redo_log.facts, wanted.head)
    staging.remove(layout)
    _report(bump_sandbox, redo_log.facts, run_log)
    return wanted


def is_archives(pin: pins.Pin) -> bool:
    """Return whether the pin's commit is made from the release archive."""
    return pin.archive is not None and pin.commit == pin.archive.commit


def dropped(bump_sandbox: BumpSandbox, facts: Mapping[str, str]) -> dict[str, str]:
    """Return the patches that are no longer on the new base, each with the reason."""
    names = series.read_series(
        bump_sandbox.layout.patches("vllm"), pin=bump_sandbox.pin.commit
    ).names
    gone = [name for name in facts["names"].split("\n") if name and name not in names]
    return {
        name: (
            "left out with --skip"
            if name in bump_sandbox.skipped
            else "upstream has it, or its subject changed"
        )
        for name in gone
    }


def _write_message(bump_sandbox: BumpSandbox, facts: Mapping[str, str], tip: str) -> None:
    """Write the commit message of the bump: pins, dropped patches and range-diff."""
    old, new = bump_sandbox.start, bump_sandbox.pin
    kept = series.read_series(bump_sandbox.layout.patches("vllm"), pin=new.commit).names
    compared = worktree.range_diff(
        Git(bump_sandbox.outer.vllm), (old.base, old.tip), (old.new_base, tip)
    ).splitlines()
    more = (
        [f"… {len(compared) - LONGEST_RANGE_DIFF} lines more"]
        if len(compared) > LONGEST_RANGE_DIFF
        else []
    )
    lines = [
        f"pin: move vLLM from {old.tag} to {new.tag}"[:SUBJECT_WIDTH],
        "",
        f"Commit {new.commit}" + (", made from the release archive." if is_archives(new) else "."),
        f"{len(kept)} {'patch' if len(kept) == 1 else 'patches'} on it; the smoke has passed.",
        *(f"Dropped {name}: {why}." for name, why in dropped(bump_sandbox, facts).items()),
        *(
            [
                "",
                (f"git range-diff {old.base[:12]}..{old.tip[:12]} {old.new_base[:12]}..{tip[:12]}"),
                "",
            ]
            if compared
            else []
        ),
        *(f"    {line}".rstrip() for line in [*compared[:LONGEST_RANGE_DIFF], *more]),
    ]
    write_atomic(
        message_file(bump_sandbox.outer), ("\n".join(lines) + "\n").encode(errors="surrogateescape")
    )


def _report(bump_sandbox: BumpSandbox, facts: Mapping[str, str], run_log: RunLog) -> None:
    layout, console = bump_sandbox.outer, run_log.console
    if is_archives(bump_sandbox.pin):
        console.info(
            "the gitlink of vendor/vllm is unchanged: this pin is a commit made from the release"
            " archive, which upstream does not have"
        )
    if present := facts["present"]:
        console.info(
            f"{bump_sandbox.start.tag} is kept as {present}; ./scripts/inv pin.rollback returns to"
            " it"
        )
    staging.report_leftovers(layout, facts, console=console)
    # Do not name the submodule's path: the gitlink is staged already, and with the path git may
    # stage the patched commit that is checked out.
    message = layout.relative(message_file(layout))
    console.hint(hints.text("bump.commit_vllm_with", message=message))
