"""CCS inside LTE's tuning: a coreset of the text, chosen by CCS, is what stages 1 and 2 train on.

CCS scores labelled examples by their training dynamics. In a language model every token is one: its
class is the token that follows. While the dense model trains, a recorder notes each token's margin
from the forward pass that training does anyway; a block's score is the mean over its tokens, and
CCS selects blocks by that score, without classes. LTE then sees the selected blocks alone, from the
routers' fit to the landing on the wanted sparsity.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from raysys.config import check_range
from raysys.errors import ConfigError
from raysys.training.ccs.accumulator import ScoreAccumulator
from raysys.training.ccs.recorder import DynamicsRecorder
from raysys.training.ccs.table import ScoreTable
from raysys.training.lte.config import ConvertConfig, StageConfig
from raysys.training.lte.contest_config import ContestConfig
from raysys.training.lte.conversion import convert_model
from raysys.training.lte.evaluation import evaluate
from raysys.training.lte.fitting import fit_routers, land
from raysys.training.lte.gating import SparseModel
from raysys.training.lte.stage import Stage
from raysys.training.lte.text import TokenBlocks

FIT_BLOCKS, LANDING_BLOCKS = 64, 256  # as in LTE's own contest
STAGE_2_SEED = 1000  # with a seed of its own, stage 2 does not repeat the order of stage 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TuningConfig:
    """A small language model and how long it trains.

    Args:
        model: sizes, rates, batch, shares of the stages; its ``base_steps`` and ``steps`` are not
            used.
        base_epochs: epochs of the dense model over the whole set, which are also the scoring run.
        epochs: epochs of LTE's tuning over the whole set; a subset gets as many steps.
    """

    model: ContestConfig = dataclasses.field(default_factory=ContestConfig)
    base_epochs: int = 3
    epochs: float = 1.0

    def __post_init__(self) -> None:
        check_range(self, "base_epochs", 1)
        check_range(self, "epochs", 0, low_open=True)

    def steps(self, blocks: int) -> int:
        """Steps of a tuning that visits so many blocks ``epochs`` times, one a stage at least."""
        return max(2, round(self.epochs * blocks / self.model.batch))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A dense model and what its training told about the text.

    Args:
        weights: of the dense model. table: one row a block: ``aum``, ``el2n`` and the others, means
            over the block's tokens. recording_s: CPU seconds of the recorder, part of training's.
    """

    weights: Mapping[str, Tensor]
    table: ScoreTable
    recording_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Tuned:
    """What a tuning came to: held-out nats and FFN sparsity, and CPU seconds without evaluation."""

    nll: float
    sparsity: float
    steps: int
    seconds: float


def train_and_score(config: TuningConfig, train: TokenBlocks, seed: int) -> Scored:
    """Train the dense model from scratch for whole epochs and score every block.

    Raises:
        ConfigError: the blocks do not fill whole batches, so that some might never be seen.
    """
    batch = config.model.batch
    if len(train) % batch:
        raise ConfigError("blocks", len(train), f"a multiple of the batch, {batch}")
    sparse = SparseModel(
        config.model.model(seed), ConvertConfig(expert_size=config.model.expert_size)
    )
    per_epoch = len(train) // batch
    options = StageConfig(
        stage=0, steps=config.base_epochs * per_epoch, batch=batch, lr=config.model.base_lr,
        seed=seed,
    )  # fmt: skip
    stage = Stage(sparse, train, options)
    recorder = _BlockRecorder(train)
    handle = sparse.model.register_forward_hook(
        lambda model, args, kwargs, output: recorder.note(
            *divmod(stage.step, per_epoch), train.rows(stage.step, batch, seed), output.logits
        ),
        with_kwargs=True,
    )
    stage.run()
    handle.remove()
    weights = {
        name: tensor.detach().clone()
        for name, tensor in sparse.model.state_dict().items()
        if ".router." not in name
    }
    return Scored(weights, recorder.table(), recorder.seconds)


