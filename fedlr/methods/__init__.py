"""Federated low-rank methods: one pure, frozen dataclass per file behind one contract."""
