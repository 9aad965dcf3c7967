"""`inv pin`: what is pinned, what is under way, what to return to, and what upstream has by now. What cannot be asked is unknown, never an error."""

import datetime
import json
from dataclasses import asdict, dataclass, field

from workspace.core.console import Console, State
from workspace.core.errors import WorkspaceError
from workspace.core.layout import Layout
from workspace.core.settings import Settings
from workspace.pin import back, bump, good, promote, triton, workshop
from workspace.smoke import record as smoke_record
from workspace.source import checkout, patches, pins
from workspace.source.git import Git
from workspace.source.pins import Pin

SHOWN_RELEASES = 3


@dataclass(frozen=True)
class Row:
    """One thing. `facts` are for a program, `text` for a person."""

    state: State
    name: str
    text: str
    facts: dict[str, object] = field(default_factory=dict)


def show(layout: Layout, settings: Settings, *, console: Console, as_json: bool = False, offline: bool = False) -> None:
    """Print one row a thing; as JSON on stdout where a program asks. Raises SettingsError for broken pins only."""
    pinned = pins.load(layout.pins)
    rows = [_pin(layout, pinned.vllm), _stack(layout, pinned.vllm), *_under_way(layout), *_goods(layout)]
    rows += [_releases(settings, pinned.vllm, offline=offline), _triton(layout, settings, pinned.triton, offline=offline)]
    if as_json:
        console.data(json.dumps({"schema": 1, "rows": [asdict(row) for row in rows]}, indent=1))
        return
    for row in rows:
        console.row(row.state, row.name, row.text)


def _pin(layout: Layout, pin: Pin) -> Row:
    facts: dict[str, object] = {"tag": pin.tag, "commit": pin.commit}
    try:
        there = checkout.observe(layout, pin)
    except WorkspaceError as exc:
        return Row("FAIL", "pin", f"{pin.tag} {pin.commit[:12]}; {exc.message}", facts)
    fits = there.kind in (checkout.Kind.GIT, checkout.Kind.RELEASE)
    state: State = "ok" if fits else "missing" if there.kind is checkout.Kind.MISSING else "FAIL"
    return Row(state, "pin", f"{pin.tag} {pin.commit[:12]}; vendor/vllm: {there.detail}", facts | {"kind": there.kind.value})


def _stack(layout: Layout, pin: Pin) -> Row:
    try:
        stack = patches.observe(layout, "vllm", pin, checkout.observe(layout, pin))
    except WorkspaceError as exc:
        return Row("FAIL", "patches", exc.message)
    text = f"{len(stack.names)} {'patch' if len(stack.names) == 1 else 'patches'}, {stack.state.value}"
    state: State = {"applied": "ok", "missing": "missing"}.get(stack.state.value, "warn")  # type: ignore[assignment]
    return Row(state, "patches", text, {"state": stack.state.value, "names": stack.names})


def _under_way(layout: Layout) -> list[Row]:
    rows = []
    if back.is_under_way(layout):
        rows.append(Row("warn", "back", "a return to a good state was interrupted; next: ./scripts/inv pin.back"))
    if not workshop.is_there(layout):
        return rows
    try:
        shop = workshop.find(layout)
        assert shop is not None
        what, following = _stage(shop)
    except WorkspaceError as exc:
        return [*rows, Row("FAIL", "bump", f"{exc.message}; next: {exc.hint}")]
    return [*rows, Row("warn", "bump", f"to {shop.pin.tag}: {what}; next: {following}", {"tag": shop.pin.tag, "commit": shop.pin.commit})]


def _stage(shop: workshop.Workshop) -> tuple[str, str]:
    """What a bump waits for, and the command that leads on."""
    from workspace.source.git import am

    if promote.is_begun(shop):
        return "being promoted", bump.CONTINUE
    tree = Git(shop.layout.vllm)
    there = am.position(tree) if (shop.layout.vllm / ".git").exists() else None
    if there is None:
        is_red = smoke_record.last(shop.layout).get("verdict") == "fail"
        return ("its smoke failed; commit a fix in " + shop.shown if is_red else "interrupted"), bump.CONTINUE
    unmerged = am.unmerged(tree)
    waits = f"patch {there.number} of {there.last} conflicts" + (f" in {', '.join(unmerged[:3])}" if unmerged else "")
    return waits, f"edit and git add in {shop.shown}, then {bump.CONTINUE}"


def _goods(layout: Layout) -> list[Row]:
    found = good.every(layout)
    if not found:
        return [Row("missing", "good", "nothing to return to yet; ./scripts/nox -s smoke records what passes")]
    present = good.current(layout)
    rows = []
    for state in found:
        is_present = state.name == present
        kept = "in use" if is_present else "with its environment" if good.environment(layout, state.name).exists() else "its environment would be made anew"
        facts: dict[str, object] = {"name": state.name, "tag": state.tag, "tree": state.tree, "smoke": state.smoke, "current": is_present}
        rows.append(Row("ok" if is_present else "kept", "good", f"{state.name}, smoke {state.smoke}; {kept}", facts))
    return rows


def _releases(settings: Settings, pin: Pin, *, offline: bool) -> Row:
    if offline:
        return Row("skipped", "newer", "not asked (--offline)")
    from workspace.source import releases

    try:
        found = releases.newer(pin, settings=settings)
    except WorkspaceError as exc:
        return Row("warn", "newer", f"unknown: {exc.message}")
    now = datetime.datetime.now(datetime.UTC)
    ages = {release.version: release.age_days(now) for release in found}
    said = [f"{version} ({'age unknown' if age is None else f'{age:.0f} days'})" for version, age in ages.items()]
    more = [f"{len(said) - SHOWN_RELEASES} before them"] if len(said) > SHOWN_RELEASES else []
    text = ", ".join([*reversed(said[-SHOWN_RELEASES:]), *more]) or "none"
    return Row("ok", "newer", text, {"versions": {version: None if age is None else round(age, 1) for version, age in ages.items()}})


def _triton(layout: Layout, settings: Settings, pin: Pin, *, offline: bool) -> Row:
    facts: dict[str, object] = {"commit": pin.commit}
    head = Git(layout.triton).head() if (layout.triton / ".git").exists() else None
    text = f"{pin.tag} {pin.commit[:12]}" + (f", vendor/triton at {head[:12]}" if head and head != pin.commit else "")
    if offline:
        return Row("ok", "triton", text, facts)
    try:
        found = triton.ahead(layout, settings, pin)
    except WorkspaceError as exc:
        return Row("warn", "triton", f"{text}; where {triton.branch_of(settings)} is, is unknown: {exc.message}", facts)
    facts |= {"upstream": found.commit, "ahead": found.commits}
    if found.commit == pin.commit:
        return Row("ok", "triton", f"{text}, as {found.branch} is", facts)
    count = f"{found.commits} commits ahead" if found.commits is not None else "not fetched, so how far ahead is unknown"
    return Row("ok", "triton", f"{text}; {found.branch} is at {found.commit[:12]}, {count}; next: {triton.AGAIN}", facts)
