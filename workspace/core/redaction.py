"""Masking of private data: secrets, users, hosts, paths and addresses.

Pure: text in, text out. The caller names what is known to be private (`Private`); other private
data is known by its form. A secret is known as it is written and as JSON writes it; what else goes
into a report is the caller's choice. Masking never raises.
"""

import ipaddress
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from workspace.core.known_settings import SECRET_NOUNS, SECRET_PARTS, SECRET_TERM

MASK = "****"
SHORTEST_SECRET = 4
SHORTEST_NAME = 2
# Names that say nothing about anybody; as words they are what a report is about, and some are
# labels of ours.
PUBLIC_NAME = re.compile(
    r"root|users?|hosts?|vm|clone|email|home|tmp|cache|masked|ip|mac|uuid|private|key|admin"
    r"|nobody|daemon|guest|runner|git|oauth2|x-access-token|__token__"
    r"|localhost|localdomain|local|ubuntu|debian|linux|container|docker|vscode|python3?|torch|vllm"
    r"|triton|cuda|nvidia|gpu|cpu|build|test|dev|workspace|ip6-\w+",
    re.IGNORECASE,
)
# What stands for a secret where none is set.
PUBLIC_VALUE = re.compile(
    r"(?:none|null|true|false|empty|set|unset|unknown|missing|present|absent|test|yes|no|not)(?:"
    r" \([a-z. ]+\))?",
    re.IGNORECASE,
)
PUBLIC_HOSTS = (
    "github.com",
    "githubusercontent.com",
    "huggingface.co",
    "pytorch.org",
    "vllm.ai",
    "python.org",
    "docs.nvidia.com",
    "developer.nvidia.com",
)
RESERVED_HOSTS = ("invalid", "example", "localhost")

# Where a word may begin and end: not inside another one, but after the letter of an escape such as
# \n, which only looks like one.
_ESCAPE = r"(?<=\\[abefnrtv0])"
_BEGIN = rf"(?:(?<![^\W_])|{_ESCAPE})"
_END = r"(?![^\W_])"
# Colours, also as JSON, C and a shell write them.
_TERMINAL = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~])?|\\+(?:x1b|u001b|033|e)\[[0-9;]*[A-Za-z]", re.IGNORECASE
)
_KEY_BLOCK = re.compile(
    r"-----BEGIN[A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----(?:.*?-----END[A-Z0-9 ]*PRIVATE KEY[A-Z"
    r" ]*-----|[\sA-Za-z0-9+/=\\:,-]*)",
    re.DOTALL,
)
# The rest of a key whose beginning was cut off.
_KEY_END = re.compile(
    r"(?<![A-Za-z0-9+/=])(?:[A-Za-z0-9+/=]{16,}\s+){0,200}[A-Za-z0-9+/=]*\s*-----END[A-Z0-9"
    r" ]*PRIVATE KEY[A-Z ]*-----"
)

_HAS_SECRET_TERM = re.compile(
    rf"{SECRET_PARTS}|[_-]{SECRET_NOUNS}|key|bearer|authorization|cookie", re.IGNORECASE
)
_PAIR = re.compile(
    rf"(?P<head>{SECRET_TERM}"
    r"[\w.-]{0,40}\\*[\"']?[ \t]*(?:=>|=(?!=)|:)[ \t]*\[?[ \t]*)"
    r"(?P<value>(?P<escaped>(?P<slashes>\\+)[\"']).*?(?:(?<!\\)(?P=slashes)[\"']|$)|\"(?:[^\"\\]"
    r"|\\.)*\"?|'(?:[^'\\]|\\.)*'?|[^\s\"'{(\[][^\s\"']*)",
    re.IGNORECASE,
)
_FLAG = re.compile(rf"(--[a-z-]{{0,40}}?{SECRET_TERM}[a-z-]{{0,40}}[ \t]+)(?!-)\S+", re.IGNORECASE)
_HEADER = re.compile(
    r"((?:authorization|(?:set-)?cookie)\\*[\"']?[ \t]*[:=][ \t]*\\*[\"']?)[^\"'\\]*", re.IGNORECASE
)
# A line of ~/.netrc.
_NETRC = re.compile(
    r"(\b(?:login|machine)[ \t]+\S+[ \t]+(?:account[ \t]+\S+[ \t]+)?password[ \t]+"
    r"|^[ \t]*password[ \t]+(?=\S+$))\S+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(bearer[ \t]+)[\w.~+/=-]{6,}", re.IGNORECASE)
