"""The Python models of a Triton repository.

The exporter copies them into the repository, with the modules of gte_deploy that they import.
"""
