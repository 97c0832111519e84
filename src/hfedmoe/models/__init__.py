"""Load a model by name: whole, carved (experts left on disk), or only its structure."""
