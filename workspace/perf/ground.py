"""Where rows are measured: this clone, its tools, and a folder for whatever a row has to make."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from workspace.core.errors import BuildError, ToolchainError
from workspace.core.layout import Layout
from workspace.core.settings import KNOWN, Settings
from workspace.perf.measure import Command

if TYPE_CHECKING:
    from workspace.build.plan import Observation

_BARE = """from invoke import task


@task
def nothing(_):
    \"\"\"Do nothing.\"\"\"
"""


class Ground:
    """One run's surroundings. `folder` is empty at first, on the file system of the clone, and vanishes afterwards."""

    def __init__(self, layout: Layout, settings: Settings, folder: Path) -> None:
        self.layout = layout
        self.settings = settings
        self.folder = folder

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        """What a verb of ours would see in the user's shell, and what the bare tool sees as well."""
        chosen = {name: self.settings.text(name) for name in KNOWN if self.settings.source(name) in ("shell", "flag")}
        return self.settings.child_environment("plain", chosen)

    @functools.cached_property
    def python(self) -> Path:
        """The Python of the tool environment. Raises ToolchainError where that was not made."""
        found = self.layout.tools / "bin" / "python"
        if not found.exists():
            raise ToolchainError(f"{self.layout.relative(self.layout.tools)} is not there", hint="./scripts/inv --list   # makes it")
        return found

    @functools.cached_property
    def built(self) -> "Observation":
        """What stands in this clone once bootstrap has nothing left to do. Raises BuildError where it has."""
        from workspace.build import bootstrap, plan

        observed = plan.observe(self.layout, self.settings)
        due = [f"{stage.steps[0][0]}: {stage.reason}" for stage in bootstrap.stages_of(self.layout, self.settings, observed) if stage.is_due]
        if due:
            raise BuildError(f"the tree is not built, or not as it should be ({'; '.join(due)})", hint="./scripts/inv bootstrap")
        return observed

    def inv(self, *words: str, statuses: tuple[int, ...] = (0,)) -> Command:
        """What scripts/inv ends in."""
        return self.tool("-Es", self.layout.root / "tasks.py", *words, statuses=statuses)

    def tool(self, *words: str | Path, statuses: tuple[int, ...] = (0,)) -> Command:
        return Command((self.python, *words), self.layout.root, self.environment, statuses=statuses)

    def bare(self) -> Command:
        """Invoke itself, from the same environment, on a file with one empty task."""
        folder = self.folder / "bare"
        folder.mkdir(exist_ok=True)
        (folder / "tasks.py").write_text(_BARE, encoding="utf-8")
        return Command((self.python, "-Es", "-m", "invoke", "--list"), folder, self.environment)
