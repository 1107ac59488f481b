"""The actor for Ray hosts, called directly and once on a real cluster."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from actors.session import Session
from actors.swan.engine import Swan
from actors.swan.host import SwanHost, host_options
from raysys.errors import InfeasibleError


def program(swan: Swan, steps: int = 3) -> dict[str, Any]:
    """A tiny training."""
    import torch

    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with swan.training(optimizer=optimizer) as task:
        for _ in range(steps):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
        return {"steps": task.steps, "applied": swan.status()["applied"]}


def config(folder: Path) -> dict[str, Any]:
    return {"lock": str(folder / "lock"), "nice": 0, "policy": {"kind": "fixed"}}


def test_host_trains_one_task_at_a_time(tmp_path: Path) -> None:
    host = SwanHost(config(tmp_path))
    assert host.train(program, steps=4)["steps"] == 4
    assert host.health()["training"] is False
    assert host.health()["engine_moves"] == 1
    started, release = threading.Event(), threading.Event()

    def waiting(swan: Swan) -> str:
        started.set()
        release.wait(10)
        return "done"

    first: list[str] = []
    thread = threading.Thread(target=lambda: first.append(host.train(waiting)))
    thread.start()
    assert started.wait(10)
    host.pause()
    host.resume()
    assert host.health()["training"] is True
    with pytest.raises(InfeasibleError, match="trains already"):
        host.train(program)
    release.set()
    thread.join(10)
    assert first == ["done"]
    with pytest.raises(ZeroDivisionError):
        host.train(lambda swan: 1 / 0)
    host.close()
    host.close()


def test_host_as_an_actor_of_its_node(ray_session: Session, tmp_path: Path) -> None:
    import ray

    options = host_options(ray.get_runtime_context().get_node_id(), ray_session.namespace)
    actor = ray.remote(SwanHost).options(**{**options, "max_restarts": 0}).remote(config(tmp_path))
    # By value: the test's module is not on the worker's path.
    answer = ray.get(actor.train.remote(_by_value()))
    assert answer == 3
    assert ray.get(actor.health.remote())["training"] is False
    ray.get(actor.close.remote())


def _by_value() -> Any:
    def inner(swan: Any) -> int:
        import torch

        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with swan.training(optimizer=optimizer) as task:
            for _ in range(3):
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            return int(task.steps)

    return inner
