"""Checks of a trained model: GLUE, and the loss by position over long documents."""
