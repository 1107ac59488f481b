"""Coverage-centric coresets against random, hardest-first and the other selection methods.

Accuracy claims: task A is MNIST-1D, task B Fashion-MNIST at 14x14 (digits without its files). One
scoring run each, equal iterations, last-model accuracy on the test set, fresh seeds; beta is chosen
by cross-validation on the training set. Where a claim covers both tasks, its value is the smaller
margin and ``samples`` holds each task's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jobs.bench.ccs import systems
from jobs.bench.ccs.lab import FRESH_SEED, Lab, lab_of
from raysys.bench import Baseline, Claim, Profile
from raysys.training.ccs.baselines import (
    CCS,
    CutRandom,
    D2Pruning,
    EasiestFirst,
    HardestFirst,
    Herding,
    KCenter,
    Method,
    Moderate,
    Prototypes,
    Random,
    StratifiedRandom,
)
from raysys.training.ccs.coverage import coverage

PRUNED = 0.9
TASKS = ("A", "B")
CONFIG = {
    "tasks": {"A": "MNIST-1D, 20,000 train", "B": "Fashion-MNIST 14x14, 20,000 train"},
    "pruned": PRUNED,
    "protocol": "equal iterations, last model, one scoring run, test set only judges",
    "beta": "cross-validation on 2,000 held-out training examples",
}


def _seeds(profile: Profile) -> list[int]:
    return list(range(FRESH_SEED, FRESH_SEED + profile.pick(2, 5)))


def _labs(profile: Profile) -> list[Lab]:
    return [
        lab_of(name, 0.0, profile.partial) for name in TASKS
    ]  # both scoring runs start before one is waited for


def _stats(values: Sequence[float]) -> dict[str, Any]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "sd": spread, "runs": list(values)}


def _margin_claim(name: str, profile: Profile, rivals: dict[str, Method | None]) -> Claim:
    """CCS at its cross-validated beta minus the best rival, per task; None is cut + random."""
    seeds = _seeds(profile)
    samples: dict[str, Any] = {}
    for task, one in zip(TASKS, _labs(profile)):
        beta = one.auto_beta(PRUNED).beta
        others = {key: rival or CutRandom(beta) for key, rival in rivals.items()}
        ours, *rest = one.accuracy([CCS(beta), *others.values()], PRUNED, seeds)
        margins = {key: float(np.mean(ours) - np.mean(run)) for key, run in zip(others, rest)}
        samples[task] = {
            "data": one.task.name,
            "beta": beta,
            "full_data": 100 * one.scored.full_accuracy,
            "ccs": _stats(ours),
            **{key: _stats(run) for key, run in zip(others, rest)},
            "margins": margins,
        }
    task = min(TASKS, key=lambda each: min(samples[each]["margins"].values()))
    rival = min(rivals, key=lambda key: float(samples[task]["margins"][key]))
    return Claim(
        name=name, value=samples[task]["margins"][rival], unit="points", better="higher",
        baseline=Baseline(name=f"{rival}, task {task}", value=samples[task][rival]["mean"]),
        ratio=samples[task]["ccs"]["mean"] / samples[task][rival]["mean"],
        samples=samples, seeds=seeds,
    )  # fmt: skip


def ccs_minus_random(profile: Profile) -> Claim:
    """At 90 % pruned: CCS minus random."""
    return _margin_claim("ccs_minus_random", profile, {"random": Random()})


def ccs_minus_hardest(profile: Profile) -> Claim:
    """At 90 % pruned: CCS minus hardest-first by AUM and by EL2N."""
    rivals: dict[str, Method | None] = {"aum": HardestFirst("aum"), "el2n": HardestFirst("el2n")}
    return _margin_claim("ccs_minus_hardest", profile, rivals)


def ccs_minus_cut_random(profile: Profile) -> Claim:
    """At 90 % pruned: CCS minus the same cutoff with uniform sampling; what strata add."""
    return _margin_claim("ccs_minus_cut_random", profile, {"cut_random": None})


def auto_beta_regret(profile: Profile) -> Claim:
    """Best beta of the candidates on the test set minus the cross-validated one; the larger."""
    seeds = _seeds(profile)
    samples: dict[str, Any] = {}
    for task, one in zip(TASKS, _labs(profile)):
        choice = one.auto_beta(PRUNED)
        runs = one.accuracy([CCS(beta) for beta in choice.accuracy], PRUNED, seeds)
        tested = {beta: float(np.mean(run)) for beta, run in zip(choice.accuracy, runs)}
        samples[task] = {
            "chosen": choice.beta,
            "plateau": choice.plateau,
            "best_on_test": max(tested, key=lambda beta: tested[beta]),
            "held_out": {str(key): 100 * value for key, value in choice.accuracy.items()},
            "test": {str(key): value for key, value in tested.items()},
            "regret": max(tested.values()) - tested[choice.beta],
        }
    worst = max(samples.values(), key=lambda entry: float(entry["regret"]))
    return Claim(
        name="auto_beta_regret", value=worst["regret"], unit="points", better="lower",
        baseline=Baseline(name="best beta on the test set", value=max(worst["test"].values())),
        samples=samples, seeds=seeds,
    )  # fmt: skip


def noise_20pct(profile: Profile) -> Claim:
    """Task B with 20 % of the training labels flipped: CCS (beta 0.3) minus random."""
    seeds = _seeds(profile)[: profile.pick(1, 5)]
    one = lab_of("B", 0.2, profile.partial)
    methods: dict[str, Method] = {
        "random": Random(),
        "aum": HardestFirst("aum"),
        "ccs_0": CCS(0.0),
        "ccs_0.3": CCS(0.3),
        "cut_random_0.2": CutRandom(0.2),
    }
    runs = one.accuracy(list(methods.values()), PRUNED, seeds)
    samples: dict[str, Any] = {key: _stats(run) for key, run in zip(methods, runs)}
    table = one.scored.table
    flipped = one.flipped[np.argsort(one.train.ids)]
    lowest = np.argsort(table.score("aum"))[: len(table) // 5]
    samples["flipped_in_lowest_20pct"] = float(flipped[lowest].sum() / flipped.sum())
    if profile.full:
        choice = one.auto_beta(PRUNED)
        samples["auto_beta"] = choice.beta
        samples["ccs_auto"] = _stats(one.accuracy([CCS(choice.beta)], PRUNED, seeds)[0])
    ours, random = samples["ccs_0.3"]["mean"], samples["random"]["mean"]
    return Claim(
        name="noise_20pct", value=ours - random, unit="points", better="higher",
        baseline=Baseline(name="random", value=random), ratio=ours / random,
        samples=samples, seeds=seeds,
    )  # fmt: skip


def low_pruning(profile: Profile) -> Claim:
    """At 70 % pruned: CCS (beta 0 on A, 0.1 on B) minus random; hardest-first in ``samples``."""
    seeds = _seeds(profile)[: profile.pick(1, 3)]
    samples: dict[str, Any] = {}
    for task, one, beta in zip(TASKS, _labs(profile), (0.0, 0.1)):
        methods: dict[str, Method] = {
            "ccs": CCS(beta),
            "random": Random(),
            "aum": HardestFirst("aum"),
            "el2n": HardestFirst("el2n"),
        }
        runs = one.accuracy(list(methods.values()), 0.7, seeds)
        entry: dict[str, Any] = {key: _stats(run) for key, run in zip(methods, runs)}
        hardest = max(entry["aum"]["mean"], entry["el2n"]["mean"])
        entry["minus_random"] = entry["ccs"]["mean"] - entry["random"]["mean"]
        entry["minus_best_hardest"] = entry["ccs"]["mean"] - hardest
        samples[task] = {"beta": beta, **entry}
    task = min(TASKS, key=lambda each: float(samples[each]["minus_random"]))
    return Claim(
        name="low_pruning", value=samples[task]["minus_random"], unit="points", better="higher",
        baseline=Baseline(name=f"random, task {task}", value=samples[task]["random"]["mean"]),
        samples=samples, seeds=seeds,
    )  # fmt: skip


def auc_pr_vs_hardest(profile: Profile) -> Claim:
    """AUC_pr at 90 % pruned, CCS over hardest-AUM (lower is better coverage); the larger ratio."""
    samples: dict[str, Any] = {}
    for task, one in zip(TASKS, _labs(profile)):
        table, m = one.scored.table, one.budget(PRUNED)
        targets = one.scored.test_features[:1000]
        beta = one.auto_beta(PRUNED).beta
        methods: dict[str, Method] = {
            "ccs": CCS(beta), "aum": HardestFirst("aum"), "random": Random(),
        }  # fmt: skip
        entry = {}
        for key, method in methods.items():
            rows = table.rows_of(method.select(table, m, FRESH_SEED))
            entry[key] = coverage(table.need_features("AUC_pr")[rows], targets).auc_pr
        samples[task] = entry
    task = max(TASKS, key=lambda each: samples[each]["ccs"] / samples[each]["aum"])
    ours, theirs = samples[task]["ccs"], samples[task]["aum"]
    return Claim(
        name="auc_pr_vs_hardest", value=ours / theirs, unit="ratio", better="lower",
        baseline=Baseline(name=f"hardest by AUM, task {task}", value=1.0), ratio=ours / theirs,
        samples=samples, seeds=[FRESH_SEED],
    )  # fmt: skip


def all_methods(profile: Profile) -> Claim:
    """At 90 % pruned: CCS minus the best of every other method; the table is in ``samples``.

    D2 gets the cutoff that cross-validation gave CCS and the published neighbours and gamma.
    """
    seeds = _seeds(profile)[: profile.pick(1, 3)]
    samples: dict[str, Any] = {}
    for task, one in zip(TASKS[: profile.pick(1, 2)], _labs(profile)):
        beta = one.auto_beta(PRUNED).beta
        methods: dict[str, Method] = {
            "ccs": CCS(beta),
            "random": Random(),
            "stratified_random": StratifiedRandom(),
            "cut_random": CutRandom(beta),
            "moderate": Moderate(),
            "d2": D2Pruning(beta=beta),
        }
        if profile.full:
            methods |= {
                "k_center": KCenter(),
                "herding": Herding(),
                "prototypes": Prototypes(),
                "easiest_aum": EasiestFirst("aum"),
            }
            scores = ("forgetting", "confidence", "entropy", "loss")
            methods |= {f"hardest_{score}": HardestFirst(score) for score in scores}
        runs = one.accuracy(list(methods.values()), PRUNED, seeds)
        samples[task] = {key: _stats(run) for key, run in zip(methods, runs)}
    margins = {}
    for task, entry in samples.items():
        best = max(
            (key for key in entry if key != "ccs"), key=lambda key: float(entry[key]["mean"])
        )
        margins[task] = (float(entry["ccs"]["mean"] - entry[best]["mean"]), best)
    task = min(margins, key=lambda each: margins[each][0])
    margin, best = margins[task]
    return Claim(
        name="all_methods", value=margin, unit="points", better="higher",
        baseline=Baseline(name=f"{best}, task {task}", value=samples[task][best]["mean"]),
        samples=samples, seeds=seeds,
    )  # fmt: skip


def equal_epochs(profile: Profile) -> Claim:
    """At 90 % pruned with a tenth of the full run's steps: CCS minus random (task A)."""
    seeds, one = _seeds(profile), lab_of("A", 0.0, profile.partial)
    steps = one.task.proxy.iterations // 10
    beta = one.auto_beta(PRUNED).beta
    ours, random = one.accuracy([CCS(beta), Random()], PRUNED, seeds, iterations=steps)
    return Claim(
        name="equal_epochs", value=float(np.mean(ours) - np.mean(random)), unit="points",
        better="higher", baseline=Baseline(name="random", value=float(np.mean(random))),
        samples={"iterations": steps, "ccs": _stats(ours), "random": _stats(random)}, seeds=seeds,
    )  # fmt: skip


CLAIMS = {
    "ccs_minus_random": ccs_minus_random,
    "ccs_minus_hardest": ccs_minus_hardest,
    "ccs_minus_cut_random": ccs_minus_cut_random,
    "auto_beta_regret": auto_beta_regret,
    "noise_20pct": noise_20pct,
    "low_pruning": low_pruning,
    "auc_pr_vs_hardest": auc_pr_vs_hardest,
    "equal_epochs": equal_epochs,
    "all_methods": all_methods,
    "select_10m_rows_s": systems.select_10m_rows_s,
    "recorder_overhead": systems.recorder_overhead,
    "coverage_50k_5k_512_s": systems.coverage_50k_5k_512_s,
    "store_ingest_rows_s": systems.store_ingest_rows_s,
}
