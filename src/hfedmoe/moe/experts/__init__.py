"""The forward and backward pass of the experts, and where their tensors are."""
