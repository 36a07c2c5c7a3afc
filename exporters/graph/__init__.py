"""Traces a PyTorch model once, and rewrites the trace to one graph for each engine."""

MIN_MAX_LENGTH = 8
"""The smallest `max_length` of a graph, in tokens."""
MIN_OPSET, MAX_OPSET = 20, 23
"""The ONNX opsets that a graph may have."""
