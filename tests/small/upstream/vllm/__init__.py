"""A stand-in for vLLM: it imports what the real one imports and computes nothing."""

import torch  # noqa: F401

from vllm.version import __version__  # noqa: F401
