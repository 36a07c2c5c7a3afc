"""The parts of a Triton model repository: graph, configurations, Python models, checks."""
