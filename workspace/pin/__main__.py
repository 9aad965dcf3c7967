"""`python -m workspace.pin`: record the present state as good where the smoke has just passed on it; run by `nox -s smoke` after the judgement."""

import sys

from workspace import door
from workspace.core import layout as layouts


def main() -> int:
    layout = layouts.here()

    def work() -> None:
        settings = door.load_settings(layout)
        from workspace.build import plan
        from workspace.pin import good

        good.record(layout, settings, plan.observe(layout, settings), console=door.console())

    return door.run(work)


if __name__ == "__main__":
    sys.exit(main())
