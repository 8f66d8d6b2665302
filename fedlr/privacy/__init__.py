"""Differential privacy: events, accounting, calibration, ledger and noise."""
