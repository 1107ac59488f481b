"""Score a data set: train a proxy once and write every example's scores to scores.parquet."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np

from jobs.coreset.source import SourceConfig
from jobs.launcher import Job, JobContext, Summary
from raysys.config import check_range
from raysys.training.ccs.accumulator import ScoringConfig
from raysys.training.ccs.convergence import ScoringStopper
from raysys.training.ccs.dynamics import Margin
from raysys.training.ccs.noise import combine, estimate_noise, relabel, threshold_halves
from raysys.training.ccs.proxy import ProxyConfig, accuracies, features_of, score_run
from raysys.training.ccs.store import write_scores
from raysys.training.datasets import LabelledArrays, Split

SCORES, FEATURES = "scores.parquet", "features.npz"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """A scoring run.

    Args:
        data: what is scored.
        proxy: the network and its recipe.
        scoring: how dynamics become scores.
        margin: AUM on probabilities (``prob``, as the paper's code) or on logits.
        noise: also estimate the share of wrong labels, with two more runs.
        settled: end the run once AUM's rank correlation between epochs exceeds this; 0 for never.
        seed: of weights and batch order.
    """

    data: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    proxy: ProxyConfig = dataclasses.field(default_factory=ProxyConfig)
    scoring: ScoringConfig = dataclasses.field(default_factory=ScoringConfig)
    margin: Margin = "prob"
    noise: bool = False
    settled: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self, "settled", 0, 1)


def run(config: ScoreConfig, context: JobContext) -> Summary:
    """Train, record, write; every run is a Ray task."""
    import ray

    split = config.data.load()
    context.ray()
    task = ray.remote(num_cpus=1)(scoring_task)
    runs = 3 if config.noise else 1
    with context.progress("scoring runs", total=runs) as advance:
        pending = [task.remote(split, config, None)]
        fakes = threshold_halves(split.train.ids, split.train.classes, config.seed)
        if config.noise:
            pending += [task.remote(split, config, fake) for fake in fakes]
        results = []
        for reference in pending:
            results.append(ray.get(reference))
            advance(1)
    first = results[0]
    table = first["table"]
    write_scores(f"{context.run.uri}/{SCORES}", table)
    _write_features(context, table.ids, table.features, first["test_features"])
    result: dict[str, Any] = {
        "rows": len(table),
        "fingerprint": table.fingerprint(),
        "test_accuracy": first["accuracy"],
        "rank_correlations": first["correlations"],
        "scores": {name: float(values.mean()) for name, values in table.scores.items()},
    }
    lines = [
        f"{split.name}: {len(table)} examples scored, proxy accuracy {first['accuracy']:.4f}",
        f"scores: {context.run.uri}/{SCORES} ({', '.join(sorted(table.scores))})",
    ]
    if config.noise:
        parts = [
            estimate_noise(found["table"].ids, found["table"].score("aum"), fake)
            for found, fake in zip(results[1:], fakes)
        ]
        both = combine(*parts)
        result["noise"] = {"rate": both.rate, "suspects": both.suspects.tolist()}
        lines.append(f"wrong labels: about {100 * both.rate:.1f} %, {len(both.suspects)} suspects")
    context.run.write_json("result.json", result)
    return Summary(lines=lines)


def scoring_task(split: Split, config: ScoreConfig, fake: Any) -> dict[str, Any]:
    """One scoring run; ``fake`` ids get the extra class of the noise estimate."""
    import torch

    torch.set_num_threads(1)
    train = split.train
    if fake is not None:
        labels = relabel(train.ids, train.y, fake, train.classes)
        train = LabelledArrays(train.x, labels, train.ids, train.classes + 1)
    stopper = ScoringStopper(config.settled) if config.settled > 0 else None
    net, table = score_run(
        train,
        config.proxy,
        config.seed,
        scoring=config.scoring,
        margin=config.margin,
        stopper=stopper,
    )
    return {
        "correlations": [] if stopper is None else stopper.correlations,
        "table": table,
        "accuracy": float(accuracies(net, split.test)[0]),
        "test_features": features_of(net, split.test),
    }


def _write_features(context: JobContext, ids: Any, features: Any, test_features: Any) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, ids=ids, features=features, test_features=test_features)
    context.run.storage.write(FEATURES, buffer.getvalue())


JOB = Job(name="coreset score", config=ScoreConfig, run=run)
