"""Everything that knows what is inside a Mixture-of-Experts model."""
