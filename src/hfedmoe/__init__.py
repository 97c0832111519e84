"""hfedmoe: unequal devices fine-tune one Mixture-of-Experts language model together, without sharing data."""

import os

# Flower and the hub's client report usage to their makers unless told otherwise; a tool for private data starts silent.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Its retries of a hub that cannot be reached are many lines; the error that follows is one.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
# Processors with 16-bit products make code for every number of rows, and an expert gets other rows in every batch: with
# oneDNN's own limit of 1,024 pieces of code a device grew by a gigabyte in 60 steps; with this one it is as fast.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# Fast tokenizers warn about every fork after their first use, as in simulations; their threads gain nothing here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__version__ = "0.1.0"
