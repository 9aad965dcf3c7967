"""Sources of the code: pins, package index, git checkouts, release archives and local patches."""
