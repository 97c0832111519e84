"""Read rows from any source, make examples of them, split these over clients, and encode them as tensors."""
