"""Defines the command line of ``m1 generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from m1_stages.errors import ConfigError
from m1cli.errors import reported
from m1cli.options import DEFAULT_CONFIG, ConfigOption, DebugOption, GpusOption, SetOption


def generate(
    ctx: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none or - reads standard input.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    overrides: SetOption = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help='.jsonl with "prompt" or "messages" a line, or any text, one a line.'
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Stage whose final checkpoint answers (32k to 1m, sft, sft-NAME); default: the newest."),
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="One checkpoint directory instead of a stage.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw", help="Ask through the chat template, or continue the text; default: chat after fine-tuning."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON Lines file for the answers; default: the terminal.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 256,
    min_tokens: Annotated[int, typer.Option(help="Fewest tokens of an answer.", min=0)] = 0,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answers.")] = 0,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Answers to each prompt.", min=1)] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends an answer; can be repeated.")] = None,
    stop_id: Annotated[list[int] | None, typer.Option(help="Token that ends an answer; can be repeated.")] = None,
    repetition_tokens: Annotated[
        int, typer.Option(help="End an answer after so many tokens that are each nearly certain; 0: never.", min=0)
    ] = 3000,
    repetition_probability: Annotated[float, typer.Option(help="What nearly certain means.")] = 0.99,
    thinking_budget: Annotated[
        int | None, typer.Option(help="Most tokens of the reasoning; then it is closed, and the answer follows.", min=0)
    ] = None,
    slots: Annotated[int, typer.Option(help="Answers that are written at the same time.", min=1)] = 64,
    context: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer; default: the longest trained context.", min=1)
    ] = None,
    prefill_tokens: Annotated[int, typer.Option(help="Prompt tokens that are read at once.", min=1)] = 32_768,
    serve: Annotated[
        bool, typer.Option("--serve", help="Answer OpenAI's HTTP interface instead, on one device, until Ctrl-C.")
    ] = False,
    host: Annotated[str, typer.Option(help="With --serve: the address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="With --serve: its port; 0 takes a free one.", min=0, max=65535)] = 8000,
    gpus: GpusOption = None,
    debug: DebugOption = False,
) -> None:
    """Generate text with a checkpoint: continue prompts, answer them as a chat, or serve them over HTTP."""
    with reported(debug):
        refuse_unused(ctx, serve=serve)
    if serve:
        with reported(debug):
            from m1cli.commands.serve import serve_command

            serve_command(
                config,
                overrides or [],
                stage=stage,
                checkpoint=checkpoint,
                host=host,
                port=port,
                slots=slots,
                context=context,
                prefill_tokens=prefill_tokens,
            )
        return
    with reported(debug, prints_result=out is None):
        from m1_stages.generation import Repetition, Sampling
        from m1_stages.jobs.generate_options import GenerateOptions
        from m1cli.commands.generate import generate_command

        options = GenerateOptions(
            stage=stage,
            checkpoint=checkpoint,
            chat=chat,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
            samples=samples,
            stop_strings=tuple(stop or ()),
            stop_ids=tuple(stop_id or ()),
            repetition=Repetition(tokens=repetition_tokens, probability=repetition_probability)
            if repetition_tokens
            else None,
            thinking_budget=thinking_budget,
            slots=slots,
            context=context,
            prefill_tokens=prefill_tokens,
        )
        generate_command(config, overrides or [], options, prompts or [], file, gpus=gpus, out=out, overwrite=overwrite)


_SERVING = {"serve", "host", "port"}
_ALSO_SERVING = {"config", "overrides", "stage", "checkpoint", "slots", "context", "prefill_tokens", "debug"}


def refuse_unused(ctx: typer.Context, *, serve: bool) -> None:
    """Refuse options that would have no effect: each request to a server has its own.

    Raises:
        ConfigError: one was given.
    """
    for parameter in ctx.command.params:
        name = parameter.name or ""
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and ctx.params.get(name) not in (None, [], ()):
            option = parameter.opts[0] if parameter.opts[0].startswith("-") else "a prompt"
            if serve and name not in _SERVING | _ALSO_SERVING:
                raise ConfigError(f"{option} has no effect with --serve", fix="leave it out: each request says it")
            if not serve and name in _SERVING:
                raise ConfigError(f"{option} needs --serve", fix="add --serve, or leave it out")
