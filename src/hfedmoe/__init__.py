"""hfedmoe: unequal devices fine-tune one Mixture-of-Experts language model together, without sharing data."""

import os

# Flower reports usage to its makers unless told otherwise; a tool for private data starts silent.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

__version__ = "0.1.0"
