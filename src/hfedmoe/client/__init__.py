"""The client side: a Flower ClientApp with its memory, its choice of experts and its local training."""
