"""DeepSpeed's JSON file: what it may say, and what of ours is filled in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megagamma.config.deepspeed import built_in, deepspeed_values, read_deepspeed_json, zero_stage
from megagamma.config.io import parse_config
from megagamma.config.schema import Config
from megagamma.distributed.deepspeed_config import fill_deepspeed_config
from megagamma.errors import ConfigurationError

SMOKE = ["--config", "configs/smoke.yaml", "--data.micro_batch_size", "2", "--optimizer.clip_grad", "0.7"]


@pytest.fixture(autouse=True)
def _in_the_source_tree(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def with_json(folder: Path, content: str | dict[str, Any]) -> Config:
    """A config whose DeepSpeed file has this content; not yet held against the rules."""
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    config = parse_config(SMOKE)
    config.deepspeed_config = str(path)
    return config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 4])
def test_auto_values_are_filled(stage: int, ranks: int) -> None:
    config = parse_config([*SMOKE, "--deepspeed_config", f"configs/deepspeed/zero{stage}.json"])
    raw = read_deepspeed_json(config.deepspeed_config)
    assert raw["train_micro_batch_size_per_gpu"] == "auto", "the shipped file leaves it to the option"
    values = fill_deepspeed_config(config, ranks, bf16=False)
    assert values["train_micro_batch_size_per_gpu"] == 2
    assert values["gradient_accumulation_steps"] == 1
    assert values["train_batch_size"] == 2 * ranks
    assert values["bf16"]["enabled"] is False
    if (stage, ranks) == (1, 1):
        stage = 0  # nothing to shard, and a faster way to the same numbers
    assert zero_stage(values) == stage
    # Without ZeRO the engine clips, so DeepSpeed must not do so again.
    assert values["gradient_clipping"] == (0.7 if stage else 0.0)
    assert "auto" not in json.dumps(values["bf16"]), "DeepSpeed would read the word as true"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_filled_and_overflow_is_checked(stage: int) -> None:
    config = parse_config(
        [*SMOKE, "--precision.dtype", "bf16", "--deepspeed_config", f"configs/deepspeed/zero{stage}.json"]
    )
    values = fill_deepspeed_config(config, 1, bf16=True)
    assert values["bf16"]["enabled"] is True
    assert values["bf16"]["check_grad_overflow"] is True
    assert values["data_types"]["grad_accum_dtype"] == "fp32"


def test_bf16_without_zero_is_refused() -> None:
    config = parse_config([*SMOKE, "--deepspeed_config", "configs/deepspeed/zero0.json"])
    with pytest.raises(ConfigurationError, match=r"precision\.dtype=bf16 needs fp32 master weights.*zero1\.json"):
        fill_deepspeed_config(config, 1, bf16=True)


@pytest.mark.parametrize(
    ("ranks", "bf16", "file"),
    [(1, False, "zero0.json"), (1, True, "zero1.json"), (2, False, "zero1.json"), (2, True, "zero1.json")],
)
def test_auto_file(tmp_path: Path, ranks: int, bf16: bool, file: str) -> None:
    config = parse_config(SMOKE)
    assert deepspeed_values(config, ranks, bf16) == read_deepspeed_json(f"configs/deepspeed/{file}")
    assert deepspeed_values(with_json(tmp_path, {"mine": 1}), ranks, bf16) == {"mine": 1}


@pytest.mark.parametrize("stage", [0, 1])
def test_built_in_values_are_those_of_the_files(stage: int) -> None:
    assert built_in(stage) == read_deepspeed_json(f"configs/deepspeed/zero{stage}.json")


def test_shipped_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = read_deepspeed_json("configs/deepspeed/zero3.json")
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_json("configs/deepspeed/zero3.json") == inside


@pytest.mark.parametrize("path", ["missing.json", "configs/deepspeed/zero9.json", "configs/deepspeed"])
def test_missing_file(path: str) -> None:
    with pytest.raises(ConfigurationError, match=f"deepspeed_config={path}: there is no such file"):
        parse_config([*SMOKE, "--deepspeed_config", path])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", "must be a JSON object, not list"),
        ({"zero_optimization": {"stage": 4}}, "stage=4 must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "two"}}, "stage=two must be 0, 1, 2 or 3"),
        ({"zero_optimization": 2}, "zero_optimization=2 must be an object"),
    ],
)
def test_unusable_file(tmp_path: Path, content: str | dict[str, Any], said: str) -> None:
    config = with_json(tmp_path, content)
    with pytest.raises(ConfigurationError, match="deepspeed_config") as caught:
        parse_config([*SMOKE, "--deepspeed_config", config.deepspeed_config])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("section", "option"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "optimizer.*"),
        ({"scheduler": {"type": "WarmupLR"}}, "schedule.*"),
        ({"fp16": {"enabled": True}}, "precision.dtype"),
    ],
)
def test_section_that_would_shadow_knobs(tmp_path: Path, section: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        fill_deepspeed_config(with_json(tmp_path, section), 1, bf16=False)
    assert f"'{next(iter(section))}' would shadow {option}" in str(caught.value)


def test_section_that_is_off_shadows_nothing(tmp_path: Path) -> None:
    fill_deepspeed_config(with_json(tmp_path, {"fp16": {"enabled": False}}), 1, bf16=False)


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("train_micro_batch_size_per_gpu", 3, "data.micro_batch_size, which gives 2"),
        ("train_batch_size", 5, "data.micro_batch_size x data-parallel ranks, which gives 4"),
        ("gradient_accumulation_steps", 2, "the engine, which gives 1"),
        ("gradient_clipping", 0.5, "optimizer.clip_grad, which gives 0.7"),
        ("bf16", {"enabled": True}, "precision.dtype, which gives False"),
    ],
)
def test_contradiction(tmp_path: Path, key: str, value: Any, option: str) -> None:
    config = with_json(tmp_path, {key: value})
    with pytest.raises(ConfigurationError) as caught:
        fill_deepspeed_config(config, 2, bf16=False)
    assert f"contradicts {option}" in str(caught.value)
    assert 'write "auto"' in str(caught.value)


def test_agreeing_numbers_and_unknown_keys_pass(tmp_path: Path) -> None:
    """Negative control of the contradictions; and DeepSpeed's own keys are left as they are."""
    given = {"train_batch_size": 4, "gradient_clipping": 0.7, "zero_optimization": {"stage": 2, "overlap_comm": True}}
    values = fill_deepspeed_config(with_json(tmp_path, given), 2, bf16=False)
    assert values["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert values["gradient_clipping"] == 0.7
