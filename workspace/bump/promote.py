"""A bump whose smoke is green takes the place of the working state: tree, compiled files,
environment, patches, pins, gitlink.

Done in steps that the next `inv pin.bump` or `inv patch.continue` finishes, whatever ended them.
Nothing is fetched or compiled.
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
from workspace.bump.staging import BumpSandbox, Marker
from workspace.core.errors import BuildError, CheckoutError, PatchDrift
from workspace.core.files import read_regular, write_atomic
from workspace.core.log import RunLog
from workspace.core.paths import Layout
from workspace.core.settings import Settings
from workspace.install import editable, plan, sandbox, stages, stamp
from workspace.machine import interpreter, venv
from workspace.repo import pins, series
from workspace.repo.git import Git, worktree
from workspace.repo.series import BASE_REF, TIP_REF

# The files of an editable install that hold paths (its .pth or finder, direct_url.json) have some
# hundred bytes.
LARGEST_BYTES = 1 << 20


def retarget_scripts(layout: Layout, package: str, *, old: Path, new: Path) -> tuple[str, ...]:
    """Let the editable install of `package` in `.vllm` lead to the tree `new` instead of `old`;
    return the files that were written.

    Done twice equals done once, also where the first was killed between a file and the list of
    files.
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
    # As text, and as in an address (direct_url.json).
    for name, other in {str(old): str(new), quote(str(old)): quote(str(new))}.items():
        after = after.replace(name.encode(), other.encode())
    if after != before:
        # By rename: uv may have linked the file to its cache.
        write_atomic(path, after, mode=path.stat().st_mode & 0o777)
    return after != before


def _write_record(site: Path, record: Path, rows: list[list[str]]) -> None:
    """Let the list of files name sizes and hashes as they are now: a file that is shorter than
    listed counts as half.
    """
    for row in rows:
        path = site / row[0]
        if len(row) == 3 and row[2] and path.is_file() and path.stat().st_size <= LARGEST_BYTES:
            content = read_regular(path)
            row[1] = (
                f"sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()}"
            )
            row[2] = str(len(content))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    if text.getvalue().encode() != read_regular(record):
        write_atomic(record, text.getvalue().encode())


SUBJECT_WIDTH = 72
# More of a range-diff is for a pager.
LONGEST_RANGE_DIFF = 300


def message_file(layout: Layout) -> Path:
    return layout.state / "bump-message.txt"


def is_begun(bump_sandbox: BumpSandbox) -> bool:
    return bump_sandbox.promoting.exists()


def is_begun_in(layout: Layout) -> bool:
    """Whether a promotion is under way, be the workshop's record readable or not."""
    return layout.promoting.exists()


def require_unmoved(bump_sandbox: BumpSandbox) -> None:
    """Raise CheckoutError or PatchDrift where the clone is no longer as it was when the bump began:
    what is new there would be lost.
    """
    layout, begun = bump_sandbox.outer, bump_sandbox.begun
    git, pin = Git(layout.vllm), pins.load(layout.pins).vllm
    again = (
        "./scripts/inv patch.export where it is to stay, then ./scripts/inv patch.continue --abort"
        f" && ./scripts/inv pin.bump {begun.ref}"
    )
    if verb := git.under_way():
        raise CheckoutError(
            f"vendor/vllm is in the middle of a git {verb}; nothing was promoted",
            hint=f"git -C vendor/vllm {verb} --continue    or --abort",
        )
    if git.head() != begun.tip:
        raise CheckoutError(
            f"vendor/vllm is no longer at {begun.tip[:12]}, where this bump began; nothing was"
            " promoted",
            hint=again,
        )
    if edited := git.edits():
        raise CheckoutError(
            f"vendor/vllm has edits ({', '.join(edited[:3])}); nothing was promoted",
            hint="git -C vendor/vllm stash    and the same command again",
        )
    if staging.digest_of(layout.patches("vllm"), pin=pin.commit) != begun.patches:
        raise PatchDrift(
            "patches/vllm changed after this bump began; nothing was promoted", hint=again
        )


