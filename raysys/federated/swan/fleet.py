"""A fleet of modelled phones in federated training: what a choice of cores does to convergence.

A phone that wastes energy owes more, sits out sooner, and answers later. Swan's phones pay for
exploring (the first of each model; the others verify the profile that those share) and move to
thriftier choices as their loan grows. Learning is real (the federated core trains every update);
time and energy come from the SoC model, availability from a daily pattern or a trace.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from raysys.config import check, check_choice, check_range
from raysys.federated.core.aggregation import RoundFold
from raysys.federated.core.ladder import static_rung
from raysys.federated.core.messages import TrainTask
from raysys.federated.core.population import Population
from raysys.federated.core.strategy import JobFacts, RoundReport, Strategy
from raysys.federated.core.training import Samples, train_task
from raysys.federated.swan.choices import greedy_choice
from raysys.federated.swan.energy import LoanConfig
from raysys.federated.swan.frontier import prune
from raysys.federated.swan.sharing import SharingConfig
from raysys.federated.swan.simulation import explore, model_estimates
from raysys.federated.swan.soc import PHONES, Phone, Workload, power_w, step_time

DAY_S = 86_400.0
SCORE_MS = 10.4 * 44.0
QUORUM = SharingConfig().quorum


@dataclasses.dataclass(frozen=True, slots=True)
class FleetDevice:
    """A phone with what a task costs it under one policy.

    Args:
        steps: seconds and joules of a step on the choices that may be used, fastest first.
        explore, verify: extra seconds and joules of the first task without and with a profile.
    """

    phone: Phone
    steps: tuple[tuple[float, float], ...]
    allowance_j: float
    explore: tuple[float, float] = (0.0, 0.0)
    verify: tuple[float, float] = (0.0, 0.0)

    @property
    def step_s(self) -> float:
        """Seconds of a step while nothing is owed."""
        return self.steps[0][0]

    @property
    def step_j(self) -> float:
        """Joules of such a step."""
        return self.steps[0][1]

    @property
    def cpu_score(self) -> float:
        """On the scale of AI-Benchmark's CPU float score."""
        return SCORE_MS / self.phone.latency_ms


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FleetConfig:
    """One federated training over a fleet.

    Args:
        devices: phones, drawn evenly from the five models. per_round: answers that close a round.
        overcommit: devices started over answers wanted. beta, policy: scenario and whose choice.
        unit_s: seconds of a one-prime-core step on the reference phone, for a realistic model.
        link_s: median time to move model and update; log-normal, sigma 1.
        online: share of the time in which a phone is plugged out, idle and connected.
        rounds: most rounds. target: accuracy, mean of the last ``smooth`` rounds, that ends the
            training; with 1 a lucky round does.
        local_steps: local steps charged to a phone per round.
    """

    devices: int = 2000
    per_round: int = 50
    overcommit: float = 1.3
    beta: float = 1.0
    policy: str = "swan"
    unit_s: float = 1.0
    link_s: float = 10.0
    online: float = 0.3
    rounds: int = 200
    target: float = 0.9
    smooth: int = 1
    local_steps: int = 100
    seed: int = 0
    loan: LoanConfig = dataclasses.field(default_factory=LoanConfig)

    def __post_init__(self) -> None:
        check_range(self, "per_round", 1)
        check(self, "devices", self.devices >= self.per_round, "at least per_round")
        check_range(self, "overcommit", 1)
        check_choice(self, "policy", ("swan", "greedy"))
        check_range(self, "online", 0, 1, low_open=True)
        for name in ("beta", "link_s"):
            check_range(self, name, 0)
        check_range(self, "unit_s", 0, low_open=True)
        check_range(self, "rounds", 1)
        check_range(self, "smooth", 1)
        check_range(self, "local_steps", 1)


@dataclasses.dataclass(frozen=True, slots=True)
class FleetOutcome:
    """Time and energy until the target, or until the rounds ran out (``reached`` False)."""

    reached: bool
    rounds: int
    seconds: float
    joules: float
    accuracy: float
    excluded_per_day: float
    history: list[tuple[float, float, float]]


