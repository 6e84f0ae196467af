"""Checkpoints nothing can lose: a commit protocol around Megatron-Core's distributed checkpointing.

A checkpoint is written to ``step_<n>.tmp-<id>/``, flushed, described by ``MANIFEST.json`` (size and SHA-256 of every file,
position of the run, its own hash), renamed to ``step_<n>/`` (``step_<n>-<stage>/`` where another stage has that step), and only
then named in ``LATEST``. A directory without a valid manifest does not exist. On load every file is hashed and ``.metadata`` is
unpickled with an allow-list before Megatron sees it; what fails is quarantined with a message and the checkpoint before it is
tried. Missing or damaged ones are never answered with random weights.

    store = CheckpointStore(run_dir / "checkpoints")
    store.save(step, {"model": ..., "optimizer": ..., "train_state": ...}, CheckpointMeta(...))
    found = store.load_first_verified(store.committed(), build_sharded_state_dict)

Importing this package imports no torch.
"""

from m1_stages.checkpoint.manifest import CheckpointMeta, Committed
from m1_stages.checkpoint.store import CheckpointStore

__all__ = ["CheckpointMeta", "CheckpointStore", "Committed"]
