"""The only package that calls git: flags, environment variables and GitPython stay in here."""

from workspace.repo.git.am import AM_BY_HAND, Applied
from workspace.repo.git.command import Command, OnLine, executable
from workspace.repo.git.remotes import advertised
from workspace.repo.git.repository import Git, Gitlink, Place, Remote

__all__ = [
    "AM_BY_HAND",
    "Applied",
    "Command",
    "Git",
    "Gitlink",
    "OnLine",
    "Place",
    "Remote",
    "advertised",
    "executable",
]
