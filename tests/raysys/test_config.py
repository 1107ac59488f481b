"""Typed configuration: defaults, files, overrides, and errors that name the field."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.config import (
    check,
    check_choice,
    check_range,
    config_from_dict,
    config_to_dict,
    load_config,
)
from raysys.errors import ConfigError, StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    lr: float = 0.1
    batch: int = 10

    def __post_init__(self) -> None:
        check_range(self, "lr", 0, 10, low_open=True)
        check_range(self, "batch", 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    backup: TrainerConfig | None = None
    mode: Literal["fast", "slow"] = "fast"
    names: tuple[str, ...] = ()
    optimiser: str = "sgd"

    def __post_init__(self) -> None:
        check_choice(self, "optimiser", ("sgd", "adam"))
        check(self, "names", len(self.names) < 4, "fewer than four names")


def test_defaults() -> None:
    assert load_config(RunConfig) == RunConfig()


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("trainer: {lr: 0.5, batch: 4}\nmode: slow\n")
    config = load_config(RunConfig, path, ["trainer.lr=1e-3", "names=[a, b]", "backup.batch=7"])
    assert config.trainer == TrainerConfig(lr=0.001, batch=4)
    assert config.mode == "slow"
    assert config.names == ("a", "b")
    assert config.backup == TrainerConfig(batch=7)


def test_empty_file_means_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing\n")
    assert load_config(RunConfig, path) == RunConfig()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainer.lr=0", r"trainer\.lr: expected a number in \(0, 10\], got 0"),
        ("trainer.lr=.nan", r"trainer\.lr.*got nan"),
        ("trainer.batch=many", r"trainer\.batch: expected a valid integer.*got 'many'"),
        ("trainer.batch=1.5", r"trainer\.batch"),
        ("trainer.bach=3", r"trainer\.bach.*Did you mean 'batch'"),
        ("mode=quick", r"mode: expected 'fast' or 'slow', got 'quick'"),
        ("optimiser=adm", r"optimiser: expected one of 'sgd', 'adam'.*Did you mean 'adam'"),
        ("names=[a, b, c, d]", r"names: expected fewer than four names"),
        ("backup.lr=-1", r"backup\.lr"),
        ("trainer=3", r"trainer"),
    ],
)
def test_errors_name_the_field(override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(RunConfig, None, [override])


@pytest.mark.parametrize("override", ["lr", "=3", "a..b=1", ".a=1"])
def test_malformed_override(override: str) -> None:
    with pytest.raises(ConfigError, match=r"a\.b=value"):
        load_config(RunConfig, None, [override])


def test_override_into_a_value() -> None:
    with pytest.raises(ConfigError, match="to be a section"):
        load_config(RunConfig, None, ["mode=fast", "mode.inner=3"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1,\n", "a: {b\n"])
def test_bad_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(RunConfig, path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        load_config(RunConfig, tmp_path / "absent.yaml")


@given(
    lr=st.floats(min_value=1e-6, max_value=10),
    batch=st.integers(1, 10**6),
    names=st.lists(st.text(max_size=5), max_size=3),
)
def test_plain_values_round_trip(lr: float, batch: int, names: list[str]) -> None:
    config = RunConfig(trainer=TrainerConfig(lr=lr, batch=batch), names=tuple(names))
    assert config_from_dict(RunConfig, config_to_dict(config)) == config


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_range_refuses_non_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="lr"):
        TrainerConfig(lr=value)