def draw_fleet(
    count: int,
    workload: Workload,
    beta: float,
    policy: str,
    unit_s: float,
    seed: int,
    loan: LoanConfig | None = None,
) -> list[FleetDevice]:
    """Phones drawn evenly from the five models, on the cores that the policy uses."""
    settings = loan or LoanConfig()
    kinds = [_device(phone, workload, beta, policy, unit_s, settings) for phone in PHONES]
    picks = np.random.default_rng((seed, 17)).integers(len(kinds), size=count)
    return [kinds[pick] for pick in picks]


def run_fleet(
    config: FleetConfig,
    workload: Workload,
    strategy: Strategy,
    population: Population,
    samples: Samples,
    accuracy_of: Callable[[Strategy], float],
) -> FleetOutcome:
    """Train until the target accuracy under the fleet's clock.

    The same seed gives the same phones, links and online periods under both policies; who is
    picked differs only as far as loans exclude phones.

    Args:
        strategy: fresh; :meth:`Strategy.start` is called here.
        accuracy_of: evaluated after every round.
    """
    fleet = _Fleet(config, workload)
    strategy.start(JobFacts(population, config.seed))
    history: list[tuple[float, float, float]] = []
    accuracy = 0.0
    for round_id in range(config.rounds):
        accepted = fleet.round(round_id)
        clients = np.unique(accepted % population.n_clients)
        _learn(strategy, population, samples, clients, round_id, config.seed)
        history.append((fleet.now_s, fleet.joules, accuracy_of(strategy)))
        recent = [row[2] for row in history[-config.smooth :]]
        accuracy = sum(recent) / config.smooth  # below the target while there are too few
        if accuracy >= config.target:
            break
    days = max(fleet.now_s / DAY_S, 1.0)
    return FleetOutcome(
        accuracy >= config.target,
        len(history),
        fleet.now_s,
        fleet.joules,
        accuracy,
        len(fleet.excluded) / days,
        history,
    )


