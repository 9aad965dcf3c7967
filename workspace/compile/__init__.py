"""Compilation on this machine: the targets that a change reaches, and the compilers for them."""
