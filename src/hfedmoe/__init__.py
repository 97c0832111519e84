"""hfedmoe: unequal devices fine-tune one Mixture-of-Experts language model together, without sharing data."""

import os

# Flower and huggingface_hub report usage by default; a tool for private data must not.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# If the hub cannot be reached, huggingface_hub logs many retries; the error after them is enough.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
# On processors with 16-bit products, oneDNN keeps code for every number of rows, which differs for each expert and
# batch. With its default limit of 1,024 a device grew by a gigabyte in 60 steps; with this limit it is as fast.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
# Fast tokenizers warn about every fork after their first use, as in simulations; their threads do not help here.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__version__ = "0.1.0"
