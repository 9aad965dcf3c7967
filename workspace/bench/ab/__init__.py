"""`nox -s ab`: two trees, each an arm with a build of its own, measured alternately on this machine, and one verdict."""
