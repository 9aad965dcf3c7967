"""What the workspace itself costs, as ratios of one run, and the bug report."""
