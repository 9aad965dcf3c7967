"""Stands in for setuptools: as much of it as the small tree's setup.py and an editable install ask
for.
"""

import configparser
import os

recorded = {}


def _build_base():
    """Where a wheel is assembled: distutils reads a file of the caller's beside setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(os.environ.get("DIST_EXTRA_CONFIG", ""))
    return parser.get("build", "build_base", fallback="build")


class Extension:
    def __init__(self, name, sources):
        self.name, self.sources = name, sources


class Command:
    def __init__(self, arguments):
        self.extensions = arguments.get("ext_modules", [])
        self.build_lib = os.path.join(_build_base(), "lib")

    def run(self):
        raise NotImplementedError


def setup(**arguments):
    recorded.clear()
    recorded.update(arguments)
