"""What the operators of a federation of real sites get written: certificates, keys, settings."""
