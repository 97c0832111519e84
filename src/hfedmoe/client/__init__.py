"""One client: what it keeps, how it plans and trains, and what it answers (a flwr ClientApp)."""
