"""Graphs of lower precisions, and how their layers are chosen."""
