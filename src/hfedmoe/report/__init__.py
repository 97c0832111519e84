"""Output for people: the live screen, tables and reports; some reports also as JSON."""
