"""What git may depend on: the variables and the configuration under which it looks, writes and talks to remotes.

Values only; git.py hands them over.
"""

from collections.abc import Mapping

IDENTITY = ("vLLM workspace", "workspace@invalid")
# A repository with missing blobs would fetch them in the middle of a look: git 2.44 has a switch, older ones are refused every transport.
OFFLINE = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none", "GIT_TERMINAL_PROMPT": "0"}
LOOKING = OFFLINE | {"GIT_OPTIONAL_LOCKS": "0", "GIT_ATTR_NOSYSTEM": "1"}
# Content is compared as it was written, so without the user's conversions; what they ignore stays ignored, and whom they trust trusted.
_LOOKING = (
    *("core.attributesFile=/dev/null", "core.autocrlf=false", "core.eol=lf", "core.safecrlf=false"),
    *("core.sparseCheckout=false", "core.fsmonitor=false"),
    # A file that was replaced by one of its size and time is seen by its inode.
    *("core.trustctime=true", "core.checkStat=default"),
)
LOOKING_FLAGS = ("--literal-pathspecs", *(word for setting in _LOOKING for word in ("-c", setting)))
# A remote that sends less than this for a minute is gone (git-config(1), http.lowSpeedLimit).
PATIENCE = {"GIT_HTTP_LOW_SPEED_LIMIT": "1000", "GIT_HTTP_LOW_SPEED_TIME": "60"}
# What content, commits and speed must not depend on, whoever configured it: user, system or the checkout itself.
HARDENED: Mapping[str, str] = {
    "core.hooksPath": "/dev/null",
    "core.attributesFile": "/dev/null",
    "core.excludesFile": "/dev/null",
    "core.autocrlf": "false",
    "core.eol": "lf",
    "core.safecrlf": "false",
    "core.fsmonitor": "false",
    "core.trustctime": "true",
    "core.checkStat": "default",
    # Or every file that is written would from then on count as unchanged.
    "core.ignoreStat": "false",
    "core.sparseCheckout": "false",
    "commit.gpgSign": "false",
    "tag.gpgSign": "false",
    "i18n.commitEncoding": "UTF-8",
    "rerere.enabled": "false",
    "submodule.recurse": "false",
    "gc.auto": "0",
    "maintenance.auto": "false",
    "advice.detachedHead": "false",
    # By default loose objects and the index are not: after a power cut a reference would name an empty file.
    "core.fsync": "all",
}


def environment(*, offline: bool = True) -> dict[str, str]:
    """Return the variables under which git writes the same bytes for everyone.

    Offline, the user's and the system's configuration are left out altogether; otherwise they stay, for the sake of remotes,
    and only `HARDENED` overrides them.
    """
    config = dict(HARDENED)
    variables = {"GIT_CONFIG_PARAMETERS": "", "GIT_ATTR_NOSYSTEM": "1", "GIT_EDITOR": "true", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    for role in ("AUTHOR", "COMMITTER"):
        variables |= {f"GIT_{role}_NAME": IDENTITY[0], f"GIT_{role}_EMAIL": IDENTITY[1]}
    if offline:
        # The user's safe.directory is left out with the rest; Git looks first under that very configuration.
        config["safe.directory"] = "*"
        variables |= OFFLINE | {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}
    variables["GIT_CONFIG_COUNT"] = str(len(config))
    for number, (key, value) in enumerate(config.items()):
        variables |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return variables
