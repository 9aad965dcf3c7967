"""A world in small: an upstream with the shape of vLLM, a package index on the loopback, and a
clone of this workspace that knows no other.

Everything in it runs for real: git, uv, the tree's own setup.py, a C compiler. Only the sizes are
small.
"""
