"""Checks that the values of a configuration fit together, before a process is started."""

from __future__ import annotations

import re

from m1_data.storage.ownership import why_not_a_name
from m1_stages.config import STAGE_NAMES, Resolved
from m1_stages.config.check_sft import check_sft
from m1_stages.config.requirements import Requirements


def check(resolved: Resolved) -> None:
    """Raise ``ConfigError`` for sizes, shares and combinations that cannot work."""
    _Checker(resolved).run()


class _Checker(Requirements):
    def run(self) -> None:
        self.model()
        self.parallel()
        self.curriculum()
        self.guard()
        for name in STAGE_NAMES:
            key = f"stages.{name}"
            self.require(name in self.config.stages, key, f"stage {name} is missing", f"add a [{key}] table")
            self.stage(name)
        self.evaluate()
        self.rest()

    def model(self) -> None:
        m = self.config.model
        self.positive(
            "model", "hidden_size", "num_layers", "num_heads", "head_dim", "num_kv_heads", "num_experts",
            "expert_hidden_size", "experts_per_token", "softmax_every", "norm_eps", "lightning_norm_eps", "init_std", "beta",
        )  # fmt: skip
        self.not_negative("model", "alpha", "aux_loss_coef")
        self.require(
            m.num_heads & (m.num_heads - 1) == 0,
            "model.num_heads",
            f"num_heads is {m.num_heads}, not a power of two: transformers and vLLM compute different decay rates then",
            "use 1, 2, 4, 8, 16, 32, 64 or 128 heads",
        )
        self.require(
            m.num_heads % m.num_kv_heads == 0,
            "model.num_kv_heads",
            f"num_kv_heads {m.num_kv_heads} does not divide num_heads {m.num_heads}",
            "choose a divisor of num_heads",
        )
        self.require(
            0 < m.rotary_dim <= m.head_dim and m.rotary_dim % 2 == 0,
            "model.rotary_dim",
            f"rotary_dim is {m.rotary_dim}; it must be even and at most head_dim {m.head_dim}",
            f"set rotary_dim = {m.head_dim}",
        )
        self.require(
            m.experts_per_token <= m.num_experts,
            "model.experts_per_token",
            f"experts_per_token {m.experts_per_token} exceeds num_experts {m.num_experts}",
            "lower it",
        )
        self.require(
            m.num_layers % m.softmax_every == 0,
            "model.num_layers",
            f"num_layers {m.num_layers} is not a multiple of softmax_every {m.softmax_every}",
            f"use a multiple of {m.softmax_every}: the last layer of each block is the softmax layer",
        )
        self.require(m.vocab_size >= 0, "model.vocab_size", "vocab_size is negative", "0 takes the tokenizer's")

    def parallel(self) -> None:
        m, p = self.config.model, self.config.parallel
        self.positive("parallel", "tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor")
        self.require(p.processes >= 0, "parallel.processes", "parallel.processes is negative", "0 chooses itself")
        self.require(
            m.num_kv_heads % p.tensor == 0,
            "parallel.tensor",
            f"tensor-parallel size {p.tensor} does not divide num_kv_heads {m.num_kv_heads}",
            f"use a divisor of {m.num_kv_heads}",
        )
        self.require(
            m.num_experts % p.expert == 0,
            "parallel.expert",
            f"expert-parallel size {p.expert} does not divide num_experts {m.num_experts}",
            f"use a divisor of {m.num_experts}",
        )
        self.require(
            m.expert_hidden_size % p.expert_tensor == 0,
            "parallel.expert_tensor",
            f"expert_tensor {p.expert_tensor} does not divide expert_hidden_size {m.expert_hidden_size}",
            "use a divisor",
        )
        self.require(
            not p.overlap_param_gather or (p.distributed_optimizer and p.overlap_grad_reduce),
            "parallel.overlap_param_gather",
            "overlap_param_gather is on without distributed_optimizer and overlap_grad_reduce: only with these are there "
            "parameters to gather, and a place for it",
            "set parallel.distributed_optimizer = true and parallel.overlap_grad_reduce = true, "
            "or parallel.overlap_param_gather = false",
        )
        self.pipeline()

    def pipeline(self) -> None:
        m, p = self.config.model, self.config.parallel
        self.require(
            p.virtual_pipeline == 1 or p.pipeline > 1,
            "parallel.virtual_pipeline",
            f"virtual_pipeline is {p.virtual_pipeline}, but there is no pipeline to interleave",
            "set parallel.pipeline to 2 or more, or parallel.virtual_pipeline = 1",
        )
        self.require(
            p.chunks <= m.num_layers,
            "parallel.virtual_pipeline" if p.virtual_pipeline > 1 else "parallel.pipeline",
            f"the pipeline has {p.chunks} chunks (pipeline {p.pipeline} x virtual_pipeline {p.virtual_pipeline}), "
            f"the model {m.num_layers} layers: some chunks would be empty",
            "lower parallel.pipeline or parallel.virtual_pipeline",
        )
        layers = list(p.chunk_layers(m.num_layers))
        self.require(
            len(layers) == p.chunks and sum(layers) == m.num_layers and min(layers) > 0,
            "parallel.pipeline_layers",
            f"pipeline_layers is {layers}: {len(layers)} chunks with {sum(layers)} layers together; "
            f"needed are {p.chunks} (pipeline {p.pipeline} x virtual_pipeline {p.virtual_pipeline}) with at least one "
            f"layer each and {m.num_layers} together",
            "correct the list, or leave it empty for a split as even as possible",
        )

    def curriculum(self) -> None:
        c, m = self.config.curriculum, self.config.model
        self.positive("curriculum", "length_scale")
        self.not_negative("curriculum", "relax_exponent")
        self.require(
            min(c.stretch_exponent, default=0.0) >= 0,
            "curriculum.stretch_exponent",
            f"stretch_exponent has {min(c.stretch_exponent, default=0.0)}",
            "give 0 or more",
        )
        self.require(
            len(c.stretch_exponent) in (1, m.num_layers),
            "curriculum.stretch_exponent",
            f"stretch_exponent has {len(c.stretch_exponent)} values",
            f"give one value, or one per layer ({m.num_layers})",
        )
        self.require(
            c.decay != "custom" or bool(c.custom_table),
            "curriculum.custom_table",
            "decay = custom needs a table",
            "set curriculum.custom_table to a JSON file {stage: [layer][head]}",
        )
        self.share("curriculum.decay_ramp_share", c.decay_ramp_share)

    def guard(self) -> None:
        g = self.config.guard
        self.positive("guard", "window", "min_steps", "warn_z", "spike_z", "budget_steps")
        self.require(
            g.min_steps <= g.window, "guard.min_steps", f"min_steps {g.min_steps} exceeds window {g.window}", "lower it"
        )
        for key in ("warn_factor", "loss_factor", "norm_factor"):
            self.require(getattr(g, key) > 1, f"guard.{key}", f"{key} is not above 1", "for example 1.5")
        for key in ("in_band_steps", "skip_budget", "max_consecutive_skips", "exclude_before", "max_rollbacks"):
            self.require(getattr(g, key) >= 0, f"guard.{key}", f"{key} is negative", "0 or more")

    def stage(self, name: str) -> None:
        s, key = self.config.stages[name], f"stages.{name}"
        self.positive(
            key, "context_tokens", "rope_base", "tokens", "global_batch_tokens", "lr_peak", "micro_batch_rows",
            "max_epochs",
        )  # fmt: skip
        self.require(
            0 < s.lr_final <= s.lr_peak,
            f"{key}.lr_final",
            f"lr_final {s.lr_final} is not in (0, lr_peak]",
            "lower it",
        )
        for part in (
            "short",
            "medium",
            "long",
            "core_share",
            "long_qa_share",
            "lr_constant_share",
            "lr_warmup_share",
        ):
            self.share(f"{key}.{part}", getattr(s, part))
        total = s.short + s.medium + s.long
        self.require(abs(total - 1) < 1e-6, f"{key}.short", f"short + medium + long = {total:g}", "make them sum to 1")
        self.require(
            s.lr_warmup_share + s.lr_constant_share <= 1.0,
            f"{key}.lr_constant_share",
            "warm-up and constant share exceed the stage",
            "lower one",
        )
        self.require(
            all(w >= 0 for w in s.domains.values()) and (not s.domains or sum(s.domains.values()) > 0),
            f"{key}.domains",
            "domain weights must be non-negative and not all zero",
            "correct the weights",
        )
        rows = self.config.seq_len(name)
        self.cut(rows, f"stage {name}")
        self.require(
            rows >= 16,
            "curriculum.length_scale",
            f"stage {name} would have rows of {rows} tokens",
            "raise curriculum.length_scale",
        )

    def evaluate(self) -> None:
        e = self.config.evaluate
        self.positive("evaluate", "samples")
        self.require(e.documents >= 0, "evaluate.documents", "evaluate.documents is negative", "0 leaves it out")
        for name in ("lengths", "depths"):
            values, key = getattr(e, name), f"evaluate.{name}"
            self.require(
                bool(values), key, f"{key} is empty", "give one share or more, or set evaluate.enabled = false"
            )
            for value in values:
                self.share(key, value)
            self.require(len(set(values)) == len(values), key, f"{key} names a share twice", "name each once")
        self.require(min(e.lengths) > 0, "evaluate.lengths", "evaluate.lengths has a 0", "give shares above 0")
        self.share("evaluate.gate", e.gate)
        self.require(
            e.enabled or not e.gate,
            "evaluate.gate",
            f"evaluate.gate asks for a recall of {e.gate:g}, but nothing is measured: evaluate.enabled is false",
            "switch one of the two: enabled = true, or gate = 0",
        )

    def rest(self) -> None:
        r, o = self.config.run, self.config.optim
        self.positive("run", "save_every_steps", "max_failed_saves")
        self.require(r.check_replicas_every >= 0, "run.check_replicas_every", "it is negative", "0 never compares")
        self.require(r.keep_last >= 2, "run.keep_last", f"keep_last is {r.keep_last}", "keep at least 2")
        self.require(r.threads >= 0, "run.threads", "run.threads is negative", "0 chooses itself")
        self.require(
            not (r.offload_activations and r.recompute == "never"),
            "run.offload_activations",
            "run.offload_activations moves the inputs of recomputed layers, and with run.recompute = never there are none",
            "set run.recompute to auto or always, or leave the key out",
        )
        self.require(
            not (o.offload and r.device == "cpu"),
            "optim.offload",
            "optim.offload moves the optimizer's state off a GPU, and run.device is cpu",
            "leave the key out on a CPU",
        )
        self.not_negative("optim", "weight_decay", "grad_clip")
        self.not_negative("run", "seed")
        self.positive("parallel", "timeout_s")
        self.positive("export", "shard_gib")
        self.require(
            re.fullmatch(r"[A-Za-z0-9.+-]*", self.config.export.license) is not None,
            "export.license",
            f"export.license is {self.config.export.license!r}, which is no identifier of a licence",
            'for example license = "apache-2.0", or "other"; leave it empty when there is none',
        )
        self.positive("tokenizer", "vocab_size", "train_bytes")
        self.not_negative("data", "verify_docs", "held_out")
        self.share("data.max_bad_share", self.config.data.max_bad_share)
        self.positive("optim", "eps")
        for key in ("beta1", "beta2"):
            self.require(0 <= getattr(o, key) < 1, f"optim.{key}", f"{key} is outside [0, 1)", "for example 0.9")
        check_sft(self.resolved)
        for i, source in enumerate(self.config.data.sources):
            key, generated = f"data.sources.{i}", source.format == "needles"
            self.require(
                bool(source.path) != generated,
                f"{key}.path" if generated else key,
                f"source {source.name!r} generates its documents and reads no path"
                if generated
                else f"source {source.name!r} has no path",
                "take the path out" if generated else "say where its files are: path = ...",
            )
            self.require(
                not generated or source.max_docs > 0,
                key,
                f"source {source.name!r} generates documents, and nothing says how many",
                "for example max_docs = 1000",
            )
        names = [source.name for source in self.config.data.sources]
        for i, name in enumerate(names):
            key = f"data.sources.{i}.name"
            why = why_not_a_name(name)
            self.require(
                why is None, key, f"{name[:60]!r} cannot be the name of a source: {why}", "for example web-2024"
            )
            self.require(name not in names[:i], key, f"two sources are named {name!r}", "rename one")
