"""Verbs of the pin: look, forecast, bump, back."""

from invoke.context import Context
from invoke.tasks import task

from workspace import door
from workspace.core import layout
from workspace.verbs.words import JSON, WAIT


@task(name="show", default=True, help={"json": JSON, "offline": "leave out what asks the network"})
def pin_show(_: Context, json: bool = False, offline: bool = False) -> None:
    """Show the pin, what is newer, what to return to."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import show

    show.show(here, settings, console=door.console(), as_json=json, offline=offline)


@task(name="forecast", positional=["ref"], help={"ref": "a tag of vLLM, such as v0.33.0", "json": JSON})
def pin_forecast(_: Context, ref: str, json: bool = False) -> None:
    """Say what a move of the pin would break; touch nothing."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import forecast

    forecast.run(here, settings, ref, console=door.console(), as_json=json)


@task(
    name="bump",
    positional=["ref"],
    help={"ref": "a tag of vLLM, or the word triton", "young": "take a release that is younger than PIN_MIN_AGE_DAYS", "wait": WAIT},
)
def pin_bump(_: Context, ref: str, young: bool = False, wait: bool = False) -> None:
    """Move the pin beside the working tree; promote if green."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import bump

    bump.run(here, settings, ref, console=door.console(), young=young, wait=wait)


@task(name="back", help={"good": "a name that inv pin shows; without it the last one", "wait": WAIT})
def pin_back(_: Context, good: str = "", wait: bool = False) -> None:
    """Return to the last good pin, environment included."""
    here = layout.here()
    settings = door.load_settings(here)
    from workspace.pin import back

    back.run(here, settings, good or None, console=door.console(), wait=wait)
