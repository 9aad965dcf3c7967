"""From a checkout and an environment to an installed, verified, stamped vLLM."""
