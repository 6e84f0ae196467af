"""What a verification calls an error, and what it takes for a router that was undecided."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from m1_stages.errors import CheckpointError
from m1_stages.hf.verification import child
from m1_stages.hf.verification.comparison import FP32, NearTie, Reference, Rounding, bf16_products, compare, describe


def reference(texts: int = 2, length: int = 6) -> Reference:
    """Two layers, four tokens of vocabulary, all routers decided."""
    logits = torch.arange(texts * length * 4, dtype=torch.float32).view(texts, length, 4) / 10
    return Reference(
        tokens=torch.zeros(texts, length, dtype=torch.int64),
        logits=logits,
        gaps=torch.full((2, texts, length), 0.1),
    )


def test_the_largest_difference_has_a_place() -> None:
    said = reference()
    logits = said.logits.clone()
    logits[1, 3, 2] += 5e-5
    logits[0, 5, 1] -= 2e-5
    found = compare(said, logits, rounding=FP32, loader="x")
    assert found.largest == pytest.approx(5e-5, rel=0.02)
    assert (found.text, found.position, found.token) == (1, 3, 2)
    assert found.largest_logit == pytest.approx(4.7)
    assert (found.positions, found.rerouted, found.near_ties) == (12, 0, ())


def test_a_difference_is_an_error_unless_a_router_was_undecided_there_or_before() -> None:
    said = reference()
    logits = said.logits.clone()
    logits[1, 3, 2] += 0.5
    logits[1, 5, 0] += 0.3
    with pytest.raises(CheckpointError, match=r"by 0\.5 \(largest logit 4\.7\), at position 3 of text 2, token 2"):
        compare(said, logits, rounding=FP32, loader="x")
    for place in ((0, 0, 0), (1, 1, 4)):  # in another text, or later
        said.gaps[place] = 2e-6
        with pytest.raises(CheckpointError, match="position 3 of text 2"):
            compare(said, logits, rounding=FP32, loader="x")
    said.gaps[1, 1, 3] = 1e-5  # not closer than the limit
    with pytest.raises(CheckpointError, match="position 3 of text 2"):
        compare(said, logits, rounding=FP32, loader="x")
    said.gaps[0, 1, 2] = 1e-6
    found = compare(said, logits, rounding=FP32, loader="x")
    assert (found.rerouted, found.largest) == (2, 0.0)
    assert [(t.text, t.position, t.layer) for t in found.near_ties] == [(1, 2, 0), (0, 0, 0), (1, 4, 1)]
    logits[0, 3, 1] += 0.2  # explained by the tie of its own text
    assert compare(said, logits, rounding=FP32, loader="x").rerouted == 3


def test_an_export_is_not_proved_by_near_ties() -> None:
    said = reference()
    said.gaps[0, :, 0] = 1e-6
    logits = said.logits.clone()
    logits[:, :3] += 0.1
    assert compare(said, logits, rounding=FP32, loader="x").rerouted == 6
    logits[0, 3] += 0.1
    with pytest.raises(CheckpointError, match=r"7 of 12 positions .* after one of 2 near-ties .*too many to prove"):
        compare(said, logits, rounding=FP32, loader="x")


def test_other_shapes_and_values_that_are_not_finite_are_errors() -> None:
    said = reference()
    said.gaps[:] = 0.0
    with pytest.raises(CheckpointError, match=r"shape \(2, 6, 3\), the trained model \(2, 6, 4\)"):
        compare(said, said.logits[..., :3], rounding=FP32, loader="x")
    for value in (float("nan"), float("inf")):
        logits = said.logits.clone()
        logits[0, 0, 0] = value
        with pytest.raises(CheckpointError, match="not finite"):
            compare(said, logits, rounding=FP32, loader="x")


def test_rounding_to_bf16_permits_a_share_of_the_largest_logit() -> None:
    said = dataclasses.replace(reference(), logits=torch.full((1, 2, 3), -8.0), gaps=torch.ones(1, 1, 2))
    assert bf16_products(said) == Rounding(0.08, 1e-3)
    assert Rounding(1e-4, 1e-5) == FP32


def test_the_closest_near_ties_are_named() -> None:
    ties = tuple(NearTie(text=0, position=position, layer=7, gap=2e-6) for position in range(5))
    assert describe(ties[:1]) == "position 0 of text 1, layer 7, 2e-06 apart"
    assert describe(ties).endswith("position 2 of text 1, layer 7, 2e-06 apart; and 2 more")


@pytest.mark.parametrize("short", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")], ids=["host", "GPU"])
def test_a_machine_without_room_is_not_the_fault_of_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: Exception
) -> None:
    def load(*args: object, **options: object) -> None:
        raise short

    monkeypatch.setattr(transformers.MiniMaxForCausalLM, "from_pretrained", load)
    (tmp_path / "job.json").write_text(json.dumps({"loader": "transformers", "path": str(tmp_path), "device": "cpu"}))
    save_file({"tokens": torch.zeros(1, 300, dtype=torch.int64)}, tmp_path / "tokens.safetensors")
    child.main(tmp_path)
    said = json.loads((tmp_path / "error.json").read_text())
    assert said["kind"] == "EnvironmentProblem"
    assert "no memory to compute the logits of transformers" in said["what"]
