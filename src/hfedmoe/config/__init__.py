"""The configuration of a run: one validated tree, read from TOML, overridable with `--set section.key=value`.

Every field has a description; `hfedmoe run --show-config` prints the tree. Importing this package is cheap: it must not
import torch, transformers or flwr.
"""

from hfedmoe.config.carrier import CarrierConfig
from hfedmoe.config.clients import ClientsConfig
from hfedmoe.config.data import DataConfig, DataFormat, PartitionConfig
from hfedmoe.config.federation import EvaluationConfig, FederationConfig
from hfedmoe.config.method import MethodConfig, TrainConfig
from hfedmoe.config.model import ModelConfig, UpcycleConfig
from hfedmoe.config.reading import apply_unset, config_from_text, config_from_tree, load_config
from hfedmoe.config.run import RunConfig
from hfedmoe.config.section import Section
from hfedmoe.config.tracking import TrackingConfig

__all__ = [
    "CarrierConfig",
    "ClientsConfig",
    "DataConfig",
    "DataFormat",
    "EvaluationConfig",
    "FederationConfig",
    "MethodConfig",
    "ModelConfig",
    "PartitionConfig",
    "RunConfig",
    "Section",
    "TrackingConfig",
    "TrainConfig",
    "UpcycleConfig",
    "apply_unset",
    "config_from_text",
    "config_from_tree",
    "load_config",
]
