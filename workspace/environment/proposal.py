"""`inv env.init`: what this machine suggests for .env, beside what stands there. What is new is written; what differs stays unless it is asked for.

MAX_JOBS is not among it: what runs is told one from memory anyway (Settings.child_environment), and in .env it would also bind builds, which are
admitted by memory, compiler by compiler.
"""

from collections.abc import Mapping

from workspace.core import settings as settings_module
from workspace.core.console import Console
from workspace.core.errors import ToolchainError
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.environment import dotenv, triton
from workspace.environment.assemblers import attempt, judge, of_triton
from workspace.environment.doctor_case import Case
from workspace.environment.doctor_ptxas import capability_of

NAME_WIDTH = 28
WHY = "by inv env.init, from what this machine has"


def run(layout: Layout, settings: Settings, *, console: Console, replace: bool = False) -> None:
    """Write or complete .env and print the difference. `replace` changes lines that differ too; the old one stays beside it as a remark.

    Raises ToolchainError where .env cannot be written.
    """
    case = Case(layout, settings, device=None, kernels=settings.text("KERNELS"))
    if not layout.dotenv.exists():
        said = dotenv.write(layout, settings, device=case.device)
        console.row("done", ".env", f"written for this machine: {said}")
    written = settings_module.written(layout)
    wanted = propose(case)
    new = {name: text for name, text in wanted.items() if name not in written}
    differing = {name: text for name, text in wanted.items() if name in written and written[name] != text}
    for name, text in wanted.items():
        if name in differing and not replace:
            console.row("kept", f"{name:<{NAME_WIDTH}}", f"{written[name]}; this machine suggests {text}: ./scripts/inv env.init --replace")
        elif name not in new and name not in differing:
            console.row("ok", f"{name:<{NAME_WIDTH}}", text)
    changes: Mapping[str, str | None] = new | (differing if replace else {})
    if changes:
        try:
            difference = dotenv.change(layout, changes, why=WHY)
        except OSError as exc:
            raise ToolchainError(f".env cannot be written: {exc.strerror}", hint=f"ls -ld {layout.dotenv} {layout.root}") from exc
        for line in difference:
            console.data(settings.masked(line))
    else:
        console.row("skipped", ".env", "nothing to write")


def propose(case: Case) -> dict[str, str]:
    """Decide the lines for this machine: what bootstrap writes, and a ptxas where Triton's own does not know the GPU and the toolkit's does."""
    lines = dotenv.suggest(case.host(), case.toolkit(), device=case.device)
    return lines | (_assembler(case) if case.device == "cuda" else {})


def _assembler(case: Case) -> dict[str, str]:
    there, found = triton.observe(case.layout), case.toolkit()
    if there is None or there.bin is None or found is None:
        return {}
    capability, program = capability_of(case), found.home / "bin" / "ptxas"
    one = next(one for one in of_triton(there.bin, there.version, capability) if one.is_used)
    if judge(one, case.settings, capability, case.ask).is_good:
        return {}
    trial = attempt(program, capability, case.ask)
    return {one.variable: str(program)} if trial and not trial.complaint else {}
