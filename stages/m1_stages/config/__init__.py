"""Defines the configuration of a run (``schema``), loads it (``load``) and checks it (``check``). It needs no torch."""

from m1_stages.config.change_rule import WhenChanged
from m1_stages.config.export_section import ExportConfig
from m1_stages.config.schema import (
    PRESETS,
    STAGE_NAMES,
    VOCAB_MULTIPLE,
    Config,
    CurriculumConfig,
    EvaluateConfig,
    GuardConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Resolved,
    RunSection,
    StageConfig,
)
from m1_stages.config.sft_section import SftConfig

__all__ = [
    "PRESETS",
    "STAGE_NAMES",
    "VOCAB_MULTIPLE",
    "Config",
    "CurriculumConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GuardConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "Resolved",
    "RunSection",
    "SftConfig",
    "StageConfig",
    "WhenChanged",
]
