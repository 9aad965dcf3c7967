"""Triton: what is wrong with the one in `.vllm`, what mends it, and its build from source."""
