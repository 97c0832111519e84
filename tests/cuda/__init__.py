"""Tests that need a CUDA GPU: hfedmoe is right there too."""
