"""The app that Flower ships to devices: it only names the apps of the hfedmoe that is installed there."""

PROJECT = b"""
[project]
name = "hfedmoe-fleet"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "hfedmoe"

[tool.flwr.app.components]
serverapp = "hfedmoe_fleet.apps:server"
clientapp = "hfedmoe_fleet.apps:client"

[tool.flwr.app.config]
config = ""
run = ""
"""
APPS = b"""from hfedmoe.deployment import client, server

__all__ = ["client", "server"]
"""


def bundle() -> bytes:
    """As Flower's Control API takes it. `hfedmoe join` never unpacks it."""
    from flwr.cli.build import build_fab_from_files

    files = {"pyproject.toml": PROJECT, "hfedmoe_fleet/__init__.py": b"", "hfedmoe_fleet/apps.py": APPS}
    return build_fab_from_files(files)[0]
