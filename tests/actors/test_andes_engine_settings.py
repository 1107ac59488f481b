"""Settings reach the engine process unchanged, and the status comes back whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.andes.engine_settings import (
    AndesEngineConfig,
    engine_arguments,
    read_arguments,
    read_status,
    write_status,
)
from raysys.config import config_from_dict
from raysys.errors import ConfigError
from raysys.serving.andes.scheduler import AndesConfig


def test_settings_survive_the_way_through_json() -> None:
    values = {"default_tds": 3.0, "scheduler": {"policy": "fcfs", "planner": {"horizon_s": 9.0}}}
    config = config_from_dict(AndesEngineConfig, values)
    arguments = engine_arguments(config)
    travelled = json.loads(json.dumps(arguments["additional_config"]))
    assert read_arguments(travelled) == config
    assert arguments["scheduler_cls"] == "actors.andes.vllm_scheduler.AndesVllmScheduler"


def test_an_engine_without_settings_gets_the_defaults() -> None:
    assert read_arguments({}) == AndesEngineConfig()
    assert read_arguments(None) == AndesEngineConfig()
    assert AndesEngineConfig().scheduler == AndesConfig()
    assert not AndesEngineConfig().switchable


def test_wrong_settings_name_their_field() -> None:
    with pytest.raises(ConfigError) as caught:
        read_arguments({"andes": {"scheduler": {"planner": {"horizon_s": -1.0}}}})
    assert caught.value.field == "scheduler.planner.horizon_s"
    with pytest.raises(ConfigError, match="default_tds"):
        AndesEngineConfig(default_tds=0.0)
    with pytest.raises(ConfigError, match="default_ttft_s"):
        AndesEngineConfig(default_ttft_s=-1.0)


def test_the_status_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    assert read_status(path) is None
    write_status(path, {"running": 1})
    write_status(path, {"running": 2})
    assert read_status(path) == {"running": 2}
    assert list(tmp_path.iterdir()) == [path]
    path.write_text('{"running": ')
    assert read_status(path) is None
    path.write_text("[]")
    assert read_status(path) is None
