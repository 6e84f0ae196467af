"""Defines the configuration of a run (``schema``), loads it (``load``) and checks it (``check``). It needs no torch."""

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
    SftConfig,
    StageConfig,
    WhenChanged,
)

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
