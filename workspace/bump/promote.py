"""Promotion: the sandbox of a green bump replaces the working state.

Tree, compiled files, environment, patches, pins and gitlink move in steps. After an interruption,
the next `inv pin.bump` or `inv patch.continue` finishes them. Nothing is fetched or compiled.
"""

import base64
import csv
import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from workspace.bump import known_good, staging
from workspace.bump.staging import BumpSandbox, RedoLog, Step
from workspace.core import hints
from workspace.core.console import RunLog, State
from workspace.core.errors import BuildError, CheckoutError, PatchDrift
from workspace.core.files import read_regular, write_atomic
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import editable, plan, sandbox, stages, stamp, verify
from workspace.machine import interpreter, venv
from workspace.repo import pins, series
from workspace.repo.git import Git, worktree
from workspace.repo.series import BASE_REF, TIP_REF

# Upper limit for files that may hold a path (.pth, finder, direct_url.json); they have some hundred
# bytes.
LARGEST_BYTES = 1 << 20
SUBJECT_WIDTH = 72
# Most lines of a range-diff in a commit message; a longer one needs a pager.
LONGEST_RANGE_DIFF = 300


def retarget_scripts(layout: Layout, package: str, *, old: Path, new: Path) -> tuple[str, ...]:
    """Point the editable install of `package` in `.vllm` at the tree `new` instead of `old`.

    Returns the changed files. A second run changes nothing, also after a kill between a file and
    RECORD.
    """
    written = []
    for site in interpreter.site_packages(layout):
        for info in site.glob(f"{package}-*.dist-info"):
            rows = [
                row
                for row in csv.reader(
                    io.StringIO(read_regular(info / "RECORD").decode(), newline="")
                )
                if row
            ]
            for row in rows:
                written += (
                    [row[0]] if row[1:] != ["", ""] and _rewrite(site / row[0], old, new) else []
                )
            _write_record(site, info / "RECORD", rows)
    return tuple(written)


def _rewrite(path: Path, old: Path, new: Path) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_BYTES:
        return False
    before = after = read_regular(path)
    # Plain text, and percent-encoded as in the URL of direct_url.json.
    for name, other in {str(old): str(new), quote(str(old)): quote(str(new))}.items():
        after = after.replace(name.encode(), other.encode())
    if after != before:
        # Replace by rename: uv may have hard-linked the file to its cache.
        write_atomic(path, after, mode=path.stat().st_mode & 0o777)
    return after != before


def _write_record(site: Path, record: Path, rows: list[list[str]]) -> None:
    """Update sizes and hashes in RECORD; a file shorter than listed would count as incomplete."""
    for row in rows:
        path = site / row[0]
        if len(row) == 3 and row[2] and path.is_file() and path.stat().st_size <= LARGEST_BYTES:
            content = read_regular(path, most_bytes=LARGEST_BYTES)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
            row[1] = f"sha256={digest.rstrip(b'=').decode()}"
            row[2] = str(len(content))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    if text.getvalue().encode() != read_regular(record):
        write_atomic(record, text.getvalue().encode())


def message_file(layout: Layout) -> Path:
    """Return the path of the prepared commit message."""
    return layout.state / "bump-message.txt"


def is_begun(bump_sandbox: BumpSandbox) -> bool:
    """Return whether the promotion of this bump has begun."""
    return bump_sandbox.promoting.exists()


