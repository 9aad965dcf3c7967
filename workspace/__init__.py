"""The library behind `inv` and `nox`: a pinned, patched, editable vLLM and the tools around it."""
