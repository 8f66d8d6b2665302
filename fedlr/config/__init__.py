"""The frozen configuration of a run: where YAML stops.

`from_mapping` turns a plain nested mapping (what Hydra composed, or a decoded
JSON string) into frozen dataclasses and reports *every* problem at once, before
anything is loaded. `to_json` is the one canonical string that travels to other
processes.
"""

from fedlr.config.decode import from_json, from_mapping, setting_names, to_json
from fedlr.config.method import AdapterConfig, CombineConfig, MethodConfig, SubspaceConfig
from fedlr.config.schema import (
    DataConfig,
    FederationConfig,
    HeadConfig,
    KernelsConfig,
    ModelConfig,
    OptimizerConfig,
    PartitionConfig,
    PrivacyConfig,
    RunConfig,
    TrackingConfig,
)

__all__ = [
    "AdapterConfig",
    "CombineConfig",
    "DataConfig",
    "FederationConfig",
    "HeadConfig",
    "KernelsConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "RunConfig",
    "SubspaceConfig",
    "TrackingConfig",
    "from_json",
    "from_mapping",
    "setting_names",
    "to_json",
]
