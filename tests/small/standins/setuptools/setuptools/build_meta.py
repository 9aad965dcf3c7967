"""PEP 660 hooks that run setup.py of the working directory, and leave an egg-info there as the real
ones do.
"""

import base64
import hashlib
import os
import runpy
import shutil
import sys
import zipfile

import setuptools


def get_requires_for_build_editable(config_settings=None):
    return []


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    name = _dist_info(_run_setup())
    folder = os.path.join(metadata_directory, name)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "METADATA"), "w") as file:
        file.write(_metadata())
    return name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    arguments = _run_setup()
    arguments["cmdclass"]["build_ext"](arguments).run()
    os.makedirs("vllm.egg-info", exist_ok=True)
    with open("vllm.egg-info/PKG-INFO", "w") as file:
        file.write(_metadata())
    info = _dist_info(arguments)
    members = {
        f"__editable__.{arguments['name']}.pth": os.getcwd() + "\n",
        f"{info}/METADATA": _metadata(),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: small\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = (
        "".join(
            f"{name},sha256={_digest(text)},{len(text.encode())}\n"
            for name, text in members.items()
        )
        + f"{info}/RECORD,,\n"
    )
    wheel = f"{arguments['name']}-{arguments['version']}-0.editable-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, wheel), "w") as archive:
        for name, text in {**members, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return wheel


def get_requires_for_build_wheel(config_settings=None):
    return []


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    arguments = _run_setup("bdist_wheel")
    command = arguments["cmdclass"]["build_ext"](arguments)
    command.run()
    root = arguments["package_dir"][""]
    for package in arguments["packages"]:
        folder = os.path.join(command.build_lib, *package.split("."))
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(os.path.join(root, *package.split("."))):
            if name.endswith(".py"):
                shutil.copy(os.path.join(root, *package.split("."), name), folder)
    info = _dist_info(arguments)
    members = {
        f"{info}/METADATA": _metadata().encode(),
        f"{info}/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: small\nRoot-Is-Purelib: false\nTag: py3-none-any\n"
        ),
    }
    for place, _, names in os.walk(command.build_lib):
        for name in names:
            path = os.path.join(place, name)
            with open(path, "rb") as file:
                members[os.path.relpath(path, command.build_lib)] = file.read()
    record = (
        "".join(
            f"{name},sha256={_digest(content)},{len(content)}\n"
            for name, content in members.items()
        )
        + f"{info}/RECORD,,\n"
    )
    wheel = f"{arguments['name']}-{arguments['version']}-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(wheel_directory, wheel), "w") as archive:
        for name, content in {**members, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, content)
    return wheel


def _run_setup(command="editable_wheel"):
    sys.argv = ["setup.py", command]
    sys.path.insert(0, os.getcwd())
    runpy.run_path("setup.py", run_name="__main__")
    return setuptools.recorded


def _metadata():
    arguments = setuptools.recorded
    requires = "".join(
        f"Requires-Dist: {requirement}\n" for requirement in arguments["install_requires"]
    )
    return (
        f"Metadata-Version: 2.1\nName: {arguments['name']}\nVersion:"
        f" {arguments['version']}\n{requires}"
    )


def _dist_info(arguments):
    return f"{arguments['name']}-{arguments['version']}.dist-info"


def _digest(content):
    content = content if isinstance(content, bytes) else content.encode()
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
