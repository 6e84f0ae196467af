"""Where values of a configuration come from and what they may be: layers, origins by line, types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m1_stages.config.load import load_config
from m1_stages.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "m1.toml"
    path.write_text(text)
    return path


SOURCES = """preset = "tiny"

[[data.sources]]
name = "a"
domain = "code"
format = "jsonl"
path = "a.jsonl"

[[ data.sources ]]
name = "b"
"domain" = "stem"
format = "jsonl"
path = "b.jsonl"

[stages."32k"]
tokens = 1024

[stages]
128k.tokens = 4096
1m . tokens = 8192
"""


def test_origins_name_the_line_of_every_key(tmp_path: Path) -> None:
    path = write(tmp_path, SOURCES)
    resolved = load_config(path)
    lines = {
        "preset": 1, "data.sources": 3, "data.sources.0": 3, "data.sources.0.name": 4, "data.sources.0.path": 7,
        "data.sources.1": 9, "data.sources.1.name": 10, "data.sources.1.domain": 11, "data.sources.1.path": 13,
        "stages.32k.tokens": 16, "stages.128k.tokens": 19, "stages.1m.tokens": 20,
    }  # fmt: skip
    assert {key: resolved.origins[key] for key in lines} == {key: f"{path}:{line}" for key, line in lines.items()}
    assert [source.name for source in resolved.config.data.sources] == ["a", "b"]
    assert [resolved.config.stages[stage].tokens for stage in ("32k", "128k", "1m")] == [1024, 4096, 8192]
    assert resolved.base_dir == tmp_path
    assert resolved.path("x/y") == tmp_path / "x" / "y"


def test_origins_of_what_was_not_written(tmp_path: Path) -> None:
    origins = load_config(write(tmp_path, 'preset = "tiny"\n'), ["run.seed=1", "run.seed=2"]).origins
    assert origins["run.seed"] == "--set run.seed=2", "the last one counts"
    assert origins["guard.window"] == "default"
    assert origins["stages.1m.max_epochs"] == "default"
    assert origins["model"] == "preset tiny"
    assert origins["stages.32k.lr_constant_share"] == "recipe curriculum/released.toml"


def test_layers_are_merged_key_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "tiny"\n[stages.32k]\nlr_peak = 0.5\nlr_final = 0.25\n')
    stage = load_config(path, ["stages.32k.lr_final=0.125"]).config.stages["32k"]
    assert (stage.lr_peak, stage.lr_final, stage.rope_base) == (
        0.5,
        0.125,
        load_config(path).config.stages["32k"].rope_base,
    )


def test_the_preset_may_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "tiny"\n')
    other = load_config(path, ["preset=700m"])
    assert (other.config.preset, other.origins["model.hidden_size"]) == ("700m", "preset 700m")
    assert load_config(path, ["preset=tiny", "preset=700m"]).config.preset == "700m", "the last one counts"
    assert load_config(write(tmp_path, "[run]\nseed = 1\n"), ["preset=tiny"]).config.preset == "tiny"


@pytest.mark.parametrize(
    ("text", "value"),
    [("run.seed=7", 7), ("run.seed = 7", 7), ("run.seed=7.0", 7), ("run.seed=1e2", 100), ("run.dir=a b", "a b"),
     ("run.dir='7'", "7"), ("run.dir=a=b", "a=b"), ("run.tensorboard=false", False), ("optim.eps=1", 1.0),
     ("evaluate.depths=[0, 0.5]", (0.0, 0.5)), ("run . seed=3", 3), ("run.dir= a ", "a")],
)  # fmt: skip
def test_overrides_are_toml_or_text(tmp_path: Path, text: str, value: Any) -> None:
    config = load_config(write(tmp_path, 'preset = "tiny"'), [text]).config
    section, key = (part.strip() for part in text.partition("=")[0].split("."))
    found = getattr(getattr(config, section), key)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "what", "fix"),
    [
        ("run.seed=1.5", "run.seed must be a whole number, not 1.5", "give a whole number"),
        ("run.seed=true", "run.seed must be a whole number, not True", "give a whole number"),
        ("run.seed=seven", "run.seed must be a whole number, not 'seven'", "give a whole number"),
        ("run.seed='7'", "run.seed must be a whole number, not '7'", "write seed = 7"),
        ("run.seed='nan'", "run.seed must be a whole number, not 'nan'", "give a whole number"),
        ("run.seed=nan", "run.seed is nan; it must be finite", ""),
        ("run.seed=-inf", "run.seed is -inf; it must be finite", ""),
        ("optim.eps=true", "optim.eps must be a number, not True", "give a number"),
        ("optim.eps=[1]", "optim.eps must be a number, not [1]", "give a number"),
        ("run.tensorboard=0", "run.tensorboard must be true or false, not 0", "give true or false"),
        ("run.dir=7", "run.dir must be a string in quotes, not 7", "give a string in quotes"),
        ("run.device=7", "run.device is 7; it must be one of auto, cpu, cuda", "choose one of auto, cpu, cuda"),
        ("run.device=cud", "run.device is 'cud'; it must be one of auto, cpu, cuda", 'did you mean "cuda"?'),
        ("evaluate.depths=0.5", "evaluate.depths must be a list, not 0.5", "give a list"),
        ("evaluate.depths=[0, 'x']", "evaluate.depths.1 must be a number, not 'x'", "give a number"),
        ("stages.32k.domains=1", "stages.32k.domains must be a table, not 1", "give a table"),
        ("stages.32k=1", "stages.32k must be a table, not 1", "give a table"),
        ("run=[1]", "run must be a table, not [1]", "give a table"),
        ("run.sed=1", "unknown key run.sed", "did you mean seed?"),
        ("optim.zzz=1", "unknown key optim.zzz",
         "known keys here: beta1, beta2, eps, weight_decay, grad_clip, offload"),
        ("stages.32q.tokens=1", "unknown key stages.32q", "did you mean 32k?"),
        ("stages.zzz.tokens=1", "unknown key stages.zzz", "known keys here: 32k, 128k, 256k, 512k, 1m"),
    ],
)  # fmt: skip
def test_wrong_types_and_names(tmp_path: Path, text: str, what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, 'preset = "tiny"'), [text])
    assert (caught.value.what, caught.value.fix) == (what, fix)
    assert caught.value.where.startswith(f"--set {text}, key ")


def test_domains_are_a_table_of_numbers(tmp_path: Path) -> None:
    text = 'preset = "tiny"\n[stages.32k.domains]\ncode = 1\nstem = 0.5\n'
    assert load_config(write(tmp_path, text)).config.stages["32k"].domains == {"code": 1.0, "stem": 0.5}
    with pytest.raises(ConfigError, match=r"stages\.32k\.domains\.stem must be a number") as caught:
        load_config(write(tmp_path, text.replace("0.5", '"x"')))
    assert caught.value.where == f"{tmp_path}/m1.toml:4, key stages.32k.domains.stem"


def test_a_source_without_a_name_names_its_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.name is missing") as caught:
        load_config(write(tmp_path, SOURCES.replace('name = "b"\n', "")))
    assert caught.value.where == f"{tmp_path}/m1.toml:9, key data.sources.1"
    assert caught.value.fix == "add name = …"


def test_a_preset_that_is_missing_or_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "[run]\nseed = 1\n"))
    assert (caught.value.what, caught.value.fix) == ("there is no preset", 'set preset = "tiny"')
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, 'preset = "7b"\n'))
    assert caught.value.where == f"{tmp_path}/m1.toml:1, key preset"
    assert caught.value.what == "preset is '7b', which is not one of tiny, 700m, 7b-a1b, m1-456b"


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "m1.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot read the configuration") as caught:
        load_config(tmp_path / "m1.toml")
    assert caught.value.where == str(tmp_path / "m1.toml")


def test_the_hash_is_of_the_values_alone(tmp_path: Path) -> None:
    first = load_config(write(tmp_path, 'preset = "tiny"\n[run]\nseed = 5\n'))
    second = load_config(write(tmp_path, '# a word\npreset = "tiny"\n'), ["run.seed=5"])
    assert (len(first.sha256), first.sha256) == (64, second.sha256)
    assert load_config(tmp_path / "m1.toml").sha256 != first.sha256
