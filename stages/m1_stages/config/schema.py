"""The configuration of a run: strict frozen dataclasses, standard library only.

``Annotated`` texts document the keys; ``m1 init`` writes them as comments and ``m1 config show`` prints them. A
``WhenChanged`` beside a key, or beside its section in ``Config``, says what becomes of a change while a run exists. Decoding,
layering and the origin of each value are in ``config.load``; what must fit together is in ``config.check``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from m1_data.errors import ConfigError
from m1_data.spec import PrepareSpec, StageMix, TokenizerSpec
from m1_stages.config.change_rule import WhenChanged
from m1_stages.config.export_section import ExportConfig
from m1_stages.config.sft_section import SftConfig

PRESETS = ("tiny", "700m", "7b-a1b", "m1-456b")
STAGE_NAMES = ("32k", "128k", "256k", "512k", "1m")
VOCAB_MULTIPLE = 128
"""Vocabulary rows are padded to this multiple whatever the tensor-parallel size, so that checkpoints reshard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of the hybrid model: blocks of lightning layers that each end with one softmax layer."""

    hidden_size: Annotated[int, "width of the residual stream"]
    num_layers: Annotated[int, "decoder layers; every softmax_every-th is a softmax layer"]
    num_heads: Annotated[int, "attention heads; a power of two, else decay rates differ between loaders"]
    head_dim: Annotated[int, "channels per head"]
    num_kv_heads: Annotated[int, "key/value heads of the softmax layers"]
    rotary_dim: Annotated[
        int, "rotated channels per head; with fewer than head_dim, each loader needs its own export target"
    ]
    num_experts: Annotated[int, "experts per layer"]
    expert_hidden_size: Annotated[int, "inner width of one SwiGLU expert"]
    vocab_size: Annotated[int, "vocabulary; 0 takes it from the tokenizer of the prepared data"] = 0
    experts_per_token: Annotated[int, "experts that see each token"] = 2
    softmax_every: Annotated[int, "distance between softmax layers"] = 8
    norm_eps: Annotated[float, "epsilon of every RMSNorm but the lightning output norm"] = 1e-5
    lightning_norm_eps: Annotated[float, "epsilon of the lightning output norm (transformers hard-codes 1e-6)"] = 1e-6
    alpha: Annotated[float, "residual weight; 0 means (2 * num_layers) ** 0.25"] = 0.0
    beta: Annotated[float, "weight of each sublayer's output"] = 1.0
    aux_loss_coef: Annotated[
        float, "load-balancing loss, transformers' scale: coef * E * sum(f_i * P_i)", WhenChanged.APPLIED
    ] = 0.001
    init_std: Annotated[float, "standard deviation of random initial weights"] = 0.02

    @property
    def residual_alpha(self) -> float:
        """The residual weight of DeepNorm: (2L)^0.25 for L layers unless ``alpha`` is set."""
        return self.alpha or (2 * self.num_layers) ** 0.25

    @property
    def padded_vocab_size(self) -> int:
        """The rows of embedding and head: ``vocab_size`` rounded up to ``VOCAB_MULTIPLE``."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def is_softmax(self, layer: int) -> bool:
        """Return whether 0-based global layer ``layer`` is a softmax layer."""
        return (layer + 1) % self.softmax_every == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """The sizes of all parallel axes but the data-parallel one, which follows from the number of processes."""

    tensor: Annotated[int, "tensor-parallel size"] = 1
    pipeline: Annotated[int, "pipeline-parallel size"] = 1
    virtual_pipeline: Annotated[
        int, "chunks of layers on each pipeline rank (interleaved schedule); the bubble shrinks by this factor"
    ] = 1
    pipeline_layers: Annotated[
        tuple[int, ...],
        "layers of each chunk in model order, pipeline * virtual_pipeline numbers; chunk i is on rank i modulo pipeline. "
        "Empty: as even as possible, the last chunks (the head comes after them) have fewer",
    ] = ()
    context: Annotated[int, "context-parallel size: twice it divides the tokens of a micro-batch"] = 1
    expert: Annotated[int, "expert-parallel size"] = 1
    expert_tensor: Annotated[int, "tensor-parallel size inside experts"] = 1
    processes: Annotated[int, "processes started on this machine; 0: one per GPU, or 1 on a CPU"] = 0
    timeout_s: Annotated[
        float, "seconds without a finished micro-batch after which a run is stopped; three times that to start or save"
    ] = 600.0
    dispatcher: Annotated[
        Literal["alltoall", "allgather"],
        "how tokens reach the experts of other ranks: alltoall sends them there; allgather gives every rank all tokens "
        "(more traffic; for few experts per rank, or expert and expert_tensor together on a CPU)",
    ] = "alltoall"
    distributed_optimizer: Annotated[bool, "shard optimizer state over the data-parallel ranks"] = False
    overlap_grad_reduce: Annotated[bool, "reduce gradients over the data-parallel ranks during the backward pass"] = (
        False
    )
    overlap_param_gather: Annotated[
        bool,
        "gather updated parameters during the next forward pass; needs distributed_optimizer and overlap_grad_reduce",
    ] = False

    @property
    def chunks(self) -> int:
        """The number of chunks that the pipeline cuts the layers into."""
        return self.pipeline * self.virtual_pipeline

    def chunk_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return the number of layers of each chunk, in model order; chunk i is on pipeline rank ``i % pipeline``."""
        share, more = divmod(num_layers, self.chunks)
        return self.pipeline_layers or tuple(share + (i < more) for i in range(self.chunks))


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The settings of AdamW."""

    beta1: Annotated[float, "decay of the first moment"] = 0.9
    beta2: Annotated[float, "decay of the second moment"] = 0.95
    eps: Annotated[float, "denominator offset; M1 reports gradients below 1e-14 and uses 1e-15"] = 1e-15
    weight_decay: Annotated[float, "decoupled weight decay of matrices; vectors have none"] = 0.1
    grad_clip: Annotated[float, "global gradient norm is clipped to this; 0 switches clipping off"] = 1.0
    offload: Annotated[
        bool,
        "fp32 master weights and moments wait in host memory during forward and backward; needs a GPU",
        WhenChanged.NO_EFFECT,
    ] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumConfig:
    """The settings that the five stages share."""

    length_scale: Annotated[float, "multiplies every context length and document-length bucket"] = 1.0
    decay: Annotated[
        Literal["fixed", "relax", "stretch", "custom"],
        "fixed: released slopes; relax: faster decay in short stages, released slopes at 1m (portable); "
        "stretch: memory beyond the released slopes; custom: a table",
    ] = "fixed"
    relax_exponent: Annotated[float, "relax: slope = released * (1M / context) ** exponent"] = 0.25
    stretch_exponent: Annotated[
        tuple[float, ...],
        "stretch: slope = released * (32K / context) ** exponent; one value, or one per layer",
    ] = (0.25,)
    custom_table: Annotated[str, "custom: JSON file {stage: [layer][head] slope > 0}, beside the configuration"] = ""
    decay_ramp_share: Annotated[float, "share of a stage's steps over which log-slopes move to the new values"] = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """The gradient guard: what counts as a warning or a spike, and how the run responds (``m1_stages.guard``)."""

    enabled: Annotated[bool, "judge every step; off: only numbers that are not finite stop the run"] = True
    ramp: Annotated[
        Literal["guarded", "clock"], "guarded: decay rates move only while gradient norms stay in their band"
    ] = "guarded"
    window: Annotated[int, "accepted steps that a number is compared with"] = 128
    min_steps: Annotated[int, "accepted steps of a stage before its own numbers are judged"] = 16
    warn_z: Annotated[float, "robust standard deviations from which a norm or the loss holds the ramp"] = 4.0
    warn_factor: Annotated[float, "and it must be so many times the median"] = 1.5
    spike_z: Annotated[float, "robust standard deviations from which a step is a spike"] = 6.0
    loss_factor: Annotated[float, "and the loss so many times its median"] = 3.0
    norm_factor: Annotated[float, "or the gradient norm, or early over late layers, so many times its median"] = 5.0
    in_band_steps: Annotated[int, "steps in the band before a held ramp moves again"] = 2
    on_spike: Annotated[
        Literal["skip", "apply", "stop"], "skip: drop the update and take the ramp a step back; apply: only the latter"
    ] = "skip"
    on_nonfinite: Annotated[Literal["stop", "skip"], "what to do about numbers that are not finite again"] = "stop"
    rerun_nonfinite: Annotated[bool, "repeat a step that is not finite once, to tell a passing fault"] = True
    skip_budget: Annotated[int, "updates that may be dropped within budget_steps; then the run is rolled back"] = 3
    budget_steps: Annotated[int, "steps the budget is for"] = 1000
    max_consecutive_skips: Annotated[int, "consecutive updates that may be dropped; then the run is rolled back"] = 2
    exclude_before: Annotated[int, "steps before the first spike that a rolled-back run excludes in addition"] = 1
    max_rollbacks: Annotated[int, "times a stage may be rolled back; then it stops"] = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage of continued pretraining. Token counts are those trained; ``length_scale`` does not scale them."""

    context_tokens: Annotated[int, "tokens per sample at full scale"]
    rope_base: Annotated[float, "RoPE base of the softmax layers"]
    tokens: Annotated[int, "tokens trained in this stage"]
    global_batch_tokens: Annotated[int, "tokens per optimizer step"]
    lr_peak: Annotated[float, "learning rate after warm-up", WhenChanged.APPLIED]
    lr_final: Annotated[float, "learning rate at the end of the stage", WhenChanged.APPLIED]
    short: Annotated[float, "token share of documents under 32K tokens (scaled by length_scale)"]
    medium: Annotated[float, "token share of documents of 32K to 128K tokens"]
    long: Annotated[float, "token share of documents over 128K tokens"]
    lr_constant_share: Annotated[
        float, "share of the stage at lr_peak before the exponential decay", WhenChanged.APPLIED
    ] = 0.0
    lr_warmup_share: Annotated[float, "share of the stage spent on linear warm-up", WhenChanged.APPLIED] = 0.0
    micro_batch_rows: Annotated[int, "rows per forward pass on each data-parallel rank", WhenChanged.NO_EFFECT] = 1
    core_share: Annotated[float, "target share of STEM, code, book and reasoning tokens"] = 0.70
    domains: Annotated[dict[str, float], "relative token weight of each domain; empty: by tokens at hand"] = field(
        default_factory=dict
    )
    max_epochs: Annotated[
        float, "passes over any part of the data (source, length bucket) within this stage at most"
    ] = 4.0
    long_qa_share: Annotated[float, "share of long question-answer data in the last fifth"] = 0.10


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """The measurements after each stage: recall of needles by length and depth, loss by position in held-out documents."""

    enabled: Annotated[bool, "measure each stage after its last step; m1 evaluate does it at any time"] = True
    lengths: Annotated[tuple[float, ...], "lengths of the needle documents, as shares of the stage's context"] = (
        0.0625,
        0.125,
        0.25,
        0.5,
        1.0,
    )
    depths: Annotated[tuple[float, ...], "where needles are hidden: 0 is the beginning of the text, 1 its end"] = (
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    )
    samples: Annotated[int, "needle documents for each length and depth"] = 4
    documents: Annotated[int, "held-out documents for the loss by position, the longest ones"] = 8
    gate: Annotated[float, "mean recall a stage must reach before the next one starts; 0 asks for none"] = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSection:
    """The place, the device, the precision and the checkpoints of a run."""

    dir: Annotated[str, "run directory: checkpoints, metrics.jsonl, reports"] = "run"
    seed: Annotated[int, "seed of initial weights and data order", WhenChanged.FIXED_IN_STAGE] = 1234
    device: Annotated[Literal["auto", "cpu", "cuda"], "auto takes CUDA where there is one"] = "auto"
    precision: Annotated[
        Literal["fp32", "bf16"],
        "bf16 keeps master weights, attention state, decay rates and logits in fp32",
        WhenChanged.FIXED_FOR_RUN,
    ] = "fp32"
    threads: Annotated[int, "CPU threads per process; 0: cores / processes"] = 0
    save_every_steps: Annotated[int, "steps between checkpoints; stage ends are always saved"] = 100
    check_replicas_every: Annotated[
        int, "steps between comparisons of the weights of data-parallel replicas; 0: never"
    ] = 100
    async_save: Annotated[
        Literal["auto", "on", "off"],
        "train on while a checkpoint is written from a copy in host memory; auto: with CUDA (a CPU would only share its cores)",
    ] = "auto"
    max_failed_saves: Annotated[int, "consecutive periodic checkpoints that may fail before the run stops"] = 3
    keep_last: Annotated[int, "checkpoints kept besides stage-final ones; at least 2"] = 2
    recompute: Annotated[
        Literal["auto", "always", "never"],
        "recompute layer activations in the backward pass; auto: in stages where they would not fit with a margin",
    ] = "auto"
    offload_activations: Annotated[
        bool, "in stages that recompute, the layers' inputs wait in host memory between forward and backward"
    ] = False
    tensorboard: Annotated[bool, "also write TensorBoard events (needs the 'tensorboard' extra)"] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The values of all sections of a configuration."""

    preset: Annotated[
        str, "model size: tiny, 700m, 7b-a1b or m1-456b; any key below overrides it", WhenChanged.NO_EFFECT
    ]
    model: Annotated[ModelConfig, WhenChanged.FIXED_FOR_RUN]
    stages: Annotated[dict[str, StageConfig], WhenChanged.FIXED_IN_STAGE]
    run: Annotated[RunSection, WhenChanged.NO_EFFECT] = field(default_factory=RunSection)
    tokenizer: Annotated[TokenizerSpec, WhenChanged.BY_PREPARED_DATA] = field(default_factory=TokenizerSpec)
    data: Annotated[PrepareSpec, WhenChanged.BY_PREPARED_DATA] = field(default_factory=PrepareSpec)
    curriculum: Annotated[CurriculumConfig, WhenChanged.FIXED_IN_STAGE] = field(default_factory=CurriculumConfig)
    optim: Annotated[OptimConfig, WhenChanged.APPLIED] = field(default_factory=OptimConfig)
    guard: Annotated[GuardConfig, WhenChanged.APPLIED] = field(default_factory=GuardConfig)
    parallel: Annotated[ParallelConfig, WhenChanged.NO_EFFECT] = field(default_factory=ParallelConfig)
    sft: Annotated[SftConfig, WhenChanged.FIXED_IN_STAGE] = field(default_factory=SftConfig)
    evaluate: Annotated[EvaluateConfig, WhenChanged.APPLIED] = field(default_factory=EvaluateConfig)
    export: Annotated[ExportConfig, WhenChanged.NO_EFFECT] = field(default_factory=ExportConfig)

    def seq_len(self, stage: str) -> int:
        """Return the tokens per row of ``stage`` after ``length_scale``."""
        return round(self.stages[stage].context_tokens * self.curriculum.length_scale)

    @property
    def sft_seq_len(self) -> int:
        """The tokens per fine-tuning row after ``length_scale``."""
        return round(self.sft.context_tokens * self.curriculum.length_scale)

    def global_batch_rows(self, stage: str) -> int:
        """Return the rows per optimizer step of ``stage``, at least 1."""
        return max(1, self.stages[stage].global_batch_tokens // self.seq_len(stage))

    def num_steps(self, stage: str) -> int:
        """Return the number of optimizer steps of ``stage``, at least 1."""
        return max(1, round(self.stages[stage].tokens / (self.global_batch_rows(stage) * self.seq_len(stage))))

    def mix(self, stage: str) -> StageMix:
        """Return the data mix of ``stage`` as ``m1_data`` takes it."""
        s = self.stages[stage]
        return StageMix(
            stage=stage,
            seq_len_tokens=self.seq_len(stage),
            short=s.short,
            medium=s.medium,
            long=s.long,
            core_share=s.core_share,
            domains=s.domains,
            max_epochs=s.max_epochs,
            long_qa_share=s.long_qa_share,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A configuration, where each value came from, and where relative paths start."""

    config: Config
    origins: Mapping[str, str]
    """Origin of each dotted key: ``m1.toml:12``, ``preset tiny``, ``--set`` or ``default``."""
    base_dir: Path
    """Folder of the configuration file; relative paths in the file start here."""
    sha256: str
    """Hash of the resolved values, which every checkpoint records."""
    sft_run: str = ""
    """The named run whose values the section ``sft`` holds (``config.sft_runs.for_run``); empty: those of the section itself."""

    def path(self, value: str) -> Path:
        """Resolve a configured path against the configuration file's folder.

        Raises:
            ConfigError: no file can have that name.
        """
        try:
            return (self.base_dir / Path(value).expanduser()).resolve()
        except (ValueError, RuntimeError, OSError) as error:  # a NUL, the home of nobody, a circle of links
            keys = [key for key, configured in (("run.dir", self.config.run.dir), ("data.out", self.config.data.out))
                    if configured == value]  # fmt: skip
            where = f"key {keys[0]}" if keys else "the configuration"
            raise ConfigError(f"{value!r} cannot be a path: {error}", where=where, fix="correct it") from error

    @property
    def run_dir(self) -> Path:
        """The absolute path of the run directory."""
        return self.path(self.config.run.dir)

    def as_dict(self) -> dict[str, Any]:
        """Return plain nested values, ready for JSON."""
        return asdict(self.config)
