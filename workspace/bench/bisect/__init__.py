"""`nox -s bisect`: which upstream commit, or which patch, turned good into bad."""