def begin(bump_sandbox: BumpSandbox, settings: Settings, *, tip: str, run_log: RunLog) -> None:
    """Write down what is to be done. From here on it goes forward only.

    `tip` is what was exported and smoked. Raises what require_unmoved and require_way raise, and
    CheckoutError where the workshop moved on.
    """
    layout, made = bump_sandbox.outer, Git(bump_sandbox.layout.vllm)
    require_unmoved(bump_sandbox)
    if made.head() != tip or made.edits():
        raise CheckoutError(
            f"{bump_sandbox.shown} changed while its smoke ran; nothing was promoted",
            hint="./scripts/inv patch.continue    judges what is there now",
        )
    worktree.require_way(Git(layout.vllm), tip)
    observed = plan.observe(layout, settings)
    why = known_good.refusal(layout, observed)
    name = "" if why else known_good.keep(layout, observed, run_log=run_log).name
    if why:
        run_log.console.info(f"{observed.pin.tag} is not kept to return to: {why}")
    facts = {
        "good": name,
        "tag": observed.pin.tag,
        "tip": tip,
        "left": known_good.now(),
        "names": sandbox.names_of(layout.patches("vllm")),
        **staging.products_of(layout),
    }
    Marker(bump_sandbox.promoting, facts).write()


def finish(bump_sandbox: BumpSandbox, settings: Settings, *, run_log: RunLog) -> None:
    """Do what is still to be done of a promotion, then take the workshop away."""
    marker = staging.find_marker(bump_sandbox.promoting)
    assert marker is not None
    layout, patches_new = bump_sandbox.outer, bump_sandbox.layout.patches("vllm")
    # Only a commit of upstream's belongs into the superproject: nobody could fetch the one that is
    # made of an archive.
    gitlink = None if is_archives(bump_sandbox.pin) else bump_sandbox.pin.commit
    with run_log.console.step("promote") as view:
        run_log.phase("promote", view)
        staging.finish_marker(
            marker,
            (
                ("keep", lambda facts: _keep(bump_sandbox, facts)),
                ("environment aside", lambda facts: _put_aside(bump_sandbox, facts)),
                (
                    "source",
                    lambda facts: staging.move_tree(
                        layout, old=bump_sandbox.begun.tip, new=facts["tip"], run_log=run_log
                    ),
                ),
                (
                    "products aside",
                    lambda facts: staging.take_products_away(
                        layout, facts, good_state=facts["good"]
                    ),
                ),
                (
                    "products",
                    lambda facts: editable.move_products(
                        bump_sandbox.layout.vllm,
                        layout.vllm,
                        editable.build_products(bump_sandbox.layout.vllm),
                    ),
                ),
                ("environment", lambda facts: _move_environment(bump_sandbox)),
                (
                    "patches",
                    lambda facts: sandbox.write_patches(
                        patches_new,
                        layout.patches("vllm"),
                        pin=bump_sandbox.pin.commit,
                        former=facts["names"],
                    ),
                ),
                (
                    "pins",
                    lambda facts: write_atomic(
                        layout.pins, pins.dump(read_regular(layout.pins), bump_sandbox.pin)
                    ),
                ),
                ("gitlink", lambda facts: staging.set_gitlink(layout, gitlink, run_log=run_log)),
                ("message", lambda facts: _write_message(bump_sandbox, facts)),
            ),
        )
        view.reason = f"{marker.facts['tag']} → {bump_sandbox.pin.tag}"
    run_log.step = None
    _stamp(bump_sandbox, settings, run_log)
    staging.remove(layout)
    _report(bump_sandbox, marker.facts, run_log)


def _keep(bump_sandbox: BumpSandbox, facts: Mapping[str, str]) -> None:
    if not facts["good"]:
        known_good.keep_aside(
            bump_sandbox.outer, f"Before the bump to {bump_sandbox.pin.tag}", name=facts["left"]
        )
    git = Git(bump_sandbox.outer.vllm)
    git.set_ref(TIP_REF, facts["tip"])
    git.set_ref(BASE_REF, bump_sandbox.begun.new_base)


