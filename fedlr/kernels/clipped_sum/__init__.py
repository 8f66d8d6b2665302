"""Per-unit gradients of the up-projection, clipped and summed."""
