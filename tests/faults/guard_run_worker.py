"""Runs ``m1 pretrain``'s job once with bad samples in it, and writes every event.

Usage: python guard_run_worker.py CONFIG STAGES OUT.jsonl JOB
JOB: JSON with ``bad``: {sample id: factor of its micro-batch's loss, "nan", or "nan once"}, and ``stop_at`` a global step. A
sample id is a row of any stage, or "TOKENS:ROW" a row of the stage whose rows have so many tokens.
A stop is a SIGTERM that this process sends itself when that step is reported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from m1_stages.config.load import load_config
from m1_stages.curriculum import stages_of
from m1_stages.errors import M1Error
from m1_stages.events import Event, StepDone
from m1_stages.jobs import pretrain


def spoil(bad: dict[str, Any]) -> None:
    """Multiply the loss of micro-batches that hold a bad sample; "nan once" is used up by the first."""
    from m1_stages.training.objective import NextTokenCrossEntropy

    original = NextTokenCrossEntropy.loss

    def loss(self: NextTokenCrossEntropy, batch: Any, output: Any) -> Any:
        factor = 1.0
        tokens = batch.tokens.shape[1] // len(batch.sample_ids)
        for sample in (name for row in batch.sample_ids for name in (str(row), f"{tokens}:{row}")):
            if sample in bad:
                factor = math.nan if str(bad[sample]).startswith("nan") else float(bad[sample])
                if bad[sample] == "nan once":
                    del bad[sample]
        return original(self, batch, output * factor)

    NextTokenCrossEntropy.loss = loss  # type: ignore[method-assign]


def main(config: str, stages: str, out: str, text: str) -> int:
    job = json.loads(text)
    resolved = load_config(Path(config))
    spoil(job.get("bad", {}))
    with open(out, "a") as file:

        def sink(event: Event) -> None:
            file.write(json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}) + "\n")
            file.flush()
            if isinstance(event, StepDone) and event.global_step == job.get("stop_at", -1):
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            pretrain.run(resolved, stages_of(stages), [sink])
        except M1Error as error:
            print(error, file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
