"""Routers restricted to the resident experts, and what the unrestricted router would have done."""
