"""Shared by all tests: one Ray cluster for the whole run, a namespace a test, isolation.

The cluster starts when the first test asks for it. Tests that need a head of their own start it
with ``isolated_environment``, so that clusters on one machine cannot meet. Under pytest-xdist a
file stays on one worker, so that what a file starts is started once.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from actors.session import Session, SessionConfig
from jobs.bench.cluster.nodes import own_home
from raysys import machine

# In CI the same examples on every run: a landing must not depend on luck. Elsewhere new ones.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# A task that fails must say so at once; the default waits for a memory monitor's second opinion.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests with a reason; run pure tests first and those that start heads last."""
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none")
    has_gpu = bool(machine.gpu_names())
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(skip)
    items.sort(key=_cost)


def _cost(item: pytest.Item) -> int:
    if item.get_closest_marker("engine"):
        return 3
    if item.get_closest_marker("cluster"):
        return 2
    return int("ray_session" in getattr(item, "fixturenames", ()))


@pytest.fixture(autouse=True)
def _same_cores() -> Iterator[None]:
    """Give the test process its cores back: what pins threads must not shrink the next test."""
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Session]:
    """The one private cluster of the run: four logical CPUs, a small object store."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own deprecations are not ours to mend
        session = Session.start(SessionConfig(address="local", num_cpus=4, object_store_mb=256))
    yield session
    session.close()


@pytest.fixture
def ray_session(ray_cluster: Session) -> Iterator[Session]:
    """The shared cluster under a namespace of the test's own.

    Unnamed actors die with their handles; named ones that the test leaves behind are removed.
    """
    import ray
    from ray.util import list_named_actors

    before = _named(list_named_actors(all_namespaces=True))
    yield Session(f"test-{secrets.token_hex(4)}", private=True)
    for name, namespace in _named(list_named_actors(all_namespaces=True)) - before:
        ray.kill(ray.get_actor(name, namespace=namespace), no_restart=True)


def _named(actors: list[dict[str, str]]) -> set[tuple[str, str]]:
    return {(actor["name"], actor["namespace"]) for actor in actors}


@pytest.fixture(scope="session")
def isolate() -> Callable[[Path], dict[str, str]]:
    """Makes the environment of a process that starts or joins a head of its own.

    It has a home, an address and a token that no other cluster on the machine knows.
    """
    return own_home


@pytest.fixture
def isolated_environment(tmp_path: Path) -> dict[str, str]:
    """Such an environment with the test's own folder as home."""
    home = tmp_path / "home"
    home.mkdir()
    return own_home(home)
