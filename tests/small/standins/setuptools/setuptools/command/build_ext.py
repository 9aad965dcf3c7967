from setuptools import Command


class build_ext(Command):
    pass
