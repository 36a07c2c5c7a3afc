"""The Python models of a Triton repository. The exporter copies them, and what they import of gte_deploy, into it."""
