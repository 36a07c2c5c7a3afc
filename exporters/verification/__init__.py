"""What was built, compared with PyTorch and with the checkpoint's own library."""
