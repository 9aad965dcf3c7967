"""vLLM's own tests that a change reaches, run on the built tree: which, where they run, with what, and a verdict for each file of them."""
