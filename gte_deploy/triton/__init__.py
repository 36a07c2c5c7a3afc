"""A client for models on a Triton Inference Server."""

from gte_deploy.triton.client import Client

__all__ = ["Client"]
