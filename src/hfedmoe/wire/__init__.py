"""The messages between server and clients: their contents, the checks on both sides, and how they are sent."""
