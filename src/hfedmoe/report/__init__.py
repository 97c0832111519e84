"""What people look at: the live screen and tables."""
