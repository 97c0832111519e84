"""The method: pure functions on tensors, without model, network or files (docs/method.md)."""
