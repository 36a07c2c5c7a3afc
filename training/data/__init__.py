"""Corpora: text to token shards, the order in which a run samples them, their masks, and packed micro-batches."""
