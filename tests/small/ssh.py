"""Executables that stand in for ssh, scp and ssh-keygen: a host is a folder, which is its home.

A host that is not a folder fails as OpenSSH 9.6 does, by its name: `denied`, `changed`, `unknown`,
`refused`, and `slow`, which sleeps. scripts/inv of a clone there is this interpreter, without the
clone's own tool environment. The file `environment` there is the login's own.
"""

import os
import sys
from pathlib import Path

_COMMON = r"""#!/bin/sh
homes=@HOMES@
failed() {
    case $1 in
    denied) echo "me@denied: Permission denied (publickey,password)." >&2 ;;
    changed)
        echo "@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @" >&2
        echo "Offending ED25519 key in /home/me/.ssh/known_hosts:3" >&2
        echo "Host key verification failed." >&2 ;;
    unknown)
        echo "No ED25519 host key is known for unknown and you have requested strict checking." >&2
        echo "Host key verification failed." >&2 ;;
    slow) exec sleep 60 ;;
    *) echo "ssh: connect to host $1 port 22: Connection refused" >&2 ;;
    esac
    exit 255
}
echo "$0 $*" >> "$homes/log"
while :; do case $1 in -*) shift ;; *) break ;; esac; done
"""
_SSH = r"""host=${1#*@}
[ -d "$homes/$host" ] || failed "$host"
typed=$(printf '%s\n' "$2" | sed 's#\./scripts/inv#@PYTHON@ -Es -B tasks.py#')
cd "$homes/$host" && HOME=$PWD
[ ! -e environment ] || . ./environment
exec sh -c "$typed"
"""
_SCP = """host=${2%%:*}; host=${host#*@}; path=${2#*:}
[ -d "$homes/$host" ] || failed "$host"
cd "$homes/$host" && exec cp -- "$1" "$path"
"""


def stand_in(programs: Path, homes: Path) -> dict[str, str]:
    """Write ssh and scp into `programs`, and return an environment that finds them first."""
    programs.mkdir(parents=True, exist_ok=True)
    for name, text in (("ssh", _SSH), ("scp", _SCP)):
        path = programs / name
        text = (_COMMON + text).replace("@HOMES@", str(homes)).replace("@PYTHON@", sys.executable)
        path.write_text(text)
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
