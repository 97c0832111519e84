"""One round of federated fine-tuning, whatever carries its messages."""
