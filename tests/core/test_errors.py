"""Exit codes: one class each, none twice, none that a shell or Python uses for something else."""

from workspace.core import errors


def test_every_error_class_is_in_the_table_with_a_code_of_its_own() -> None:
    there = {
        thing
        for thing in vars(errors).values()
        if isinstance(thing, type) and issubclass(thing, errors.WorkspaceError)
    }
    codes = [error.exit_code for error in errors.ERRORS]
    assert there == set(errors.ERRORS)
    assert codes == list(range(1, 14))
    assert len({error.meaning for error in errors.ERRORS}) == len(errors.ERRORS)


def test_an_error_carries_its_sentence_and_the_way_on() -> None:
    error = errors.SourceError("observed a, expected b", hint="do c", details=("d",))
    assert (str(error), error.message, error.hint, error.details) == (
        "observed a, expected b",
        "observed a, expected b",
        "do c",
        ("d",),
    )