class _Fleet:
    """Clock, loans and selection."""

    def __init__(self, config: FleetConfig, workload: Workload) -> None:
        self.config = config
        args = (workload, config.beta, config.policy, config.unit_s, config.seed, config.loan)
        devices = draw_fleet(config.devices, *args)
        self._devices = devices
        widest = max(len(device.steps) for device in devices)
        steps = [
            device.steps + device.steps[-1:] * (widest - len(device.steps)) for device in devices
        ]
        self._steps = np.array(steps)  # [devices, choices, (seconds, joules)]
        self._new = np.ones(config.devices, dtype=bool)
        self._profiles: dict[str, int] = {}
        self.allowance_j = np.array([device.allowance_j for device in devices])
        self.loan_j = np.zeros(config.devices)
        self.excluded: set[tuple[int, int]] = set()
        self.now_s = 0.0
        self.joules = 0.0
        self._day = 0
        rng = np.random.default_rng((config.seed, 29))
        self._link_s = config.link_s * np.exp(rng.standard_normal(config.devices))
        self._phase = rng.random(config.devices)

    def round(self, round_id: int) -> npt.NDArray[np.int64]:
        """Run one round on the fleet's clock; the devices whose answers count.

        Devices are started among those that are online and under their loan; when too few are,
        the round waits for more to come online, or for the night's charging.
        """
        config = self.config
        wanted = math.ceil(config.per_round * config.overcommit)
        able = self._able()
        while len(able) < wanted:
            self._wait(600.0)
            able = self._able()
        rng = np.random.default_rng((config.seed, 31, round_id))
        # One priority for every phone and round: both policies start the same phones if they can.
        priority = rng.random(config.devices)
        started = able[np.argsort(priority[able])[:wanted]]
        noise = np.exp(0.05 * rng.standard_normal(config.devices))
        step_s, step_j = self._step_costs(started)
        extra_s, extra_j = self._first_costs(started)
        trained_s = config.local_steps * step_s * noise[started] + extra_s
        times = self._link_s[started] + trained_s
        order = np.argsort(times, kind="stable")
        accepted = started[order[: config.per_round]]
        duration_s = float(times[order[config.per_round - 1]])
        # Those that are too late have trained up to the end of the round.
        share = np.minimum(duration_s / times, 1.0)
        spent = (config.local_steps * step_j + extra_j) * share
        self.loan_j[started] += spent
        self.joules += float(spent.sum())
        self._wait(duration_s)
        return np.sort(accepted)

    def _step_costs(
        self, started: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Seconds and joules of a step on the choice that each phone's loan makes the best."""
        steps = self._steps[started]
        used = np.minimum(self.loan_j[started] / self.allowance_j[started], 1.0)
        price_s = used * steps[:, :, 0].max(axis=1) / steps[:, :, 1].max(axis=1)
        best = np.argmin(steps[:, :, 0] + price_s[:, None] * steps[:, :, 1], axis=1)
        chosen = steps[np.arange(len(started)), best]
        return chosen[:, 0], chosen[:, 1]

    def _first_costs(
        self, started: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """What a phone's first task costs more: exploring, or verifying what others have shared."""
        extra = np.zeros((len(started), 2))
        for place in np.flatnonzero(self._new[started]):
            device = self._devices[started[place]]
            told = self._profiles.get(device.phone.name, 0)
            extra[place] = device.explore if told < QUORUM else device.verify
            self._profiles[device.phone.name] = told + 1
        self._new[started] = False
        return extra[:, 0], extra[:, 1]

    def _able(self) -> npt.NDArray[np.int64]:
        online = (self.now_s / DAY_S + self._phase) % 1.0 < self.config.online
        owing = self.loan_j >= self.allowance_j
        day = int(self.now_s // DAY_S)
        self.excluded.update((day, int(i)) for i in np.flatnonzero(online & owing))
        return np.flatnonzero(online & ~owing)

    def _wait(self, seconds: float) -> None:
        """Let time pass; every midnight the charger has repaid the loans."""
        self.now_s += seconds
        day = int(self.now_s // DAY_S)
        if day != self._day:
            self._day = day
            self.loan_j[:] = 0.0


def _device(
    phone: Phone, workload: Workload, beta: float, policy: str, unit_s: float, loan: LoanConfig
) -> FleetDevice:
    unit = unit_s / phone.rate
    allowance_j = 3600.0 * min(loan.share * phone.battery_wh, loan.max_wh)
    if policy == "greedy":
        choice = greedy_choice(phone.topology())
        seconds = unit * step_time(phone, workload, choice, beta)
        return FleetDevice(phone, ((seconds, seconds * power_w(phone, choice)),), allowance_j)
    known = model_estimates(phone, workload, beta)
    found = explore(phone, workload, beta)
    fastest = next(item for item in known if item.choice.counts == found.settled.counts)
    # What is dearer than the settled choice is what exploration did not find.
    kept = [item for item in known if item.cost <= fastest.cost]
    frontier = prune(kept, by_energy=True)
    verified = explore(phone, workload, beta, shared=True)
    return FleetDevice(
        phone,
        tuple((unit * item.seconds, unit * item.joules) for item in frontier),
        allowance_j,
        (unit_s * found.excess_s, unit_s * found.excess_j),
        (unit_s * verified.excess_s, unit_s * verified.excess_j),
    )


def _learn(
    strategy: Strategy,
    population: Population,
    samples: Samples,
    clients: npt.NDArray[np.int64],
    round_id: int,
    seed: int,
) -> RoundReport:
    """Train the clients in this process and make the server step."""
    spec = strategy.model_spec(0)
    task = TrainTask(
        round_id=round_id,
        attempt=0,
        task_id=0,
        spec=spec,
        clients=clients,
        rows=np.zeros(len(clients), dtype=np.int64),
        models=1,
        local=strategy.assign(round_id, clients)[0].local,
        feedback=strategy.feedback_spec(),
        seed=seed,
        rung=static_rung(spec),
        chunk_size=50,
    )
    partial = train_task(task, strategy.weights(0)[None, :], samples, population)
    fold = RoundFold(round_id, 0, [len(clients)], spec.spec_id)
    fold.add(partial)
    strategy.fold(round_id, 0, fold.sums()[0])
    table = fold.table()
    report = RoundReport(
        round_id=round_id,
        attempts=1,
        counts={"ok": int(table.ok.sum())},
        loss_first=float(table.loss_first.mean()),
        loss_last=float(table.loss_last.mean()),
        bytes_down=0,
        bytes_up=0,
        macs=0,
        virtual_s=0.0,
        table=table,
    )
    strategy.close(round_id, report)
    return report
