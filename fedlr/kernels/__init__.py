"""Array operations with a torch twin each; the twin is the run-time fall-back."""
