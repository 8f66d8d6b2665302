"""An empirical lower bound on ε of the private step, from one run with planted canaries."""
