"""From a name to a model: whole, carved (experts left on disk), or its structure only."""
