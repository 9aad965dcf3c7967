"""The disk is full, a folder is read-only, the clock jumps: a sentence, a hint, no traceback; then
the next run completes.
"""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.proof.kill.cases import KillCase
from tests.proof.kill.conftest import Grounds
from tests.proof.kill.harness import (
    CODES,
    Kill,
    Place,
    Result,
    complete,
    each,
    failed_rightly,
    judged,
)
from tests.proof.kill.verbs import VERBS
from tests.small.world import Ended

NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
DECADE_S = 10 * 365 * 86400
FULL_KIB = (0, 16, 64, 200, 400, 700, 1000, 1400, 1800, 2200, 2600, 3000)
Judge = Callable[[list[Result]], None]
BY_CASE = pytest.mark.parametrize("case", VERBS, ids=lambda case: case.name.replace(" ", "-"))

# The clone lies on a tmpfs that is large while the verb looks at the disk, and full a little later:
# preflight would stop at a small one. Afterwards there is room again, and what came of it is copied
# out.
FULL = """
set -e
outer=$1 size=$2 work=$3 from=$4; shift 4
fill() {
used=$(df -k --output=used "$work" | tail -1)
mount -o remount,size=$((used + size))k "$work"
}
mount -t tmpfs -o size=20g none "$work"
cp -a "$outer/clone" "$work/inner"
mount --bind "$work/inner" "$outer/clone"
cd "$outer"
set +e
test -n "$from" || fill
"$@" >"$outer/tmp/out" 2>"$outer/tmp/err" &
verb=$!
if test -n "$from"; then
until grep -q "$from" "$outer/tmp/err" || ! kill -0 $verb 2>/dev/null; do sleep 0.005; done
fill
fi
wait $verb; echo $? >"$outer/tmp/code"
mount -o remount,size=20g "$work"
umount "$outer/clone"
rm -rf "$outer/clone" && cp -a "$work/inner" "$outer/clone"
"""
READ_ONLY = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && exec "$@"'


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    done = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(
            "no user namespaces here, so no full disk and no read-only mount was tried:"
            f" {done.stderr.strip()}"
        )


@BY_CASE
def test_disk_full_at_each_size(case: KillCase, grounds: Grounds, judge_all: Judge) -> None:
    judge_all(
        each(
            grounds(case), lambda place, number: full(place, FULL_KIB[number]), range(len(FULL_KIB))
        )
    )


def full(place: Place, room_kib: int) -> Result:
    started = time.monotonic()
    place.restore()
    world = place.world
    outer, work = world.folder, world.folder / "work"
    work.mkdir(exist_ok=True)
    argv = [
        *NAMESPACE,
        "sh",
        "-c",
        FULL,
        "sh",
        str(outer),
        str(room_kib),
        str(work),
        place.case.full_from,
        *world.argv(*place.case.argv),
    ]
    done = subprocess.run(
        argv,
        env=world.env | {"PATH": f"{world.env['PATH']}:/usr/sbin:/sbin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        return Result(
            place.case.name,
            "disk full",
            f"{room_kib} KiB",
            (f"the namespace: {done.stderr}",),
            time.monotonic() - started,
        )
    output = outer / "tmp"
    # Which code it is depends on who met the full disk first: git and build backends do not always
    # say what they met.
    complaints = failed_rightly(
        Ended(int((output / "code").read_text()), "", (output / "err").read_text()), (0, *CODES)
    )
    complaints += complete(place)
    return Result(
        place.case.name,
        "disk full",
        f"{room_kib} KiB",
        tuple(complaints),
        time.monotonic() - started,
    )


@BY_CASE
@pytest.mark.parametrize(
    "part", ["clone", "clone/vendor", "clone/.vllm", "clone/.workspace", "cache"]
)
def test_read_only_mount(case: KillCase, part: str, grounds: Grounds, judge_all: Judge) -> None:
    place = grounds(case)[0]
    place.restore()
    if not (place.world.folder / part).exists():
        return
    started = time.monotonic()
    through = [*NAMESPACE, "sh", "-c", READ_ONLY, "sh", str(place.world.folder / part)]
    ended = place.world.run(
        *case.argv, through=through, env={"PATH": f"{place.world.env['PATH']}:/usr/sbin:/sbin"}
    )
    # A build that meets such a folder fails as a build; its first error line then says why.
    complaints = failed_rightly(ended, (0, 3, 6, 7))
    complaints += complete(place)
    judge_all(
        [Result(case.name, "read-only mount", part, tuple(complaints), time.monotonic() - started)]
    )


@BY_CASE
@pytest.mark.parametrize(
    "shift_s", [DECADE_S * 3, -DECADE_S * 3], ids=["files-from-the-future", "files-from-the-past"]
)
def test_clock_that_jumped(
    case: KillCase, shift_s: int, grounds: Grounds, judge_all: Judge
) -> None:
    place = grounds(case)[0]

    def jump() -> Kill:
        when = time.time() + shift_s
        for top in ("clone", "cache"):
            for folder, _, names in os.walk(place.world.folder / top):
                for name in names:
                    os.utime(Path(folder, name), (when, when), follow_symlinks=False)
        return Kill(f"all files {shift_s / DECADE_S:+.0f} decades", None, 0.0)

    judge_all([judged(place, "clock jump", jump)])
