"""A stand-in for vLLM: it imports what the real one imports and computes nothing."""

import torch

from vllm.version import __version__