def subset(train: TokenBlocks, ids: NDArray[np.int64]) -> TokenBlocks:
    """The blocks of these ids, in the order of the text."""
    chosen = train.blocks[np.sort(ids)]
    return TokenBlocks(chosen.flatten().numpy(), train.blocks.shape[1])


def tune(
    config: TuningConfig, weights: Mapping[str, Tensor], train: TokenBlocks,
    held_out: TokenBlocks, steps: int, seed: int,
) -> Tuned:  # fmt: skip
    """Convert a dense model and tune it by LTE's two stages on ``train`` alone.

    Args:
        weights: of the dense model, as in :class:`Scored`. steps: of both stages together.

    Raises:
        LTEDataError: fewer blocks than a batch.
    """
    model, first = config.model, min(steps - 1, max(1, round(config.model.stage1 * steps)))
    before = time.process_time()
    sparse = convert_model(_dense(model, weights), _conversion(model, seed)).sparse
    fit_routers(sparse, train.all_batches(model.batch, FIT_BLOCKS), model.sparsity)
    common: dict[str, Any] = {"batch": model.batch, "eta": model.eta, "router_lr": model.router_lr}
    one = StageConfig(
        stage=1, steps=first, target_sparsity=model.sparsity, lr=model.lr, lam=model.lam,
        lam_schedule=model.lam_schedule, seed=1 + seed, **common,
    )  # fmt: skip
    Stage(sparse, train, one).run()
    landing = train.all_batches(model.batch, LANDING_BLOCKS)
    land(sparse, landing, model.sparsity)
    two = StageConfig(
        stage=2, steps=steps - first, lr=model.lr * model.stage2_rate,
        seed=1 + seed + STAGE_2_SEED, **common,
    )  # fmt: skip
    Stage(sparse, train, two).run()
    land(sparse, landing, model.sparsity)
    seconds = time.process_time() - before
    test = held_out.all_batches(model.batch, model.held_out or None)
    found = evaluate(sparse, test, mode="hard")
    return Tuned(found.nll, found.sparsity.overall, steps, seconds)


class _BlockRecorder:
    """Feeds every token's dynamics to CCS's accumulator, and averages them over blocks."""

    def __init__(self, train: TokenBlocks) -> None:
        self._train = train
        self._labels = train.blocks.shape[1] - 1  # the last token has no next one
        self._store = ScoreAccumulator(np.arange(len(train) * self._labels))
        self._recorder = DynamicsRecorder(self._store.add)
        self._epoch = 0
        self.seconds = 0.0

    def note(self, epoch: int, place: int, rows: NDArray[np.int64], logits: Tensor) -> None:
        """Record a training step's forward pass, logits [B, S, V] of the blocks ``rows``."""
        before = time.process_time()
        if place == 0:
            self._recorder.start_epoch(epoch)  # hands out what is pending
            self._store.commit(epoch - 1)
            self._epoch = epoch
        ids = rows[:, None] * self._labels + np.arange(self._labels)
        labels = self._train.blocks[rows][:, 1:].flatten()
        self._recorder.record(ids.flatten(), logits[:, :-1].flatten(0, 1), labels)
        self.seconds += time.process_time() - before

    def table(self) -> ScoreTable:
        """Scores of all blocks."""
        self._recorder.flush()
        self._store.commit(self._epoch)
        tokens = self._store.to_table()
        blocks = {
            name: values.reshape(-1, self._labels).mean(axis=1)
            for name, values in tokens.scores.items()
        }
        return ScoreTable(np.arange(len(self._train)), blocks)


def _conversion(model: ContestConfig, seed: int) -> ConvertConfig:
    return ConvertConfig(
        expert_size=model.expert_size, grouping=model.grouping, router_init="warm", seed=seed
    )


def _dense(config: ContestConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    model = config.model(0)
    model.load_state_dict(weights)
    return model
