"""Reading and checking of bundles."""
