""".env.example: every setting once, with the default and meaning of core/known_settings.py."""

from pathlib import Path

from workspace.core.known_settings import SETTINGS

EXAMPLE = (
    (Path(__file__).resolve().parents[2] / ".env.example").read_text(encoding="utf-8").splitlines()
)


def test_every_setting_stands_in_the_example_once_with_its_default_and_meaning() -> None:
    lines = {
        line[1:].partition("=")[0]: number
        for number, line in enumerate(EXAMPLE)
        if line.startswith("#") and not line.startswith("# ") and "=" in line
    }
    assert sorted(lines) == sorted(setting.name for setting in SETTINGS)
    for setting in SETTINGS:
        number = lines[setting.name]
        assert EXAMPLE[number] == f"#{setting.name}={setting.default}"
        meaning = EXAMPLE[number - 1].removeprefix("# ")
        assert meaning.removesuffix(" (secret: never printed or logged)") == setting.meaning
        assert setting.secret == meaning.endswith("(secret: never printed or logged)")


def test_settings_stand_in_the_section_of_who_sees_them() -> None:
    sections = {
        "workspace": "What the workspace does",
        "both": "What a compiler and a running vLLM see",
        "build": "What a compiler sees",
        "run": "What a running vLLM sees",
    }
    headings = list(sections.values())
    section = ""
    found = {}
    for line in EXAMPLE:
        section = line[2:] if line[2:] in headings else section
        found[line[1:].partition("=")[0]] = section
    assert {setting.name: found[setting.name] for setting in SETTINGS} == {
        setting.name: sections[setting.phase] for setting in SETTINGS
    }
