"""The bug report, and measurements of the workspace's own overhead."""
