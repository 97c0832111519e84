"""Experts that are not in the model: read from a checkpoint when needed."""
