"""Measures the speed of the engines on a machine."""

DEFAULT_SHAPES = ("1x16", "1x128", "1x512", "8x128")
"""The batches that `bench` times if none are given, as ROWSxTOKENS."""
