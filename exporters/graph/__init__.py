"""Traces a PyTorch model once, and rewrites the trace to one graph for each engine."""
