"""One PyTorch trace, and the tools that rewrite it to graphs for engines."""
