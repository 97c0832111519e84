"""What fits on a device."""
