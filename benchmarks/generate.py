"""Generation on one device: decoding a full batch, against the bandwidth it needs at least and against transformers; prefill.

    python benchmarks/generate.py [--preset 700m] [--batch 64] [--prompt 1024] [--tokens 256] [--prefill 131072] [--json OUT]
    python benchmarks/generate.py --config RUN/m1.toml --stage sft     # the weights of a trained run
    CUDA_VISIBLE_DEVICES= python benchmarks/generate.py --preset tiny --device cpu --batch 4 --prompt 40 --tokens 24 --prefill 700

``ours`` is the engine behind ``m1 generate``, through its public interface; ``transformers`` is ``MiniMaxForCausalLM.generate``
with the same weights, in the same precision or, where that fails, in fp32 (printed), all prompts of one length, so that nothing
is padded. Without ``--config`` weights are random, with matrices scaled so that every layer counts. Decoding is timed from the
moment when all prompts are read and every answer has begun. ``sampled`` draws with temperature 1, ``filtered`` with top-p 0.95.

The bandwidth bound of a step that gives B rows a token, with weights of w bytes each:
    weights   w * (all matrices but the embedding and the experts, and E (1 - (1 - k/E)^B) of the E experts of each layer: the
              expected number that B rows with k experts each touch, chosen evenly)
    states    2 * B * 4 * H * D * D bytes a lightning layer: read and written in fp32
    KV        2 * B * w * KV * D * n a softmax layer: read for n tokens before, the mean over the timed steps
    bound     their sum / bandwidth; share = bound / measured time
The bandwidth is the maker's figure for the GPU (printed); beside it stands the copy rate that a copy of 4 GiB reaches here.

Prefill is one prompt of ``--prefill`` tokens, read at once and in pieces of a quarter, against the forward pass of training over
the same tokens (loss of every token, no gradients). ``kernels`` is the part in ``generate_kernels.py``. Checked, else the exit
code is 1: with ``--config``, or in fp32, the probabilities of drawn tokens of four prompts against the forward pass of training
(correlation at least 0.999; random weights in bf16 give nearly equal probabilities to all tokens, between which rounding
differs by more, so there it is printed only), in fp32 the greedy tokens of transformers, and every kernel of a step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m1_stages.config import ModelConfig, ParallelConfig
from m1_stages.config.load import load_config
from m1_stages.decay import released_slopes
from m1_stages.runtime import device as devices
from m1_stages.runtime import parallel

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "H800": 3.35e12, "A100": 2.04e12, "B200": 8e12}
ROPE_BASE = 1e6
LEAST_CORRELATION = 0.999
PARTS = ("decode", "kernels", "correlation", "transformers", "prefill", "states")


class Bench:
    """One model, and what is measured with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.broken = args, False
        self.device = devices.use(args.device)
        self.layout = ParallelConfig()
        parallel.start(self.layout, device=self.device, seed=0)
        from m1_stages.model import build_model

        committed = None
        if args.config:
            from m1_stages.jobs.export import choose_checkpoint

            resolved = load_config(Path(args.config), [])
            committed = choose_checkpoint(resolved, stage=args.stage, checkpoint=None)
            self.shape = ModelConfig(**committed.meta.extra["model"])
        else:
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "m1.toml").write_text(f'preset = "{args.preset}"\n')
                resolved = load_config(Path(folder) / "m1.toml", args.set)
            self.shape = resolved.config.model
            if not self.shape.vocab_size:
                self.shape = ModelConfig(**{**resolved.as_dict()["model"], "vocab_size": 512})
        self.precision = args.precision or resolved.config.run.precision
        self.chunks = build_model(
            self.shape, parallel=self.layout, precision=self.precision, rope_base=ROPE_BASE, device=self.device.name
        )
        self.slopes = released_slopes(self.shape.num_layers, self.shape.num_heads)
        self.chunks.set_slopes(self.slopes)
        if committed is not None:
            from m1_stages.generation.loading import load_weights

            load_weights(self.chunks, committed)
            self.slopes = committed.meta.decay["slopes"]
        else:
            self._strengthen()
        self.model = self.chunks[0].eval()
        self.results: dict[str, Any] = {"args": vars(args), "precision": self.precision, "torch": torch.__version__}
        generator = torch.Generator().manual_seed(7)
        self.prompts = torch.randint(0, self.shape.vocab_size, (args.batch, args.prompt), generator=generator).tolist()

    @torch.no_grad()
    def _strengthen(self) -> None:
        """Scale matrices so that a product's outputs have the size of its inputs, as in a trained model."""
        for name, parameter in self.chunks[0].named_parameters():
            if parameter.dim() > 1 and "embedding" not in name:
                parameter.mul_(parameter.shape[-1] ** -0.5 / float(parameter.float().std()))

    def engine(self, **sizes: int) -> Any:
        """A fresh engine on the model."""
        from m1_stages.generation import Engine, EngineOptions, Replica

        return Engine(self.model, EngineOptions(**sizes), replica=Replica.of(self.layout))

    def run(self) -> None:
        """Measure and print everything."""
        name = self.device.gpu_name() or "CPU"
        print(f"{self.args.config or self.args.preset}, {self.precision}, {name}, torch {torch.__version__}")
        for part in self.args.only or PARTS:
            before = set(self.results)
            try:
                getattr(self, f"_{part}")()
            except Exception as error:  # the other parts are measured all the same
                traceback.print_exc()
                self.broken = True
                self.results[f"{part} failed"] = f"{type(error).__name__}: {error}"
            print(json.dumps({k: v for k, v in self.results.items() if k not in before}), flush=True)
            self._free()

    def _free(self) -> None:
        """Give back what a part has left, so that the next one has all the memory."""
        gc.collect()
        if self.device.name == "cuda":
            torch.cuda.empty_cache()

    def _decode(self) -> None:
        from m1_stages.generation import Request, Sampling

        a = self.args
        engine = self.engine(slots=a.batch, capacity=a.prompt + a.tokens + 64, steps=a.steps)
        kinds = {
            "greedy": Sampling(temperature=0.0), "sampled": Sampling(), "filtered": Sampling(top_p=0.95),
        }  # fmt: skip
        bound, parts = self._bound()
        copied = self._copy_rate()
        for kind, sampling in kinds.items():
            rates = []
            for _ in range(a.repeats):
                for prompt in self.prompts:
                    engine.submit(Request(prompt=prompt, max_tokens=a.tokens, sampling=sampling))
                begun: set[int] = set()
                while len(begun) < a.batch:
                    begun |= {update.request for update in engine.step()}
                self._wait()
                start, tokens = time.perf_counter(), 0
                while not engine.is_idle:
                    tokens += sum(len(update.tokens) for update in engine.step())
                self._wait()
                rates.append(tokens / (time.perf_counter() - start))
            rate = statistics.median(rates)
            step_ms = 1e3 * a.batch / rate
            self.results[f"decode {kind}"] = {"tokens_per_s": rates, "step_ms": step_ms, "bound_bytes": bound}
            line = f"decode {kind:9} batch {a.batch}: {rate:12,.0f} tokens/s, {step_ms:.3f} ms a step"
            if copied:
                spec = next((b for gpu, b in BANDWIDTH.items() if gpu in self.device.gpu_name()), copied)
                share, of_copy = (1e3 * bound / b / step_ms for b in (spec, copied))
                line += f", {share:.1%} of the bound at {spec / 1e12:.2f} TB/s, {of_copy:.1%} at the copy rate"
                line += f" {copied / 1e12:.2f} TB/s"
                self.results[f"decode {kind}"] |= {"share": share, "share_of_copy_rate": of_copy}
            print(line, flush=True)
        print(
            "bytes a step: "
            + ", ".join(f"{k} {v / 1e6:,.1f} MB" for k, v in parts.items())
            + f"; sum {bound / 1e6:,.1f} MB"
        )
        self.results["bytes"] = parts

    def _kernels(self) -> None:
        from generate_kernels import measure

        measure(self)

    def _bound(self) -> tuple[float, dict[str, float]]:
        c, a = self.shape, self.args
        experts = sum(p.nbytes for n, p in self.model.named_parameters() if ".experts." in n)
        dense = sum(p.nbytes for n, p in self.model.named_parameters() if ".experts." not in n and "embedding" not in n)
        touched = 1 - (1 - c.experts_per_token / c.num_experts) ** a.batch
        softmax = sum(c.is_softmax(layer) for layer in range(c.num_layers))
        width = 2 if self.precision == "bf16" else 4
        tokens = a.prompt + a.tokens / 2
        parts = {
            "weights": dense + touched * experts,
            "states": 2.0 * a.batch * 4 * c.num_heads * c.head_dim**2 * (c.num_layers - softmax),
            "KV": 2.0 * a.batch * width * c.num_kv_heads * c.head_dim * tokens * softmax,
        }
        return sum(parts.values()), parts

    def _correlation(self) -> None:
        """Probabilities of drawn tokens against those of the forward pass of training."""
        from m1_stages.generation import Request, Sampling

        engine = self.engine(slots=4, capacity=self.args.prompt + 64)
        asked = [Request(prompt=p, max_tokens=64, sampling=Sampling(seed=1)) for p in self.prompts[:4]]
        ours, theirs = [], []
        for request, (done,) in zip(asked, engine.generate(asked), strict=True):
            text = torch.tensor([*request.prompt, *done.tokens])
            with torch.no_grad():
                logits = self.model(self._batch(text), logits=True)[0, len(request.prompt) - 1 : -1]
            taken = logits.log_softmax(-1).gather(1, text[len(request.prompt) :, None].to(logits.device))[:, 0]
            theirs += taken.exp().tolist()
            ours += torch.tensor(done.logprobs).exp().tolist()
        correlation = statistics.correlation(ours, theirs)
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        self.results["correlation"] = {"correlation": correlation, "largest_difference": worst}
        checked = bool(self.args.config) or self.precision == "fp32"
        self.broken |= checked and not correlation >= LEAST_CORRELATION
        print(f"probabilities of {len(ours)} drawn tokens against the training forward: correlation {correlation:.6f}, "
              f"largest difference {worst:.2g}{'' if checked else ' (not checked: random weights)'}", flush=True)  # fmt: skip

    def _transformers(self) -> None:
        from m1_stages.generation import Request, Sampling

        model, dtype = self._transformers_model()
        a, ids = self.args, torch.tensor(self.prompts, device=self.device.torch_device)

        def generate(tokens: int) -> Tensor:
            with torch.inference_mode():
                out: Tensor = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                    pad_token_id=0,
                )  # fmt: skip
            return out[:, ids.shape[1] :]

        tokens = min(a.tokens, a.transformers_tokens)
        generate(2)
        first = self._timed(lambda: generate(1))
        found: list[Tensor] = []
        rate = a.batch * (tokens - 1) / (self._timed(lambda: found.append(generate(tokens))) - first)
        if "decode greedy" not in self.results:
            self._decode()
        ours = statistics.median(self.results["decode greedy"]["tokens_per_s"])
        engine = self.engine(slots=a.batch, capacity=a.prompt + tokens)
        asked = [Request(prompt=p, max_tokens=tokens, sampling=Sampling(temperature=0.0)) for p in self.prompts]
        mine = torch.tensor([done.tokens for (done,) in engine.generate(asked)])
        equal = float((mine == found[0].cpu()).float().mean())
        self.results["transformers"] = {"tokens_per_s": rate, "dtype": str(dtype), "ratio": ours / rate, "equal": equal}
        portable = self.slopes == released_slopes(self.shape.num_layers, self.shape.num_heads)
        self.broken |= self.precision == "fp32" and portable and equal < 1.0
        print(f"transformers ({dtype}), decode only: {rate:,.0f} tokens/s; ours is {ours / rate:,.1f} times as fast; "
              f"{equal:.1%} of {mine.numel()} greedy tokens equal", flush=True)  # fmt: skip

    def _transformers_model(self) -> tuple[Any, torch.dtype]:
        """The same weights in transformers; bf16 where its decoding runs in it."""
        from safetensors.torch import save_file
        from transformers import MiniMaxConfig, MiniMaxForCausalLM
        from transformers.utils import logging

        from m1_stages.hf.tensor_names import to_released

        c = self.shape
        alpha, beta = c.residual_alpha, c.beta
        config = MiniMaxConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim,
            intermediate_size=c.expert_hidden_size, num_local_experts=c.num_experts,
            num_experts_per_tok=c.experts_per_token, rms_norm_eps=c.norm_eps, block_size=256,
            rope_parameters={"rope_type": "default", "rope_theta": self.chunks.rope_base},
            layer_types=["full_attention" if c.is_softmax(n) else "linear_attention" for n in range(c.num_layers)],
            full_attn_alpha_factor=alpha, linear_attn_alpha_factor=alpha, mlp_alpha_factor=alpha,
            full_attn_beta_factor=beta, linear_attn_beta_factor=beta, mlp_beta_factor=beta,
            max_position_embeddings=self.args.prompt + self.args.tokens, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            tensors = {}
            for name, parameter in self.model.named_parameters():
                for released, tensor in to_released(name, parameter.detach().cpu(), c):
                    tensors[released] = tensor.contiguous().clone()
            save_file(tensors, str(Path(folder) / "model.safetensors"), metadata={"format": "pt"})
            del tensors
            logging.set_verbosity_error()  # it misses the decay buffers, which it computes
            logging.disable_progress_bar()
            dtypes = [torch.bfloat16, torch.float32] if self.precision == "bf16" else [torch.float32]
            for dtype in dtypes:
                model = MiniMaxForCausalLM.from_pretrained(folder, dtype=dtype).to(self.device.torch_device).eval()
                probe = torch.zeros(1, 3, dtype=torch.int64, device=self.device.torch_device)
                try:
                    with torch.inference_mode():
                        model.generate(
                            probe, attention_mask=torch.ones_like(probe), max_new_tokens=3, do_sample=False, pad_token_id=0
                        )  # fmt: skip
                    return model, dtype
                except RuntimeError as error:
                    print(f"transformers in {dtype}: {str(error).splitlines()[0]}")
        raise ImportError("its generate fails in every precision")

    def _prefill(self) -> None:
        from m1_stages.generation import Request, Sampling

        n = self.args.prefill
        generator = torch.Generator().manual_seed(8)
        text = torch.randint(0, self.shape.vocab_size, (n,), generator=generator)
        batch = self._batch(text)

        def training() -> None:
            with torch.no_grad():
                self.model(batch)

        training()
        forward = n / statistics.median([self._timed(training) for _ in range(self.args.repeats)])
        print(f"training forward over {n:,} tokens: {forward:,.0f} tokens/s", flush=True)
        self.results["prefill"] = {"training": forward}
        for pieces in (1, 4):
            engine = self.engine(slots=1, capacity=n + 1, prefill_tokens=-(-n // pieces))
            asked = [Request(prompt=text.tolist(), max_tokens=1, sampling=Sampling(temperature=0.0))]
            engine.generate(asked)
            rate = n / statistics.median(
                [self._timed(partial(engine.generate, asked)) for _ in range(self.args.repeats)]
            )
            self.results["prefill"][f"{pieces} pieces"] = rate
            print(
                f"prefill in {pieces} piece{'s' if pieces > 1 else ''}: {rate:,.0f} tokens/s, {rate / forward:.1%} of it",
                flush=True,
            )
            del engine

    def _states(self) -> None:
        """Bytes of the states of one answer at 1K and at 64K tokens."""
        from m1_stages.generation.states import SlotStates

        self.results["state bytes"] = {
            str(n): SlotStates(
                self.shape, slots=1, capacity=n, tp=1, dtype=self.model.output_layer.weight.dtype,
                device=self.device.torch_device,
            ).num_bytes()
            for n in (1024, 65_536)
        }  # fmt: skip
        lightning = {sizes["lightning"] for sizes in self.results["state bytes"].values()}
        self.broken |= len(lightning) > 1
        print(f"recurrent states of an answer at 1,024 and 65,536 tokens: {sorted(lightning)} bytes")

    def _batch(self, text: Tensor) -> Any:
        from m1_data.sampling.loader import PackedBatch

        n = len(text)
        return PackedBatch(
            tokens=text[None], labels=text.roll(-1)[None], loss_mask=torch.ones(1, n), position_ids=torch.arange(n)[None],
            cu_seqlens=torch.tensor([0, n], dtype=torch.int32), doc_lengths=(n,), sample_ids=(0,), trained_tokens=n,
        ).to(self.device.torch_device)  # fmt: skip

    def _copy_rate(self) -> float:
        """Bytes read and written per second by a copy of 4 GiB; 0 on a CPU."""
        if self.device.name == "cpu":
            return 0.0
        x = torch.empty(2**31, dtype=torch.bfloat16, device="cuda")
        y = torch.empty_like(x)
        y.copy_(x)
        return 2 * x.nbytes / min(self._timed(lambda: y.copy_(x)) for _ in range(5))

    def _timed(self, action: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.name == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="700m")
    parser.add_argument("--config", help="configuration of a run whose final checkpoint is measured")
    parser.add_argument("--stage", help="with --config: stage of the checkpoint; default: the newest final one")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: the configuration's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each answer")
    parser.add_argument("--transformers-tokens", type=int, default=32, help="tokens of each answer of transformers")
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part alone; can be repeated")
    parser.add_argument("--prefill", type=int, default=131_072)
    parser.add_argument("--steps", type=int, default=8, help="decoding steps between two looks of the host")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="write everything here")
    args = parser.parse_args()
    bench = Bench(args)
    try:
        bench.run()
    finally:
        if args.json:
            Path(args.json).write_text(json.dumps(bench.results, indent=1) + "\n")
        parallel.stop()
    sys.exit(1 if bench.broken else 0)


if __name__ == "__main__":
    main()
