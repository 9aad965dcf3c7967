"""The table of coverage lists what the pinned tree offers, and nothing else.

SMOKE_PROOF_CLONE as in test_defects.py.
"""

from tests.proof.smoke import test_defects
from workspace.checks import registry
from workspace.core.paths import Layout

built = test_defects.built


def test_table_and_tree_have_the_same_fields_and_switches(built: Layout) -> None:
    files = [*registry.FIELDS.values()]
    files += [f"vllm/config/{path.name}" for path in built.vllm.glob("vllm/config/*.py")]
    found = {
        name for path in files for name in registry.offered(path, (built.vllm / path).read_text())
    }
    table = {
        (part, name)
        for part, names in registry.coverage().items()
        for name in names
        if part not in ("forms", "keys")
    }
    assert sorted(found - table) == []
    assert sorted(table - found) == []
