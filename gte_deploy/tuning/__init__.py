"""Measures the speed of the engines on a machine."""
