"""Labelled text: where it comes from, who holds which row, and how rows become batches."""
