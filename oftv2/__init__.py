"""oftv2: orthogonal finetuning (OFTv2, QOFT) of large PyTorch models."""

from . import _installed  # noqa: F401  first: says what is wrong where kernels are missing
from .accelerator_states import save_adapters_only
from .adapter import disable_adapter, merge, print_trainable_parameters, unmerge
from .adapters import active_adapters, adapter_names, add_adapter, delete_adapter, set_adapter
from .averaging import average_adapters
from .base import OFTLayer
from .config import ConfigError, OFTConfig
from .conv import OFTConv2d
from .diagnostics import LayerDiagnostics, diagnostics
from .errors import (
    AdapterError,
    KernelWarning,
    OptimizerWarning,
    PeftFormatWarning,
    PeftRepairWarning,
    RequantizationWarning,
    StabilityWarning,
    TargetWarning,
)
from .experts import OFTExperts
from .explain import Explanation, explain
from .grouping import group_projections
from .layers import OFTEmbedding, OFTLinear
from .loading import hotswap_adapter, load_adapter
from .peft_acceleration import accelerate_all_if_asked as _accelerate_all_if_asked
from .peft_acceleration import accelerate_peft
from .preference import ReferenceModel, reference_model
from .quant import QuantOFTLinear
from .rows import adapters_per_row
from .saving import save_adapter
from .wrap import unwrap_model, wrap_model

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "ConfigError",
    "Explanation",
    "KernelWarning",
    "LayerDiagnostics",
    "OFTConfig",
    "OFTConv2d",
    "OFTEmbedding",
    "OFTExperts",
    "OFTLayer",
    "OFTLinear",
    "OptimizerWarning",
    "PeftFormatWarning",
    "PeftRepairWarning",
    "QuantOFTLinear",
    "ReferenceModel",
    "RequantizationWarning",
    "StabilityWarning",
    "TargetWarning",
    "accelerate_peft",
    "active_adapters",
    "adapter_names",
    "adapters_per_row",
    "add_adapter",
    "average_adapters",
    "delete_adapter",
    "diagnostics",
    "disable_adapter",
    "explain",
    "group_projections",
    "hotswap_adapter",
    "load_adapter",
    "merge",
    "print_trainable_parameters",
    "reference_model",
    "save_adapter",
    "save_adapters_only",
    "set_adapter",
    "unmerge",
    "unwrap_model",
    "wrap_model",
]

_accelerate_all_if_asked()