# "first token: seconds": the name of a figure, and a word that no token is.
_PROSE = re.compile(r"[a-z] tokens?: [a-z]{2,12}[,;.)]?")
_NUMBER = re.compile(r"[\[(]?-?[\d.,]{0,9}[\])]?")
# Tokens that bear their maker's mark: Hugging Face, GitHub, GitLab, OpenAI and its like, Slack,
# NVIDIA, AWS, Google, npm, JSON web tokens.
_TOKEN = re.compile(
    _BEGIN + r"(?:hf_(?=[A-Za-z0-9]*[0-9A-Z])[A-Za-z0-9]{8,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|glpat-[\w-]{12,}|sk-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{8,}|nvapi-[\w-]{12,}|(?:AKIA|ASIA)[0-9A-Z]{12,}|AIza[\w-]{20,}"
    r"|npm_[A-Za-z0-9]{20,}|eyJ[\w-]{8,}\.[\w-]{8,}\.?[\w-]*)"
)
_URL_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20}:\\*/\\*/)[^\s/\"']*@")
_URL_HOST = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]{0,20}:\\*/\\*/(?:\*{4}@)?)([A-Za-z0-9][A-Za-z0-9_.-]*)"
)
_REMOTE = re.compile(
    rf"(?:(?<![\w.+/-])|{_ESCAPE})" r"[\w.+-]{1,64}@([A-Za-z0-9][A-Za-z0-9.-]*)(?=:[^\s:])"
)
_EMAIL = re.compile(r"[\w.+-]{1,64}@((?:[^\W_](?:[\w-]*[^\W_])?\.)+[^\W\d_]{2,})")
_OTHER_HOME = re.compile(r"(/(?:home|Users)\\*/)[^/\s\"':;,<>~\\$*{}()\[\]%]+")
_MAC = re.compile(
    rf"(?:(?<![\w:.-])|{_ESCAPE})"
    r"[0-9A-Fa-f]{2}([:-])(?:[0-9A-Fa-f]{2}\1){4}[0-9A-Fa-f]{2}(?![\w:-])"
)
_IPV6 = re.compile(
    rf"(?:(?<![\w:.])|{_ESCAPE})" r"(?=[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:]{2,39}(?![\w:])"
)
_IPV4 = re.compile(
    r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d|\.?(?:post|dev|rc|[ab])\d|\+|-(?:py|cp)\d)"
)
# Before or after four numbers that are a version: nvidia-curand==10.4.0.35, cudnn-9.1.0.70-py3,
# libx.so.1.2.3.4.
_BEFORE_VERSION = re.compile(
    r"(?:[=<>~!]=|[A-Za-z][\w.]*(?<!ip)[-_]|(?<!\\)[A-Za-z+]|\.so\.|versions?\W{0,3})\Z",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Private:
    """Data known to be private. `places` are pairs of a path and its replacement.

    `versions` look like addresses and are not.
    """

    secrets: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    places: tuple[tuple[str, str], ...] = ()
    versions: frozenset[str] = frozenset()


class Redactor:
    """The masking rules of one machine, computed once."""

    def __init__(self, private: Private) -> None:
        secrets = {
            form
            for secret in private.secrets
            for line in (secret, *secret.splitlines())
            for form in (line, json.dumps(line)[1:-1], json.dumps(line, ensure_ascii=False)[1:-1])
            if _is_secret(form)
        }
        self._secrets = sorted(secrets, key=lambda form: (-len(form), form))
        places = {(path.rstrip("/"), label) for path, label in private.places}
        self._places = [
            (path, label, _place(path))
            for path, label in sorted(places, key=lambda place: (-len(place[0]), place))
            if len(path) > 1
        ]
        self._hosts = _names(
            (host for host in private.hosts if not _is_public(host)),
            extended_by=r"(?:(?:\.[A-Za-z0-9-]+){2,6})?",
        )
        self._users = _names(private.users)
        self._versions = private.versions

    def text(self, text: str) -> str:
        """Return the text without private data. Line ends stay, colours are removed."""
        masked: dict[str, str] = {}
        lines = self._blocks(_TERMINAL.sub("", text)).split("\n")
        for line in lines:
            if line not in masked:
                masked[line] = self._line(line)
        return "\n".join(masked[line] for line in lines)

    def content(self, content: bytes) -> bytes | None:
        """Return a file's content without private data, None where it is not text."""
        if b"\0" in content:
            return None
        return self.text(content.decode("utf-8", "replace")).encode("utf-8", "replace")

    def name(self, name: str) -> str:
        """Return a relative file name without private data, in portable letters."""
        masked = self.text(name).replace("<", "").replace(">", "")
        parts = (re.sub(r"[^\w.+-]+", "-", part).strip("-") for part in masked.split("/"))
        return "/".join(part for part in parts if part not in ("", ".", "..")) or "file"

    def _blocks(self, text: str) -> str:
        """Mask secrets and keys that span several lines."""
        for secret in self._secrets:
            if "\n" in secret:
                text = text.replace(secret, MASK)
        if "PRIVATE KEY" in text:
            text = _KEY_END.sub("<private key>", _KEY_BLOCK.sub("<private key>", text))
        return text

    def _line(self, line: str) -> str:
        for secret in self._secrets:
            if secret in line:
                line = line.replace(secret, MASK)
        for path, label, pattern in self._places:
            if path in line:
                line = pattern.sub(label, line)
        line = without_secrets(line)
        if ":" in line and "/" in line:
            line = _URL_HOST.sub(_url_host, line)
        if "@" in line:
            line = _EMAIL.sub(
                lambda match: match[0] if _is_reserved(match[1]) else "<email>",
                _REMOTE.sub(_remote, line),
            )
        for names, label in ((self._hosts, "<host>"), (self._users, "<user>")):
            if names is not None:
                line = names.sub(label, line)
        return self._addresses(_OTHER_HOME.sub(r"\1<user>", line))

    def _addresses(self, line: str) -> str:
        if ":" in line or "-" in line:
            line = _MAC.sub(lambda match: match[0] if not match[0].strip("0:-") else "<mac>", line)
            line = _IPV6.sub(_ipv6, line)
        return _IPV4.sub(self._ipv4, line)

    def _ipv4(self, match: re.Match[str]) -> str:
        try:
            address = ipaddress.IPv4Address(match[0])
        except ValueError:
            return match[0]
        if (
            address.is_loopback
            or address.is_unspecified
            or match[0] in self._versions
            or _BEFORE_VERSION.search(match.string[max(0, match.start() - 40) : match.start()])
        ):
            return match[0]
        return "<ip>"


def without_secrets(line: str) -> str:
    """Mask what has the form of a secret: a user in a URL, the value of a name such as HF_TOKEN,
    and tokens of known services.
    """
    if ":" in line and "/" in line:
        line = _URL_USER.sub(rf"\g<1>{MASK}@", line)
    if _HAS_SECRET_TERM.search(line):
        line = _PAIR.sub(_pair, _masked(line, _HEADER, _BEARER, _FLAG, _NETRC))
    return _TOKEN.sub(MASK, line)


def _masked(line: str, *patterns: re.Pattern[str]) -> str:
    """Mask what follows the first group of each pattern."""
    for pattern in patterns:
        line = pattern.sub(rf"\g<1>{MASK}", line)
    return line


def _is_secret(text: str) -> bool:
    return (
        len(text) >= SHORTEST_SECRET
        and not PUBLIC_VALUE.fullmatch(text)
        and bool(text.strip("* \t\r\n"))
    )


def _names(names: Iterable[str], *, extended_by: str = "") -> re.Pattern[str] | None:
    """Match names as whole words, in any case."""
    private = {
        name for name in names if len(name) >= SHORTEST_NAME and not PUBLIC_NAME.fullmatch(name)
    }
    if not private:
        return None
    parts = sorted(map(re.escape, private), key=lambda part: (-len(part), part))
    return re.compile(_BEGIN + f"(?:{'|'.join(parts)})" + extended_by + _END, re.IGNORECASE)


def _place(path: str) -> re.Pattern[str]:
    if path.count("/") > 1:
        return re.compile(re.escape(path) + _END)
    # /root is no part of /srv/root or /root-ca; -I/root is meant.
    return re.compile(
        r"(?:(?<![\w.-])|(?<=(?<!\w)-[A-Za-z]))" + re.escape(path) + r"(?![\w-]|\.\w)"
    )


def _is_reserved(host: str) -> bool:
    """Return whether the host name belongs to nobody (RFC 6761)."""
    return host.lower().rsplit(".", 1)[-1] in RESERVED_HOSTS


def _is_public(host: str) -> bool:
    return _is_reserved(host) or any(
        host.lower() == known or host.lower().endswith(f".{known}") for known in PUBLIC_HOSTS
    )


def _url_host(match: re.Match[str]) -> str:
    is_kept = _IPV4.fullmatch(match[2]) or match[1].startswith(("hf:", "ext:"))
    return match[0] if is_kept or _is_public(match[2]) else f"{match[1]}<host>"


def _remote(match: re.Match[str]) -> str:
    """Mask `user@host:path`, the form of ssh and git."""
    if match[1].lower().rsplit(".", 1)[-1] == "invalid":
        return match[0]
    return f"<user>@{match[1] if _is_public(match[1]) else '<host>'}"


def _pair(match: re.Match[str]) -> str:
    value, head = match["value"], match["head"]
    is_quoted = bool(match["escaped"]) or value[0] in "\"'"
    bare = value.strip("\\\"'") if is_quoted else value.rstrip(",;)}]")
    is_count = head.lower().startswith("token") and bool(_NUMBER.fullmatch(bare))
    is_prose = bool(_PROSE.fullmatch(match.string[max(0, match.start() - 2) : match.end()]))
    if not bare or PUBLIC_VALUE.fullmatch(bare) or is_count or is_prose or bare == MASK:
        return match[0]
    quotation = (match["escaped"] or value[0]) if is_quoted else ""
    return f"{head}{quotation}{MASK}{quotation}"


def _ipv6(match: re.Match[str]) -> str:
    try:
        address = ipaddress.IPv6Address(match[0])
    except ValueError:
        return match[0]
    # `a::b` is C++ as well.
    is_code = not re.search(r"\d", match[0])
    return match[0] if is_code or address.is_loopback or address.is_unspecified else "<ip>"
