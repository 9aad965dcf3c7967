"""The command lines: verbs of `inv`, sessions of nox, exit codes."""
