"""The configuration is refused before anything starts, naming file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from m1_stages.config import PRESETS, STAGE_NAMES
from m1_stages.config.load import RENAMED, load_config
from m1_stages.config.when_changed import recorded_values
from m1_stages.errors import ConfigError
from m1cli.app import app


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "m1.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_resolves(tmp_path: Path, preset: str) -> None:
    config = load_config(write(tmp_path, f'preset = "{preset}"')).config
    assert tuple(config.stages) == STAGE_NAMES
    lengths = [config.seq_len(stage) for stage in STAGE_NAMES]
    assert [length // lengths[0] for length in lengths] == [1, 4, 8, 16, 32]
    assert all(config.num_steps(stage) > 0 for stage in STAGE_NAMES)


def test_published_numbers_of_the_released_curriculum(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, 'preset = "m1-456b"')).config
    stages = config.stages
    assert [stages[s].tokens for s in STAGE_NAMES] == [
        7_500_000_000_000, 300_000_000_000, 64_000_000_000, 32_000_000_000, 26_000_000_000,
    ]  # fmt: skip
    assert {stages[s].rope_base for s in STAGE_NAMES} == {1e7}
    assert (stages["1m"].short, stages["1m"].medium, stages["1m"].long) == (0.30, 0.30, 0.40)
    assert config.model.residual_alpha == pytest.approx(3.5565588200778455, abs=0)


def test_origins_name_file_line_preset_flag_and_default(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "tiny"\n\n[run]\nseed = 7\n')
    origins = load_config(path, ["optim.grad_clip=0.5"]).origins
    assert origins["run.seed"] == f"{path}:4"
    assert origins["model.hidden_size"] == "preset tiny"
    assert origins["stages.32k.rope_base"] == "recipe curriculum/released.toml"
    assert origins["optim.grad_clip"] == "--set optim.grad_clip=0.5"
    assert origins["run.keep_last"] == "default"


@pytest.mark.parametrize(
    ("text", "what", "line", "fix"),
    [
        ('preset = "tiny"\n[model]\nhiden_size = 64', "unknown key model.hiden_size", 3, "did you mean hidden_size?"),
        ('preset = "tiny"\n[optm]\nx = 1', "unknown key optm", 2, "did you mean optim?"),
        ('preset = "tiny"\n[run]\n\nseed = "7"', "run.seed must be a whole number, not '7'", 4, "write seed = 7"),
        ('preset = "tiny"\n[run]\ntensorboard = 1', "run.tensorboard must be true or false, not 1", 3, "true or false"),
        ('preset = "tiny"\n[run]\nrecompute = true', "run.recompute is True; it must be one of auto, always, never", 3, ""),
        (
            'preset = "tiny"\n[run]\nrecompute = "never"\noffload_activations = true',
            "moves the inputs of recomputed layers",
            4,
            "set run.recompute to auto or always",
        ),
        ('preset = "tiny"\n[run]\ndevice = "cpu"\n[optim]\noffload = true', "run.device is cpu", 5, "leave the key out"),
        ('preset = "tiny"\n[model]\nnum_heads = 12', "num_heads is 12, not a power of two", 3, "use 1, 2, 4"),
        ('preset = "tiny"\n[stages.64k]\ntokens = 1', "unknown key stages.64k", 2, "did you mean 256k?"),
        ('preset = "tiny"\n[stages.32k]\nlr_peak = inf', "stages.32k.lr_peak is inf; it must be finite", 3, ""),
        ('preset = "tiny"\n[stages.1m]\nshort = 0.9', "short + medium + long = 1.6", 3, "make them sum to 1"),
        ('preset = "tiny"\n[curriculum]\ndecay = "relaxed"', "curriculum.decay is 'relaxed'", 3, 'did you mean "relax"?'),
        ('preset = "tiny"\n[parallel]\ncontext = 3', "do not divide into 6 equal parts", 3, "2 * parallel.context"),
        ('preset = "tiny"\n[parallel]\nvirtual_pipeline = 2', "there is no pipeline to interleave", 3, "parallel.pipeline to 2"),
        ('preset = "tiny"\n[parallel]\npipeline = 3\nvirtual_pipeline = 3', "9 chunks (pipeline 3 x virtual", 4, "lower"),
        ('preset = "tiny"\n[parallel]\noverlap_param_gather = true', "without distributed_optimizer", 3, "= false"),
        ('preset = "tiny"\n[parallel]\ndispatcher = "all2all"', "parallel.dispatcher is 'all2all'", 3, "alltoall"),
        ('preset = "tiny"\n[parallel]\npipeline = 16', "the model 8 layers: some chunks would be empty", 3, "lower"),
        ('preset = "tiny"\n[parallel]\npipeline = 2\npipeline_layers = [5, 4]', "needed are 2", 4, "leave it empty"),
        ('preset = "tiny"\n[parallel]\npipeline = 2\npipeline_layers = [8]', "1 chunks with 8 layers", 4, "leave it"),
        ('preset = "tiny"\n[parallel]\npipeline = 2\npipeline_layers = [8, 0]', "at least one layer", 4, "leave it"),
        ('preset = "tiny"\nrun = 3', "run must be a table, not 3", 2, ""),
        ('preset = "tiny"\n[[data.sources]]\nname = "a"\ndomain = "code"\nformat = "jsonl"\npth = "x"', "pth", 6, "path"),
        ('preset = "tiny"\n[[data.sources]]\nname = "a"\ndomain = "code"\nformat = "jsonl"', "has no path", 2, "path = ..."),
        ('preset = "tiny"\n[[data.sources]]\nname = "a"\ndomain = "code"\nformat = "needles"', "says how many", 2, "max_docs"),
        ('preset = "tiny"\n[data]\nheld_out = -1', "held_out is -1", 3, "give 0 or more"),
        ('preset = "tiny"\n[evaluate]\ndepths = [0.0, 1.5]', "evaluate.depths is 1.5", 3, "give 0 to 1"),
        ('preset = "tiny"\n[evaluate]\nlengths = []', "evaluate.lengths is empty", 3, "evaluate.enabled = false"),
        ('preset = "tiny"\n[evaluate]\nenabled = false\ngate = 0.5', "nothing is measured", 4, "gate = 0"),
        ('preset = "tinny"', "preset is 'tinny'", 1, 'set preset = "tiny"'),
        ('preset = "tiny"\nseed = = 3', "not valid TOML", 2, "correct that line"),
        ('preset = "tiny"\n[run]\nseed = ' + "9" * 400, "run.seed is an integer of more than 64 bits", 3, "correct that line"),
        ('preset = "tiny"\n[run]\nseed = -0x' + "f" * 5000, "not valid TOML", 3, "correct that line"),
        ('preset = "tiny"\n[run]\nseed = [0x' + "f" * 5000 + "]", "run.seed.0 is an integer of more than 64 bits", 3, ""),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, text: str, what: str, line: int, fix: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert what in caught.value.what
    assert caught.value.where.startswith(f"{path}:{line}")
    assert fix in caught.value.fix
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_is_refused_with_its_new_name(tmp_path: Path, old: str) -> None:
    section, key = old.rsplit(".", 1)
    in_file = write(tmp_path, f'preset = "tiny"\n[{section}]\n{key} = 1\n')
    with pytest.raises(ConfigError) as caught:
        load_config(in_file)
    assert caught.value.what == f"{old} was renamed: write {RENAMED[old]}"
    assert caught.value.where.startswith(f"{in_file}:3")
    assert caught.value.exit_code == 2
    bare = write(tmp_path, 'preset = "tiny"\n')
    with pytest.raises(ConfigError, match="was renamed") as caught:
        load_config(bare, [f"{old}=1"])
    assert caught.value.where.startswith(f"--set {old}=1")
    new = load_config(bare, [f"{RENAMED[old]}=1"]).config
    assert getattr(getattr(new, section), RENAMED[old].rsplit(".", 1)[1]) == 1


def test_the_command_refuses_a_renamed_key_with_exit_code_2(tmp_path: Path) -> None:
    write(tmp_path, 'preset = "tiny"\n[guard]\ncalm_steps = 3\n')
    done = CliRunner().invoke(app, ["config", "show", "--config", str(tmp_path / "m1.toml")])
    assert done.exit_code == 2
    assert "write guard.in_band_steps" in done.output


def test_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file") as caught:
        load_config(tmp_path / "m1.toml")
    assert "m1 init" in caught.value.fix


@pytest.mark.parametrize("text", ["run.seed", "=3", "run..seed=3"])
def test_malformed_override(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"key\.path=value"):
        load_config(write(tmp_path, 'preset = "tiny"'), [text])


def test_toml_that_is_nested_too_deeply(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "tiny"\nseed = ' + "[" * 3000)
    with pytest.raises(ConfigError, match="not valid TOML: it is nested too deeply") as caught:
        load_config(path)
    assert caught.value.where == str(path)
    path = write(tmp_path, 'preset = "tiny"\n')
    with pytest.raises(ConfigError, match=r"run.seed.0.*nested more than 16 levels deep"):
        load_config(path, ["run.seed=" + "[" * 100 + "]" * 100])
    path.write_text(path.read_text() + ".".join("x" * 3000) + " = 1")
    with pytest.raises(ConfigError, match=r"x\.x is nested more than 16 levels deep"):
        load_config(path)


def test_override_types_and_order(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, 'preset = "tiny"'), ["run.seed=1", "run.seed=2", "run.dir=elsewhere", "stages.32k.tokens=1e6"]
    ).config
    assert (config.run.seed, config.run.dir, config.stages["32k"].tokens) == (2, "elsewhere", 1_000_000)


def test_hash_follows_values_not_their_spelling(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "tiny"\n[run]\nseed = 1_234')
    same = load_config(path).sha256
    path.write_text('preset = "tiny"')
    assert load_config(path).sha256 == same
    assert load_config(path, ["run.seed=2"]).sha256 != same


def test_no_number_may_be_negative(tmp_path: Path) -> None:
    path = write(tmp_path, 'preset = "tiny"\n')
    values = recorded_values(load_config(path))
    numbers = {key: -1 for key, value in values.items() if type(value) in (int, float)}
    lists = {key: [-1] for key, value in values.items() if isinstance(value, list) and value}
    assert len(numbers) > 100
    assert "guard.warn_factor" in numbers
    passed = []
    for key, value in (numbers | lists).items():
        try:
            load_config(path, [f"{key}={value}"])
            passed.append(key)
        except ConfigError as error:
            if f"key {key}" not in error.where:
                passed.append(f"{key}: {error}")
    assert passed == []
