"""Writes the files of a bundle."""
