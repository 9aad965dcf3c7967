"""An environment that was renamed with the tree beside it: what names the tree's old place is made to name the new one.

The environment itself is made relocatable (uv venv --relocatable); only an editable install holds a path, of the tree it leads to.
"""

import base64
import csv
import hashlib
import io
from pathlib import Path
from urllib.parse import quote

from workspace.core.files import read_regular, write_atomic
from workspace.core.layout import Layout
from workspace.environment import interpreter

# The files of an editable install that hold paths (its .pth or finder, direct_url.json) have some hundred bytes.
LARGEST_BYTES = 1 << 20


def retarget(layout: Layout, package: str, *, old: Path, new: Path) -> tuple[str, ...]:
    """Let the editable install of `package` in `.vllm` lead to the tree `new` instead of `old`; return the files that were written.

    Done twice equals done once, also where the first was killed between a file and the list of files.
    """
    written = []
    for site in interpreter.site_packages(layout):
        for info in site.glob(f"{package}-*.dist-info"):
            rows = [row for row in csv.reader(io.StringIO(read_regular(info / "RECORD").decode(), newline="")) if row]
            for row in rows:
                written += [row[0]] if row[1:] != ["", ""] and _rewrite(site / row[0], old, new) else []
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
    """Let the list of files name sizes and hashes as they are now: a file that is shorter than listed counts as half."""
    for row in rows:
        path = site / row[0]
        if len(row) == 3 and row[2] and path.is_file() and path.stat().st_size <= LARGEST_BYTES:
            content = read_regular(path)
            row[1] = f"sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b'=').decode()}"
            row[2] = str(len(content))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    if text.getvalue().encode() != read_regular(record):
        write_atomic(record, text.getvalue().encode())
