"""One vLLM process and the models that are always there to try it with."""
