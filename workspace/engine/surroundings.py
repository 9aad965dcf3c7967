"""What surrounds a vLLM that is started here: environment/running.py's variables, with compiled kernels kept by the tree that vendor/vllm holds."""

from collections.abc import Mapping
from typing import Literal

from workspace.core.errors import WorkspaceError
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import jit_caches, running
from workspace.source.git import Git

UNKNOWN_TREE = "none"


def variables(
    layout: Layout,
    settings: Settings,
    *,
    recipe: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
    for_what: Literal["start", "show"] = "start",
) -> dict[str, str]:
    """Return every variable of a vLLM that is about to be started, or shown; starting, the folders of compiled kernels are marked as this stack's.

    `recipe` is a recipe's environment, `more` what the caller insists on. Costs a git start, and a question to the driver where torch is built for CUDA.
    """
    stack = jit_caches.observe(layout, settings, tree=tree(layout))
    if for_what == "start":
        jit_caches.record(layout, stack)
    return running.variables(layout, settings, stack=stack, recipe=recipe, more=more)


def tree(layout: Layout) -> str:
    """The tree OID that vendor/vllm stands on; edits on top do not count, since what compiles them looks at their text itself."""
    if not (layout.vllm / ".git").exists():
        return UNKNOWN_TREE
    try:
        return Git(layout.vllm).tree("HEAD")
    except WorkspaceError:
        # A repository that is broken is what smoke, status and doctor complain of.
        return UNKNOWN_TREE
