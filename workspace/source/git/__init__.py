"""The one door to git: every flag, every environment variable and GitPython itself stay in this package."""

from workspace.source.git.am import AM_BY_HAND, Applied
from workspace.source.git.command import Command, OnLine, executable
from workspace.source.git.remote import advertised, without_user
from workspace.source.git.repository import Git, Gitlink, Place

__all__ = ["AM_BY_HAND", "Applied", "Command", "Git", "Gitlink", "OnLine", "Place", "advertised", "executable", "without_user"]
