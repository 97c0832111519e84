"""Bytes on disk: safetensors as views, whole-or-nothing writes, free space."""
