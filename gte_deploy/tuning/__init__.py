"""Measures which engine is the fastest on a machine."""
