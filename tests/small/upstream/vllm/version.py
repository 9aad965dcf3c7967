try:
    from vllm._version import __version__
except ImportError:
    __version__ = "dev"
