"""Every verb that is killed. A later verb adds its cases to this."""

from tests.proof.kill.builds import BUILDS
from tests.proof.kill.cases import BOOTSTRAP, KillCase
from tests.proof.kill.moves import MOVES

VERBS: tuple[KillCase, ...] = (*BOOTSTRAP, *MOVES, *BUILDS)
