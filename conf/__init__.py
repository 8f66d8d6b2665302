"""Hydra configuration: one folder per section, one file per choice."""
