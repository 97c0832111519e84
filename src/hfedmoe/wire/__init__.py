"""What crosses between server and clients: messages, the checks of both sides, and how they are carried."""