def is_begun_in(layout: Layout) -> bool:
    """Return whether a promotion is under way, even if the sandbox's record is damaged."""
    return layout.promoting.exists()


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
    """Write the redo log of the promotion. From here on it can only be finished.

    `tip` is the commit that was exported and tested. Raises what require_unmoved and require_way
    raise, and CheckoutError if the sandbox changed.
    """
    layout, made = bump_sandbox.outer, Git(bump_sandbox.layout.vllm)
    require_unmoved(bump_sandbox)
    if made.head() != tip or made.edits():
        raise CheckoutError(
            f"{bump_sandbox.shown} changed while its smoke ran; nothing was promoted",
            hint=hints.text("bump.test_present"),
        )
    worktree.require_way(Git(layout.vllm), tip)
    observed = plan.observe(layout, settings)
    why = known_good.refusal(layout, observed)
    name = "" if why else known_good.keep(layout, observed, run_log=run_log).name
    if why:
        run_log.console.info(f"{observed.pin.tag} is not kept as a known-good state: {why}")
    facts = {
        "good": name,
        "tag": observed.pin.tag,
        "tip": tip,
        "left": known_good.timestamp(),
        "names": sandbox.names_of(layout.patches("vllm")),
        **staging.products_of(layout),
    }
    RedoLog(bump_sandbox.promoting, facts).write()


def finish(bump_sandbox: BumpSandbox, settings: Settings, *, run_log: RunLog) -> None:
    """Do the remaining steps of a promotion, then remove the sandbox."""
    redo_log = staging.find_redo_log(bump_sandbox.promoting)
    assert redo_log is not None
    with run_log.console.step("promote") as view:
        run_log.phase("promote", view)
        staging.finish_steps(redo_log, _steps(bump_sandbox, run_log))
        view.reason = f"{redo_log.facts['tag']} → {bump_sandbox.pin.tag}"
    run_log.step = None
    _stamp(bump_sandbox, settings, run_log)
    staging.remove(bump_sandbox.outer)
    _report(bump_sandbox, redo_log.facts, run_log)


def _steps(bump_sandbox: BumpSandbox, run_log: RunLog) -> tuple[tuple[str, Step], ...]:
    """Return the steps of a promotion, in order; the redo log on disk has their names."""
    layout, own, pin = bump_sandbox.outer, bump_sandbox.layout, bump_sandbox.pin
    # Only a commit of upstream's belongs into the superproject: nobody could fetch a commit that
    # is made from an archive.
    gitlink = None if is_archives(pin) else pin.commit

    def move_source(facts: Mapping[str, str]) -> None:
        staging.move_tree(layout, old=bump_sandbox.start.tip, new=facts["tip"], run_log=run_log)

    def move_products(_: Mapping[str, str]) -> None:
        editable.move_products(own.vllm, layout.vllm, editable.build_products(own.vllm))

    def write_patches(facts: Mapping[str, str]) -> None:
        source, target = own.patches("vllm"), layout.patches("vllm")
        sandbox.write_patches(source, target, pin=pin.commit, former=facts["names"])

    return (
        ("keep", lambda facts: _keep(bump_sandbox, facts)),
        ("environment aside", lambda facts: _keep_environment(bump_sandbox, facts)),
        ("source", move_source),
        (
            "products aside",
            lambda facts: staging.remove_products(layout, facts, good_state=facts["good"]),
        ),
        ("products", move_products),
        ("environment", lambda facts: _move_environment(bump_sandbox)),
        ("patches", write_patches),
        (
            "pins",
            lambda facts: write_atomic(layout.pins, pins.dump(read_regular(layout.pins), pin)),
        ),
        ("gitlink", lambda facts: staging.set_gitlink(layout, gitlink, run_log=run_log)),
        ("message", lambda facts: _write_message(bump_sandbox, facts)),
    )


def _keep(bump_sandbox: BumpSandbox, facts: Mapping[str, str]) -> None:
    """Set references to the old state, unless it is a known-good state, and to the new stack."""
    if not facts["good"]:
        known_good.keep_present(
            bump_sandbox.outer, f"Before the bump to {bump_sandbox.pin.tag}", name=facts["left"]
        )
    git = Git(bump_sandbox.outer.vllm)
    git.set_ref(TIP_REF, facts["tip"])
    git.set_ref(BASE_REF, bump_sandbox.start.new_base)


