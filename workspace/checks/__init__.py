"""Judges the built tree: smoke, vLLM's own tests, pre-push hook."""
