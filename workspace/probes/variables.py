"""Ask the registry of a vLLM tree, vllm/envs.py, what it makes of the variables that are named:
`variables.py ENVS.PY NAME…`.

Needs nothing but the standard library, so any Python will do; the variables stand in its
environment.
"""

import importlib.util
import json
import os
import sys

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def main(path: str, names: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("envs", path)
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
                # Some functions need torch, or another package that is not here; one of them to
                # describe what is wrong.
                if not isinstance(exc.__context__, ValueError):
                    continue
                exc = exc.__context__
            refused.append({"name": name, "said": str(exc) or type(exc).__name__})
            continue
        if said := unheard(name, getter, value, text):
            ignored.append({"name": name, "said": said})
    print(json.dumps({"error": None, "refused": refused, "ignored": ignored}))


def unheard(name: str, getter, value, text: str) -> str | None:
    """A switch that reads 1 only takes `yes` for off and says nothing."""
    if not isinstance(value, bool):
        return None
    word = text.strip().lower()
    if word not in ON and word not in OFF:
        return f"it is a switch, and {'on' if value else 'off'} with this value; write 1 or 0"
    if value == (word in ON):
        return None
    os.environ[name] = "1" if word in ON else "0"
    try:
        # Some are off whatever they are given, because of another one.
        return (
            f"vLLM takes this value for {'on' if value else 'off'}; write {os.environ[name]}"
            if getter() != value
            else None
        )
    finally:
        os.environ[name] = text


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
