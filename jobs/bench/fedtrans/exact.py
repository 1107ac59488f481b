"""Claims about FedTrans that hold exactly or not at all."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch

from jobs.bench.fedtrans.arena import (
    CLIENTS,
    LOCAL,
    PER_ROUND,
    data_sets,
    fedtrans,
    growing,
    make_arena,
    play,
)
from raysys.bench import Baseline, Claim, Profile
from raysys.federated.core.aggregation import ModelSum
from raysys.federated.core.engine import FederatedJob
from raysys.federated.core.fedavg import FedAvg
from raysys.federated.core.model import FlatWeights, load_flat
from raysys.federated.core.runner import run_rounds
from raysys.federated.fedtrans.cells import Dense
from raysys.federated.fedtrans.clients import ClientManager
from raysys.federated.fedtrans.config import (
    AssignmentConfig,
    FedTransConfig,
    GrowthConfig,
    MixtureConfig,
)
from raysys.federated.fedtrans.lineage import derive, first_model
from raysys.federated.fedtrans.mixture import borrowed, mixed
from raysys.federated.fedtrans.network import CellNet
from raysys.federated.fedtrans.transform import (
    Split,
    Step,
    apply_step,
    apply_weights,
    possible_steps,
)
from raysys.federated.fedtrans.zoo import ZOO

PRESERVING: tuple[Split, ...] = ("fresh", "uneven")


def preserves(profile: Profile) -> Claim:
    """Largest relative change of the output after one operation, and after chains of four."""
    seeds = range(profile.pick(3, 20))
    single, chains = [], []
    for net, seed, split in itertools.product(ZOO.values(), seeds, PRESERVING):
        steps = possible_steps(net, _factor(seed), seed, split)
        single += [_change(net, [step], seed, split) for step in steps]
        chains.append(_change(net, None, seed, split))
    return Claim(
        name="preserves",
        value=max(*single, *chains),
        unit="relative output change",
        better="lower",
        samples={"single_max": max(single), "chain_of_four_max": max(chains), "nets": list(ZOO)},
        seeds=list(seeds),
    )


def distinct_units(profile: Profile) -> Claim:
    """Share of different hidden units 50 rounds after widening, ours and with copied units."""
    seeds = profile.pick((1,), (1, 2, 3))
    ours = [_distinct(seed, "fresh") for seed in seeds]
    uneven = [_distinct(seed, "uneven") for seed in seeds]
    equal = [_distinct(seed, "equal") for seed in seeds]
    return Claim(
        name="distinct_units",
        value=float(np.mean(ours)),
        unit="share of the width",
        better="higher",
        baseline=Baseline(name="equal split, as printed", value=float(np.mean(equal))),
        ratio=float(np.mean(ours) / np.mean(equal)),
        samples={"fresh": ours, "uneven copies": uneven, "equal copies": equal},
        seeds=seeds,
    )


def mixture_constant(profile: Profile) -> Claim:
    """Constants in, constants out: largest deviation over ages 0 to 500, ours and as printed."""
    model = first_model(CellNet(shape=(6,), cells=(Dense(width=4), Dense(width=4))))
    child = derive(model, 0, [Step(op="deepen", cell=1), Step(op="deepen", cell=0)], 0)
    family = [model, child]
    weights = [np.full(m.net.n_params, 0.5, dtype=np.float32) for m in family]
    sums = {
        k: ModelSum(np.full(m.net.n_params, 0.5 * 7.0), weight=7.0) for k, m in enumerate(family)
    }
    ages = range(0, 501, 10)
    ours = MixtureConfig(what="weights", projection="crop", eta=0.9)
    printed = dataclasses.replace(ours, normalise=False)
    updates = MixtureConfig(projection="crop", eta=0.9)
    worst = max(float(abs(mixed(family, weights, 1, age, ours) - 0.5).max()) for age in ages)
    lent = max(float(abs(borrowed(family, sums, 1, age, updates).mean() - 0.5).max())
               for age in ages)  # fmt: skip
    lost = max(float(abs(mixed(family, weights, 1, age, printed) - 0.5).max()) for age in ages)
    return Claim(
        name="mixture_constant",
        value=max(worst, lent),
        unit="largest deviation from 0.5",
        better="lower",
        baseline=Baseline(name="as printed", value=lost),
        samples={"weights": worst, "updates": lent, "ages": list(ages)},
    )


def never_above_capacity(profile: Profile) -> Claim:
    """Assignments of a model that a device cannot run, over 100,000 draws."""
    rng = np.random.default_rng(0)
    macs = [100, 200, 400, 800, 1600, 3200]
    manager = ClientManager(
        np.exp(rng.uniform(np.log(50), np.log(5000), 1000)), AssignmentConfig(), 0
    )
    for parent in range(len(macs) - 1):
        manager.inherit(parent)
    clients = np.arange(1000)
    alike = 0.5 + 0.5 * np.eye(len(macs))
    above = 0
    for round_id in range(100):
        allowed = manager.compatible(clients, macs, np.ones(len(macs), dtype=bool))
        placed = manager.place(round_id, clients, allowed)
        cost = np.where(placed < 0, 0, np.asarray(macs)[placed])
        above += int((cost > manager.capacity).sum())
        took = placed >= 0
        losses = rng.standard_normal(int(took.sum()))
        manager.learn(clients[took], placed[took], losses, allowed[took], alike)
    return Claim(
        name="never_above_capacity",
        value=float(above),
        unit="assignments above capacity, of 100,000",
        better="lower",
        seeds=[0],
    )


def reduces_to_fedavg(profile: Profile) -> Claim:
    """Without growth FedTrans is federated averaging: largest difference of weights, any bit."""
    rounds = profile.pick(10, 50)
    arena = make_arena(data_sets()[0], "dirichlet", 1)
    ours = fedtrans(arena, FedTransConfig(growth=GrowthConfig(enabled=False)))
    plain = FedAvg(arena.net.spec(), LOCAL, PER_ROUND)
    samples = arena.data.samples()
    for strategy in (ours, plain):
        run_rounds(FederatedJob(strategy, arena.population, 1), samples, rounds)
    gap = float(abs(ours.weights(0).astype(np.float64) - plain.weights(0)).max())
    return Claim(
        name="reduces_to_fedavg",
        value=gap,
        unit="largest difference of a weight",
        better="lower",
        samples={"equal_bits": bool(np.array_equal(ours.weights(0), plain.weights(0)))},
        seeds=[1],
    )


def _factor(seed: int) -> float:
    return 1.5 if seed % 2 else 2.0


def _change(net: CellNet, steps: list[Step] | None, seed: int, split: Split) -> float:
    """Largest relative change of outputs after steps, or after four drawn at random."""
    rng = np.random.default_rng(seed)
    values = net.initial(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inputs = torch.randn(16, *net.shape)
    before = _outputs(net, values, inputs)
    for number in range(4 if steps is None else len(steps)):
        able = possible_steps(net, _factor(seed + number), seed + number, split)
        step = able[int(rng.integers(len(able)))] if steps is None else steps[number]
        values, net = apply_weights(net, values, step), apply_step(net, step)
    after = _outputs(net, values, inputs)
    return float(abs(after - before).max() / abs(before).max())


def _outputs(net: CellNet, values: FlatWeights, inputs: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = load_flat(net.build(), values).eval()(inputs).numpy()
    return found


def _distinct(seed: int, split: str) -> float:
    """Widen the first model fourfold at the start, train 50 rounds, count different units."""
    arena = make_arena(data_sets()[0], "dirichlet", seed)
    rate = np.full(CLIENTS, np.inf if arena.population.rate_mac_s is None else 1e12)
    arena = dataclasses.replace(
        arena, population=dataclasses.replace(arena.population, rate_mac_s=rate)
    )
    config = FedTransConfig(
        growth=growing(50, enabled=False, widen=4.0, split=split),
        mixture=MixtureConfig(what="nothing"),
    )
    strategy = fedtrans(arena, config)
    FederatedJob(strategy, arena.population, seed)
    strategy.transform_now(0, [0])
    wide = strategy.family()[1].net
    line = FedAvg(wide.spec(), LOCAL, PER_ROUND)
    line.replace(strategy.weights(1))
    play(arena, line, 50, points=1)
    rows = wide.split(line.weights(0))[0][0]
    gaps = np.linalg.norm(rows[:, None] - rows[None], axis=2) / np.linalg.norm(rows, axis=1).mean()
    copies = np.triu(gaps < 1e-3, k=1).any(axis=0)
    return float(1.0 - copies.mean())
