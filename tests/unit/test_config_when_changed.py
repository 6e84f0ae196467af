"""Every key says what becomes of it when it is changed in mid-stage, and that is what happens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from m1_stages.checkpoint import CheckpointMeta, Committed
from m1_stages.checkpoint.changed_settings import refuse_changes, settings_changed
from m1_stages.config import Resolved, WhenChanged
from m1_stages.config.load import load_config
from m1_stages.config.when_changed import changed_keys, recorded_values, rules
from m1_stages.curriculum import StagePlan, plan_sft, plan_stage
from m1_stages.errors import ConfigError

KEYS = sorted(rules())


@pytest.fixture
def resolved(tmp_path: Path) -> Resolved:
    path = tmp_path / "m1.toml"
    path.write_text(
        'preset = "tiny"\n[model]\nvocab_size = 400\n'
        '[[data.sources]]\nname = "a"\ndomain = "code"\nformat = "jsonl"\npath = "a.jsonl"\n'
    )
    return load_config(path)


def checkpoint(resolved: Resolved, stage: str, *, final: bool = False, **extra: Any) -> Committed:
    meta = CheckpointMeta(
        stage=stage, stage_step=3, global_step=3, stage_final=final, config_sha256="c", data_fingerprint="d",
        topology={}, decay={}, extra=extra or {"config": recorded_values(resolved)},
    )  # fmt: skip
    return Committed(Path("run/checkpoints/step_00000003"), meta, {}, "s")


def with_other_value(resolved: Resolved, key: str) -> Resolved:
    """The configuration with another value of one key, whether or not the value makes sense."""
    return dataclasses.replace(resolved, config=_with_other(resolved.config, key.split(".")))


def _with_other(section: Any, parts: list[str]) -> Any:
    first, *rest = parts
    if isinstance(section, dict):
        return section | {first: _with_other(section[first], rest)}
    value = getattr(section, first)
    return dataclasses.replace(section, **{first: _with_other(value, rest) if rest else other_value(value)})


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return "/dev/null" if value == "" else f"{value}x"
    if isinstance(value, dict):
        return {"code": 1.0}
    return (*value, *value) or (1,)


def concrete(key: str, stage: str) -> str:
    return key.replace("*", stage)


def test_every_key_has_a_rule_and_a_key_without_one_is_noticed() -> None:
    assert len(KEYS) > 100
    assert set(rules().values()) == set(WhenChanged)
    from m1_stages.config import when_changed

    @dataclasses.dataclass
    class Section:
        key: int

    with pytest.raises(TypeError, match=r"section.key does not say"):
        dict(when_changed._rules(Section, "section.", None))


@pytest.mark.parametrize("key", KEYS)
def test_a_key_changed_in_mid_stage(resolved: Resolved, key: str) -> None:
    plan = plan_sft(resolved, 8) if key.startswith("sft.") else plan_stage(resolved, "128k")
    key, rule = concrete(key, "128k"), rules()[key]
    changed = with_other_value(resolved, key)
    before = checkpoint(resolved, plan.stage)
    assert [(c.key, c.rule) for c in changed_keys(before.meta.extra["config"], changed)] == [(key, rule)]
    if rule in (WhenChanged.FIXED_FOR_RUN, WhenChanged.FIXED_IN_STAGE):
        expected = (
            "fixed for the run"
            if rule is WhenChanged.FIXED_FOR_RUN
            else f"fixed within {plan.title}, which is at step 3"
        )
        with pytest.raises(ConfigError, match=expected) as refused:
            refuse_changes([before], changed, plan)
        old = before.meta.extra["config"][key]
        assert key in str(refused.value)
        assert f"key {key}" in refused.value.where
        assert repr(old) in refused.value.fix
        return
    refuse_changes([before], changed, plan)
    event = settings_changed(before, changed, plan, 3)
    if rule is WhenChanged.APPLIED:
        assert event is not None
        new = recorded_values(changed)[key]
        assert event.changes == [{"key": key, "old": before.meta.extra["config"][key], "new": new}]
    else:
        assert event is None


@pytest.mark.parametrize(
    "key", [k for k in KEYS if rules()[k] is WhenChanged.FIXED_IN_STAGE and not k.startswith("sft.")]
)
def test_a_key_of_the_stage_may_change_between_stages_and_is_said(resolved: Resolved, key: str) -> None:
    plan, key = plan_stage(resolved, "256k"), concrete(key, "256k")
    changed, before = with_other_value(resolved, key), checkpoint(resolved, "128k", final=True)
    refuse_changes([before], changed, plan)
    event = settings_changed(before, changed, plan, 0)
    assert event is not None
    assert [c["key"] for c in event.changes] == [key]


def finished(resolved: Resolved, plan: StagePlan) -> Committed:
    return checkpoint(resolved, plan.stage, final=True)


@pytest.mark.parametrize("key", ["sft.lr_peak", "sft.epochs", "sft.base_stage", "sft.data", "sft.lr_warmup_share"])
def test_finished_fine_tuning_with_other_settings_is_not_taken_for_done(resolved: Resolved, key: str) -> None:
    plan = plan_sft(resolved, 8)
    with pytest.raises(ConfigError, match="finished") as refused:
        refuse_changes([finished(resolved, plan)], with_other_value(resolved, key), plan)
    assert "m1 sft --fresh" in refused.value.fix


def test_a_finished_stage_keeps_its_rate_and_does_not_mind_what_later_stages_use(resolved: Resolved) -> None:
    plan = plan_stage(resolved, "32k")
    done = finished(resolved, plan)
    with pytest.raises(ConfigError, match=r"stages.32k.lr_peak .*too late: stage 32k is finished"):
        refuse_changes([done], with_other_value(resolved, "stages.32k.lr_peak"), plan)
    for key in ("optim.beta1", "guard.window", "stages.128k.lr_peak", "stages.128k.tokens", "sft.epochs"):
        refuse_changes([done], with_other_value(resolved, key), plan)


def test_the_mix_of_the_stage_before_counts_while_rows_move_away_from_it(resolved: Resolved) -> None:
    plan = plan_stage(resolved, "256k")
    here = checkpoint(resolved, "256k")
    with pytest.raises(ConfigError, match=r"stages.128k.short"):
        refuse_changes([here], with_other_value(resolved, "stages.128k.short"), plan)
    refuse_changes([here], with_other_value(resolved, "stages.128k.tokens"), plan)
    refuse_changes([here], with_other_value(resolved, "stages.32k.short"), plan)


def test_fine_tuning_says_when_the_rope_base_of_its_base_changed(resolved: Resolved) -> None:
    plan, done = plan_sft(resolved, 8), checkpoint(resolved, "1m", final=True)
    event = settings_changed(done, with_other_value(resolved, "stages.1m.rope_base"), plan, 0)
    assert event is not None
    assert [c["key"] for c in event.changes] == ["stages.1m.rope_base"]


def test_a_changed_decay_table_is_noticed_under_the_same_name(resolved: Resolved) -> None:
    table = resolved.base_dir / "table.json"
    table.write_text("{}")
    config = resolved.config
    custom = dataclasses.replace(config.curriculum, custom_table="table.json")
    resolved = dataclasses.replace(resolved, config=dataclasses.replace(config, curriculum=custom))
    before = checkpoint(resolved, "128k")
    refuse_changes([before], resolved, plan_stage(resolved, "128k"))
    table.write_text("{ }")
    with pytest.raises(ConfigError, match=r"curriculum.custom_table .*SHA-256"):
        refuse_changes([before], resolved, plan_stage(resolved, "128k"))


def test_a_checkpoint_without_a_configuration_says_so_and_still_fixes_the_model(resolved: Resolved) -> None:
    plan = plan_stage(resolved, "128k")
    old = checkpoint(resolved, "128k", model=dict(resolved.as_dict()["model"]))
    refuse_changes([old], resolved, plan)
    event = settings_changed(old, resolved, plan, 3)
    assert event is not None
    assert "does not record its configuration" in event.note
    assert event.changes == []
    with pytest.raises(ConfigError, match=r"model.num_layers 8 -> 9: fixed for the run"):
        refuse_changes([old], with_other_value(resolved, "model.num_layers"), plan)
