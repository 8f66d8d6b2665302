"""fedlr: federated fine-tuning with private low-rank aggregation.

Importing this package loads none of flwr, opacus, peft, hydra or triton; each
framework has one home below it (see ``CONTRIBUTING.md``).
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
