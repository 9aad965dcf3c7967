"""One vLLM server: its recipes, models, command line and processes."""
