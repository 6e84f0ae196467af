"""Implements ``m1 launch slurm``: a batch script that saves in time, requeues itself, and continues."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from rich.markup import escape

from m1_data.storage.ownership import refuse_to_overwrite, write_whole
from m1_stages.config import Resolved
from m1_stages.config.load import load_config
from m1_stages.config.sft_runs import configured_runs
from m1_stages.errors import EXIT_PREEMPTED, ConfigError
from m1cli.console import console

_COMMANDS = ("pretrain", "sft")
_SCRIPT = """\
#!/bin/bash
# Written by: {written_by}
{directives}
set -u
cd -- {folder} || exit 3
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
export PYTHONSAFEPATH=1
# srun hands this on by itself only from some versions of Slurm on.
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

# Every rank exits with {saved} once it has saved. srun must not kill the slower ones for that: it waits a minute for them.
# When a rank is lost the others notice by themselves (parallel.timeout_s).
{srun}
code=$?

if [ "$code" -eq {saved} ]; then  # saved on request; scancel ends this script too, so a cancelled job stays cancelled
    echo "m1: saved; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def slurm_command(
    command: list[str], *, nodes: int, gpus_per_node: int, save_before_s: int, out: Path, container: str | None,
    options: dict[str, str | None], extra: list[str],
) -> None:  # fmt: skip
    """Write the script and print the command that submits it.

    Args:
        command: the command of each rank, from ``pretrain`` or ``sft`` on.
        save_before_s: seconds before the time limit at which the ranks are asked to save.
        options: values of sbatch options by name; None omits the option.
        extra: further sbatch options as they are written, like ``--qos=high``.

    Raises:
        ConfigError: the command does not train, sizes do not fit the nodes, a value would break the script, or ``out`` is
            another script.
    """
    resolved = _checked(command, nodes * gpus_per_node)
    settings = {
        **options, "nodes": str(nodes), "ntasks-per-node": str(gpus_per_node), "gpus-per-node": str(gpus_per_node),
        "signal": f"TERM@{save_before_s}", "open-mode": "append", "output": "%x-%j.log",
    }  # fmt: skip
    lines = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    for line in (*lines, *extra):
        if re.search(r"\s", line) or not line.startswith("-"):
            raise ConfigError(f"{line!r} is no sbatch option", fix="write it like --qos=high, without spaces")
    script = _SCRIPT.format(
        written_by=_in_one_line(["m1", *sys.argv[1:]]),
        directives="\n".join(f"#SBATCH {line}" for line in (*lines, "--requeue", *extra)),
        folder=shlex.quote(str(Path.cwd())),
        srun=_srun(command, resolved, container),
        saved=EXIT_PREEMPTED,
    )
    fix = "remove it, or give another --out"
    refuse_to_overwrite(out, what="the script (--out)", is_ours=lambda text: text == script, fix=fix)
    write_whole(out, script)
    console.print(f"wrote [bold]{escape(str(out))}[/]: {nodes} x {gpus_per_node} = {nodes * gpus_per_node} ranks; "
                  f"saves {save_before_s} s before the time limit and requeues itself", soft_wrap=True)  # fmt: skip
    console.print(f"submit it with:  sbatch {escape(shlex.quote(str(out)))}", soft_wrap=True)


def _checked(command: list[str], world: int) -> Resolved:
    """Return the configuration of the command; what the cluster would refuse is refused before it is queued."""
    if not command or command[0] not in _COMMANDS:
        raise ConfigError(
            f"{_in_one_line(command) or 'nothing'} cannot be launched",
            fix=f"after the options write -- and {' or '.join(_COMMANDS)} with its options: … -- pretrain --stage all",
        )
    if "--fresh" in command:
        raise ConfigError("--fresh would start over after every requeue", fix="rename the old checkpoints by hand once")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", type=Path, default=Path("m1.toml"))
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--name")
    known, _ = parser.parse_known_args(command[1:])
    resolved = load_config(known.config, known.set)
    runs = configured_runs(resolved.config.sft)
    if command[0] == "sft" and known.name is None and len(runs) > 1:
        raise ConfigError(
            f"a job trains one fine-tuning, and {len(runs)} are configured",
            where="key sft.runs",
            fix=f"name it, one job after the other: … -- sft --name {runs[0]}",
        )
    p = resolved.config.parallel
    for what, needed in (
        ("tensor x pipeline x context", p.tensor * p.pipeline * p.context),
        ("expert x expert_tensor x pipeline", p.expert * p.expert_tensor * p.pipeline),
    ):
        if world % needed:
            raise ConfigError(
                f"{what} = {needed} does not divide the {world} ranks of this job",
                where="[parallel]",
                fix="change --nodes or --gpus-per-node, or lower the sizes",
            )
    return resolved


def _srun(command: list[str], resolved: Resolved, container: str | None) -> str:
    words = ["srun", "--kill-on-bad-exit=0", "--wait=60", "--gpu-bind=none", "--label"]
    python = sys.executable
    if container is not None:
        folders = {Path.cwd(), resolved.base_dir, resolved.run_dir.parent, resolved.path(resolved.config.data.out)}
        words += [f"--container-image={container}", f"--container-workdir={Path.cwd()}",
                  "--container-mounts=" + ",".join(f"{folder}:{folder}" for folder in sorted(folders))]  # fmt: skip
        python = "python3"
    return shlex.join([*words, python, "-m", "m1cli", *command])


def _in_one_line(words: list[str]) -> str:
    return " ".join(shlex.join(words).split())
