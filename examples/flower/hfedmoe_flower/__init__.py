"""Thin shell over the installed hfedmoe: every device runs its own installation, not code from a server."""
