"""Named hints: the next command for a user, after an error or below a row of a screen.

Owns hints.ini, which describes its own format. Code names a hint and gives its values; it never
has the text. docs/hints.md lists all of them.
"""

import configparser
import shlex
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# INI, because a command stands in it as it is typed, without a second level of quotes.
_FILE = Path(__file__).with_name("hints.ini")


@dataclass(frozen=True)
class Hint:
    """A hint as it stands in hints.ini.

    `when` is the situation. `deletes` is what the command deletes, renames or overwrites, and
    why that is safe. `advice` is the reason why no command can be given.
    """

    text: str
    when: str = ""
    deletes: str = ""
    advice: str = ""


@cache
def registry() -> Mapping[str, Hint]:
    """Return every hint under its name, `group.name`."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.read_string(_FILE.read_text(encoding="utf-8"))
    found: dict[str, Hint] = {}
    for section, values in parser.items():
        if "." in section:
            found[section] = Hint(**values)
        else:
            found |= {f"{section}.{name}": Hint(text) for name, text in values.items()}
    return found


def text(name: str, /, **values: object) -> str:
    """Return the hint of this name with its values.

    `{value}` is quoted for a shell, a list item by item. `{value:plain}` and `{value:tail}`, for
    commands and prose, are not. An empty value appears as its name in capitals, so that no word is
    ever empty; an empty tail is left out.
    Raises KeyError for an unknown name and for a missing value.
    """
    return _Quoting().vformat(registry()[name].text, (), values)


class _Quoting(string.Formatter):
    def get_field(
        self, field_name: str, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> tuple[object, str]:
        value = kwargs[field_name]
        is_empty = value is None or value == [] or not str(value)
        return (_Name(field_name.upper()) if is_empty else value), field_name

    def format_field(self, value: object, format_spec: str) -> str:
        if format_spec == "tail":
            return "" if isinstance(value, _Name) else str(value)
        if format_spec == "plain" or isinstance(value, _Name):
            return str(value)
        if isinstance(value, list):
            return shlex.join(map(str, value))
        # A path takes no format.
        return shlex.quote(format(value, format_spec) if format_spec else str(value))


class _Name(str):
    """The name of a value, in its place."""
