"""Check environment variables against the registry of a vLLM tree, vllm/envs.py:
`variables.py ENVS.PY NAME…`.

The values are in the environment of this program. It needs the standard library only, so any Python
can run it. One JSON document on stdout.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def main(path: str, names: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("envs", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python module")
    envs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(envs)
    refused, ignored = [], []
    for name in names:
        getter = envs.environment_variables.get(name)
        text = os.environ.get(name)
        if getter is None or text is None:
            continue
        try:
            value = getter()
        except Exception as exc:
            if isinstance(exc, ImportError):
                # Some getters need torch or another package that is missing here, one of them only
                # to describe a wrong value.
                if not isinstance(exc.__context__, ValueError):
                    continue
                exc = exc.__context__
            refused.append({"name": name, "said": str(exc) or type(exc).__name__})
            continue
        if problem := ignored_value(name, getter, value, text):
            ignored.append({"name": name, "said": problem})
    print(json.dumps({"error": None, "refused": refused, "ignored": ignored}))


def ignored_value(name: str, getter: Callable[[], object], value: object, text: str) -> str | None:
    """Return the problem with a switch that vLLM reads otherwise than it is meant.

    A switch that only knows 1 silently takes `yes` for off.
    """
    if not isinstance(value, bool):
        return None
    state = text.strip().lower()
    if state not in ON and state not in OFF:
        return f"it is a switch, and {'on' if value else 'off'} with this value; write 1 or 0"
    if value == (state in ON):
        return None
    os.environ[name] = "1" if state in ON else "0"
    try:
        # Some switches are off with any value, because of another variable.
        return (
            f"vLLM takes this value for {'on' if value else 'off'}; write {os.environ[name]}"
            if getter() != value
            else None
        )
    finally:
        os.environ[name] = text


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
