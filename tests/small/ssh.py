"""Executables that stand in for ssh, scp and ssh-keygen: a host is a folder, which is its home.

A host that is not a folder fails as OpenSSH 9.6 does, by its name: `denied`, `changed`, `unknown`,
`refused`, and `slow`, which sleeps.
"""

import os
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
_SSH = """host=${1#*@}
[ -d "$homes/$host" ] || failed "$host"
cd "$homes/$host" && HOME=$PWD exec sh -c "$2"
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
        path.write_text(_COMMON.replace("@HOMES@", str(homes)) + text)
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
