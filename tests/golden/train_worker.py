"""Runs ``m1 pretrain``'s job once, in a process of its own, and writes every step it made.

Usage: python train_worker.py CONFIG STAGES OUT.jsonl [STOP_AT_GLOBAL_STEP]
A stop is a SIGTERM this process sends itself when that step is reported.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from m1_stages.config.load import load_config
from m1_stages.curriculum import stages_of
from m1_stages.errors import M1Error
from m1_stages.events import Event, StepDone
from m1_stages.jobs import pretrain


def main(config: str, stages: str, out: str, stop_at: str = "-1") -> int:
    with open(out, "a") as file:

        def sink(event: Event) -> None:
            if isinstance(event, StepDone):
                exact = [event.loss.hex(), event.grad_norm.hex(), event.lr.hex(), event.aux_loss.hex()]
                file.write(json.dumps([event.stage, event.global_step, exact, event.sample_ids, event.loss]) + "\n")
                file.flush()
                if event.global_step == int(stop_at):
                    os.kill(os.getpid(), signal.SIGTERM)

        try:
            pretrain.run(load_config(Path(config)), stages_of(stages), [sink])
        except M1Error as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