def _keep_environment(bump_sandbox: BumpSandbox, facts: Mapping[str, str]) -> None:
    """Move the old environment to its known-good state, or without one into the sandbox."""
    scratch = (
        known_good.environment(bump_sandbox.outer, facts["good"])
        if facts["good"]
        else bump_sandbox.layout.root / "old-environment"
    )
    staging.keep_environment(bump_sandbox.outer.environment, scratch)


def _move_environment(bump_sandbox: BumpSandbox) -> None:
    if os.path.lexists(bump_sandbox.layout.environment):
        os.rename(bump_sandbox.layout.environment, bump_sandbox.outer.environment)
    for old in {bump_sandbox.layout.vllm, bump_sandbox.layout.vllm.resolve()}:
        retarget_scripts(bump_sandbox.outer, "vllm", old=old, new=bump_sandbox.outer.vllm)


def is_archives(pin: pins.Pin) -> bool:
    """Return whether the pin's commit is made from the release archive."""
    return pin.archive is not None and pin.commit == pin.archive.commit


def _stamp(bump_sandbox: BumpSandbox, settings: Settings, run_log: RunLog) -> None:
    """Verify the moved build in its new place, then write its stamps.

    Bootstrap rebuilds what does not verify.
    """
    layout = bump_sandbox.outer
    old = stamp.read(layout.stamp("vllm"))
    environment = stamp.read(layout.stamp("environment"))
    if old is None or old.kernels is None or environment is None:
        return
    if venv.repair(layout, settings, run_log=run_log):
        stamp.withdraw(layout.stamp("environment"))
        return
    inputs = {**environment.inputs, "place": str(layout.environment)}
    stamp.write(
        layout.stamp("environment"),
        stamp.Stamp(inputs=inputs, outcome=environment.outcome, packages=environment.packages),
    )
    with run_log.console.step("verify") as view:
        try:
            observed = plan.observe(layout, settings)
            verdict = verify.verify(observed)
            run = stages.Run(run_log, observed, dict(old.outcome))
            stages.write_stamp(run, verdict, old.kernels)
            view.reason = f"{verdict.version} from vendor/vllm, {verdict.summary}"
        except BuildError as exc:
            stamp.withdraw(layout.stamp("vllm"))
            view.state, view.reason = State.WARN, f"{exc.message}: bootstrap installs it again"


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


def _write_message(bump_sandbox: BumpSandbox, facts: Mapping[str, str]) -> None:
    """Write the commit message of the bump: pins, dropped patches and range-diff."""
    old, new = bump_sandbox.start, bump_sandbox.pin
    kept = series.read_series(bump_sandbox.layout.patches("vllm"), pin=new.commit).names
    compared = worktree.range_diff(
        Git(bump_sandbox.outer.vllm), (old.base, old.tip), (old.new_base, facts["tip"])
    ).splitlines()
    more = (
        [f"… {len(compared) - LONGEST_RANGE_DIFF} lines more"]
        if len(compared) > LONGEST_RANGE_DIFF
        else []
    )
    lines = [
        f"pin: move vLLM from {facts['tag']} to {new.tag}"[:SUBJECT_WIDTH],
        "",
        f"Commit {new.commit}" + (", made from the release archive." if is_archives(new) else "."),
        f"{len(kept)} {'patch' if len(kept) == 1 else 'patches'} on it; the smoke has passed.",
        *(f"Dropped {name}: {why}." for name, why in dropped(bump_sandbox, facts).items()),
        *(
            [
                "",
                (
                    f"git range-diff {old.base[:12]}..{old.tip[:12]}"
                    f" {old.new_base[:12]}..{facts['tip'][:12]}"
                ),
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
    if facts["good"]:
        console.info(
            f"{facts['tag']} is kept as {facts['good']}; ./scripts/inv pin.rollback returns to it"
        )
    staging.report_leftovers(layout, facts, console=console)
    # Do not name the submodule's path: the gitlink is staged already, and with the path git may
    # stage the patched commit that is checked out.
    message = layout.relative(message_file(layout))
    console.hint(hints.text("bump.commit_vllm_with", message=message))
