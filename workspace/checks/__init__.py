"""Checks of the built tree: the smoke and its record, upstream's own tests, the pre-push gate."""
