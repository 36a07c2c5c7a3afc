"""Compares built graphs and engines with PyTorch and with the checkpoint's own library."""
