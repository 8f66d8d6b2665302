"""Checks that what privacy rests on holds on this machine, model and device; see `checkup`."""