def _put_aside(bump_sandbox: BumpSandbox, facts: Mapping[str, str]) -> None:
    """The old environment waits with the good state that it belongs to; one that proved nothing
    goes with the workshop.
    """
    scratch = (
        known_good.environment(bump_sandbox.outer, facts["good"])
        if facts["good"]
        else bump_sandbox.layout.root / "old-environment"
    )
    staging.put_aside(bump_sandbox.outer.environment, scratch)


def _move_environment(bump_sandbox: BumpSandbox) -> None:
    if os.path.lexists(bump_sandbox.layout.environment):
        os.rename(bump_sandbox.layout.environment, bump_sandbox.outer.environment)
    for old in {bump_sandbox.layout.vllm, bump_sandbox.layout.vllm.resolve()}:
        retarget_scripts(bump_sandbox.outer, "vllm", old=old, new=bump_sandbox.outer.vllm)


def is_archives(pin: pins.Pin) -> bool:
    return pin.archive is not None and pin.commit == pin.archive.commit


def _stamp(bump_sandbox: BumpSandbox, settings: Settings, run_log: RunLog) -> None:
    """Prove that what was moved works in its new place, and only then let its stamps say so.
    Bootstrap makes anew what does not.
    """
    layout = bump_sandbox.outer
    old = stamp.read(layout.stamp("vllm"))
    environment = stamp.read(layout.stamp("environment"))
    if old is None or environment is None:
        return
    if venv.repair(layout, settings, run_log=run_log):
        stamp.withdraw(layout.stamp("environment"))
        return
    inputs = {**environment.inputs, "place": str(layout.environment)}
    stamp.write(
        layout.stamp("environment"), stamp.Stamp(inputs=inputs, packages=environment.packages)
    )
    with run_log.console.step("verify") as view:
        try:
            observed = plan.observe(layout, settings)
            verdict = editable.verify(layout, settings, observed)
            run = stages.Run(layout, settings, run_log, observed, dict(old.outcome))
            # What the workshop made is of the same kind here.
            stages.write_stamp(run, observed, verdict, kind=old.inputs["origin"].split()[0])
            view.reason = f"{verdict.version} from vendor/vllm, {verdict.summary}"
        except BuildError as exc:
            stamp.withdraw(layout.stamp("vllm"))
            view.state, view.reason = "warn", f"{exc.message}: to be installed anew"


def dropped(bump_sandbox: BumpSandbox, facts: Mapping[str, str]) -> dict[str, str]:
    """The patches that are not on the new base any more, and why."""
    names = series.read_series(
        bump_sandbox.layout.patches("vllm"), pin=bump_sandbox.pin.commit
    ).names
    gone = [name for name in facts["names"].split("\n") if name and name not in names]
    return {
        name: (
            "left out with --skip"
            if name in bump_sandbox.skipped
            else "upstream has it, or it has another subject now"
        )
        for name in gone
    }


def _write_message(bump_sandbox: BumpSandbox, facts: Mapping[str, str]) -> None:
    """The commit message of the bump: what moved, each patch, and the range-diff."""
    old, new = bump_sandbox.begun, bump_sandbox.pin
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
        f"Commit {new.commit}" + (", made of the release archive." if is_archives(new) else "."),
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
            "the gitlink of vendor/vllm stays as it is: this pin is the release archive's commit,"
            " which upstream does not have"
        )
    if facts["good"]:
        console.info(
            f"{facts['tag']} is kept as {facts['good']}; ./scripts/inv pin.rollback returns to it"
        )
    staging.report_left(layout, facts, console=console)
    # Without a path of the submodule's: the gitlink is staged already, and by its path git may take
    # the patched commit that is checked out.
    console.info(
        "to commit: git add vendor/pins.toml patches/vllm && git commit -F"
        f" {layout.relative(message_file(layout))}"
    )
