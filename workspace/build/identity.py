"""Who and where this is: what a report must not tell, gathered for core/redaction.

It looks at the account, the shell, files and mail headers, and reads files that may be damaged. No name server is asked: it could hang.
"""

import contextlib
import getpass
import os
import platform
import pwd
import re
from collections.abc import Mapping
from email import message_from_bytes
from email.policy import default as mail
from email.utils import getaddresses
from pathlib import Path

from workspace.core.files import read_regular
from workspace.core.layout import PROJECTS, Layout
from workspace.core.redaction import Private
from workspace.core.settings import Settings, is_secret
from workspace.environment import interpreter

_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=[ \t]*(.*?)\s*$", re.MULTILINE)
# A shell knows more keys than there are settings: an access key, a cookie, a personal access token.
_KEY_NAME = re.compile(r"(^|_)(KEY|PAT|AUTH|COOKIE|PASS|PASSPHRASE|PWD)(_|$)")
_LOGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([^\s/\"'@:]*):?([^\s/\"']*)@")
_URL_HOST = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://(?:[^\s/\"']*@)?([A-Za-z0-9_.-]+)|\b[\w.+-]+@([A-Za-z0-9.-]+):")
_MAIL_LINE = re.compile(rb"^(?:From|Author|Commit|Cc|[A-Za-z-]+-by): .*$", re.MULTILINE)
_IDENTITY = re.compile(r"^\s*(?:name|email|user)\s*=\s*(.+?)\s*$", re.MULTILINE)
TAIL_BYTES = 2 << 20
_ADDRESS_LIKE = re.compile(r"\d+(\.\d+){3}")
# Places that tell nothing.
_PUBLIC_FOLDERS = frozenset(("", "/tmp", "/var/tmp", "/dev/shm", "/run", "/home", "/usr"))


def private(layout: Layout, settings: Settings) -> Private:
    """Say what is private on this machine and in this clone, as far as anything here knows it."""
    shell = settings.shell
    home = Path(shell.get("HOME") or "/")
    files = [home / ".gitconfig", layout.root / ".git" / "config", layout.root / ".gitmodules", layout.vllm / ".git" / "config", layout.dotenv, layout.pins]
    configured = "\n".join([*shell.values(), *(read(path).decode("utf-8", "replace") for path in files)])
    logins = _LOGIN.findall(configured)
    account = _account()
    people = {*account[1], *_identities(layout, read(home / ".gitconfig") + b"\n" + read(layout.root / ".git" / "config"))}
    keys = {text for name, text in shell.items() if _KEY_NAME.search(name) and len(text) >= 8 and not text.startswith("/")}
    secrets = {
        *settings.secrets,
        *keys,
        *(value for name, value in assignments(layout.dotenv) if is_secret(name)),
        *(password or user for user, password in logins),
    }
    users = {*account[0], home.name, *(user for user, password in logins if password), *(shell.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER"))}
    homes = {str(home), str(home.resolve()), *account[2]}
    clones = {str(layout.root), str(layout.root.resolve()), *([shell["PWD"]] if "PWD" in shell and Path(shell["PWD"]).resolve() == layout.root else [])}
    scratch = {shell.get(name, "") for name in ("TMPDIR", "TMP", "TEMP", "XDG_RUNTIME_DIR")}
    places = [(place, label) for found, label in ((clones, "<clone>"), (homes, "~"), (scratch, "<tmp>")) for place in found]
    places.append((str(settings.cache), "<cache>"))
    # A host of one word, such as `mirror`, is a word elsewhere; in addresses it is masked by its place.
    hosts = {*_hosts(shell), *(name for pair in _URL_HOST.findall(configured) for name in pair if "." in name and not _ADDRESS_LIKE.fullmatch(name))}
    versions = frozenset(text for text in interpreter.installed(layout).values() if _ADDRESS_LIKE.fullmatch(text))
    return Private(
        secrets=tuple(sorted(filter(None, secrets))),
        users=tuple(sorted(filter(None, users))),
        hosts=tuple(sorted(filter(None, hosts))),
        people=tuple(sorted(people)),
        places=tuple(sorted((place, label) for place, label in places if place.rstrip("/") not in _PUBLIC_FOLDERS)),
        versions=versions,
    )


def _account() -> tuple[set[str], set[str], set[str]]:
    """Login names, full names and homes that the system has for this user."""
    users, people, homes = set[str](), set[str](), set[str]()
    with contextlib.suppress(OSError, KeyError):
        users.add(getpass.getuser())
    with contextlib.suppress(KeyError):
        entry = pwd.getpwuid(os.getuid())
        users.add(entry.pw_name)
        people.add(entry.pw_gecos.split(",")[0])
        homes |= {entry.pw_dir, str(Path(entry.pw_dir).resolve())}
    return users, {name for name in people if name.strip()}, homes


def _identities(layout: Layout, config: bytes) -> set[str]:
    """Names and addresses of git's user and of everybody in the patches' headers, but for reserved addresses."""
    found = set(_IDENTITY.findall(config.decode("utf-8", "replace")))
    for project in PROJECTS:
        for patch in layout.patches(project).glob("*.patch"):
            headers = [line.decode("utf-8", "replace").partition(": ")[2] for line in _MAIL_LINE.findall(read(patch))]
            # The parser stumbles over some headers that are not of their form.
            with contextlib.suppress(ValueError, TypeError, AttributeError, LookupError):
                headers.append(str(message_from_bytes(read(patch), policy=mail).get("From", "")))
            for name, address in getaddresses(headers):
                if not address.endswith((".invalid", "@invalid")):
                    found |= {name, address}
    return {name for name in found if name.strip()}


def _hosts(shell: Mapping[str, str]) -> set[str]:
    """This machine's names: of the kernel, the shell and /etc/hosts, with the domains that the resolver appends."""
    node = platform.node()
    names = {node, node.split(".")[0], *(shell.get(name, "") for name in ("HOSTNAME", "HOST", "CONTAINER_NAME"))}
    for line in read(Path("/etc/hosts")).decode("utf-8", "replace").splitlines():
        aliases = line.partition("#")[0].split()[1:]
        if node in aliases or names & set(aliases):
            names |= set(aliases)
    names |= {part for name in names for part in (name.split(".")[0], name.partition(".")[2]) if "." in name and part}
    for line in read(Path("/etc/resolv.conf")).decode("utf-8", "replace").splitlines():
        if line.startswith(("search", "domain")):
            names |= {domain for domain in line.split()[1:] if "." in domain}
    return names


def assignments(path: Path) -> list[tuple[str, str]]:
    """Names and values of a dotenv file as far as they can be told, whatever else is wrong with it."""
    text = read(path).decode("utf-8-sig", "replace")
    return [(name, value.strip("\"'")) for name, value in _ASSIGNMENT.findall(text)]


def read(path: Path) -> bytes:
    """Return a small file, nothing where it cannot be read."""
    try:
        return read_regular(path)
    except OSError:
        return b""


def tail(path: Path) -> str:
    """Return the end of a file, from the beginning of a line: half a token would not be known for one. Or why it cannot be read."""
    if path.exists() and not path.is_file():
        return "error: it cannot be read: not a regular file\n"
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            content = file.read(TAIL_BYTES)
    except OSError as exc:
        return f"error: it cannot be read: {exc.strerror}\n"
    if size <= TAIL_BYTES:
        return content.decode("utf-8", "replace")
    return f"... {size - TAIL_BYTES} bytes before this are left out\n" + content.partition(b"\n")[2].decode("utf-8", "replace")
