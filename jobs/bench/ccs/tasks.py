"""The tasks: data and the proxy's recipe, sized for a CPU.

Task A is MNIST-1D (generated), task B is Fashion-MNIST at 14x14; where its files are absent, B
falls back to scikit-learn's digits and says so in its name.
"""

from __future__ import annotations

import dataclasses

from raysys import machine
from raysys.errors import CapabilityError
from raysys.training.ccs.proxy import ProxyConfig
from raysys.training.datasets import Split, digits, fashion_mnist, mnist1d


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A task: its data, the proxy that learns it, and how many proxies to stack in one program."""

    name: str
    split: Split
    proxy: ProxyConfig
    stack: int


def signal_task(train_rows: int = 20_000, test_rows: int = 4000) -> Task:
    """Task A: MNIST-1D, generator seed 42."""
    proxy = ProxyConfig(channels=(16, 16, 32), iterations=1200, score_iterations=2400)
    return Task("mnist1d", mnist1d(train_rows, test_rows, seed=42), proxy, 8)


def fashion_task(train_rows: int = 20_000, test_rows: int = 5000) -> Task:
    """Task B: a fixed random part of Fashion-MNIST, pixels averaged 2x2; else digits."""
    proxy = ProxyConfig(channels=(8, 16, 32), iterations=600, score_iterations=1200)
    try:
        split = fashion_mnist(machine.data_dir(), train_rows, test_rows, pool=2)
    except CapabilityError:
        return small_task()
    return Task("fashion-mnist", split, proxy, 4)


def small_task() -> Task:
    """Digits: seconds of work, for tests and for machines without data files."""
    proxy = ProxyConfig(channels=(8, 16, 32), iterations=150, score_iterations=300, batch=64)
    return Task("digits", digits(), proxy, 4)
