"""Errors, paths, settings, terminal, processes, locks and files; knows nothing of vLLM."""
