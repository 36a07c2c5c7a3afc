"""Networks of families that transformers has no class for, built from its modules."""
