"""Quantizes graphs, and chooses the layers to quantize."""
