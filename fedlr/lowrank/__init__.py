"""Linear algebra on low-rank factor pairs, without ever forming the m × n product."""
