"""What is written to a bundle."""
