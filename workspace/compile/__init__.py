"""Compiling here: what CMake would build, what of it is reached, and where it goes."""
