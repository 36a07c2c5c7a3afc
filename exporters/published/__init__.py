"""`gte-export verify-published`: exports published checkpoints and compares them with values that others recorded."""
