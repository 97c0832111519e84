"""The two apps that pyproject.toml names for Flower."""

from hfedmoe.deployment import client, server

__all__ = ["client", "server"]
