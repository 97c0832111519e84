"""The forward and backward pass of the experts, and the storage of their tensors."""
