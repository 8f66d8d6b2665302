"""The client side of a federation: the site and its Flower app."""
