"""What the workspace itself costs, as ratios measured in one run."""
