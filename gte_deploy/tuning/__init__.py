"""Measures which engine is the fastest on a machine."""

DEFAULT_SHAPES = ("1x16", "1x128", "1x512", "8x128")
"""Batches that `bench` times where none are named, as ROWSxTOKENS."""
