"""Compiles kernels: targets, CMake, scheduling by memory, device code."""
