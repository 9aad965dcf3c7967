"""Where the code comes from: pins, package index, git checkouts, release archives and the patches
on top.
"""
