"""Benchmarks: records of vLLM's own benchmarks, verdicts, A/B runs, bisects, and their report."""
