"""Texts in, token ids in batches out."""
