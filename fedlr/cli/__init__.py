"""The command line and the only home of Hydra."""
