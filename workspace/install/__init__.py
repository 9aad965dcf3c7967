"""From a checkout to an installed, verified, stamped vLLM."""
