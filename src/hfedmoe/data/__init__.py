"""Tasks: rows from anywhere, their split over clients, and the tensors that a model is fed."""
