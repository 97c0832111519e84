"""The two apps, under the names that pyproject.toml gives to Flower."""

from hfedmoe.deployment import client, server

__all__ = ["client", "server"]
