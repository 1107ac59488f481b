"""LTE and its rivals on one small language model: same start, same steps, same data, same FLOPs.

Every method goes on from one dense model and gets the same number of optimiser steps at the
same rate. Methods without training are applied to the dense model *after* those steps. All are
evaluated on the same held-out documents, at the wanted FFN sparsity or at the FLOPs that it
stands for: CATS pays for the gate that it always computes and Deja Vu for its predictor, by a
higher sparsity. Routers of one row per expert (1 to 2 % of an FFN) are counted for nobody.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raysys.training.lte import flops
from raysys.training.lte.baselines.oracle import KeepLargest, NeuronThreshold, TopExperts
from raysys.training.lte.baselines.predictors import deja_vu, moefication, predictor_width
from raysys.training.lte.baselines.pruning import teal, wanda
from raysys.training.lte.baselines.routers import FixedTopK, SigmaTopK, noisy_top_k
from raysys.training.lte.config import ConvertConfig, StageConfig
from raysys.training.lte.contest_config import ContestConfig
from raysys.training.lte.contest_states import States, run_stage
from raysys.training.lte.conversion import convert_model
from raysys.training.lte.evaluation import Evaluation, evaluate
from raysys.training.lte.fitting import fit_routers, land
from raysys.training.lte.gating import Selector, SparseModel
from raysys.training.lte.stage import Stage
from raysys.training.lte.text import Batch, TokenBlocks

Progress = Callable[[dict[str, Any]], None]
SAMPLE_BLOCKS = 64  # training blocks for predictors and thresholds
LANDING_BLOCKS = 256  # training blocks on which LTE lands on the wanted sparsity


class Contest:
    """Methods that go on from one dense model.

    Args:
        config: sizes and budget.
        train, held_out: blocks of tokens.
        base: weights of the dense model, as :meth:`train_base` returns them.
        seed: of the data order and of routers.
        states: where trainings keep their states, one folder per seed; None keeps nothing.
    """

    def __init__(
        self, config: ContestConfig, train: TokenBlocks, held_out: TokenBlocks,
        base: Mapping[str, Tensor], seed: int, on_step: Progress | None = None,
        states: States | None = None,
    ) -> None:  # fmt: skip
        self.config, self.train, self.base, self.seed = config, train, base, seed
        self.test = held_out.all_batches(config.batch, config.held_out or None)
        self.on_step, self.states = on_step, states
        self._tuned: dict[str, dict[str, Tensor]] = {}
        self.stages: dict[str, Stage] = {}

    @staticmethod
    def train_base(
        config: ContestConfig, train: TokenBlocks, seed: int = 0, on_step: Progress | None = None,
        states: States | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Train the dense model from scratch; returns its weights."""
        sparse = SparseModel(config.model(seed), ConvertConfig(expert_size=config.expert_size))
        options = StageConfig(
            stage=0, steps=config.base_steps, batch=config.batch, lr=config.base_lr, seed=seed
        )
        run_stage(Stage(sparse, train, options), "base", states, on_step)
        return _dense_weights(sparse.model)

    # --- the methods -----------------------------------------------------------------------

    def run(self, name: str) -> dict[str, Any]:
        """Train and evaluate one method of :data:`METHODS`; a JSON-ready row."""
        row: dict[str, Any] = METHODS[name](self)
        if self.states is not None:
            for state in (name, f"{name}-1", f"{name}-2"):
                self.states.drop(state)
        return {"method": name, "seed": self.seed, **row}

    def dense(self) -> dict[str, Any]:
        """The start, without further training."""
        return self._row(evaluate(self._gated(self.base), self.test, mode="dense"), 0.0)

    def dense_tuned(self) -> dict[str, Any]:
        """The dense model trained for as many steps: the control."""
        return self._row(evaluate(self._gated(self.tuned()), self.test, mode="dense"), 0.0)

    def lte(self) -> dict[str, Any]:
        """LTE: conversion, stage 1 with the target controller, stage 2."""
        config = self.config
        sparse = self._converted(self.base)
        if config.router_init == "fitted":
            fit_routers(sparse, self._sample(), config.sparsity)
        first = round(config.stage1 * config.steps)
        one = self._options(
            stage=1, steps=first, eta=config.eta, target_sparsity=config.sparsity, lam=config.lam,
            lam_schedule=config.lam_schedule, router_lr=config.router_lr, distil=config.distil,
        )  # fmt: skip
        teacher = self._teacher() if config.distil else None
        stage = Stage(sparse, self.train, one, teacher=teacher)
        self._run(stage, "lte-1")
        soft = evaluate(sparse, self.test, mode="soft").nll
        landing = self.train.all_batches(config.batch, LANDING_BLOCKS)
        land(sparse, landing, config.sparsity)
        switched = evaluate(sparse, self.test, mode="hard").nll
        # Stage 2 sees other data than stage 1: the sampler goes on where stage 1 ended.
        two = self._options(
            stage=2,
            steps=config.steps - first,
            distil=config.distil,
            lr=config.lr * config.stage2_rate,
        )
        second = Stage(sparse, _Later(self.train, first), two, teacher=teacher)
        self._run(second, "lte-2")
        land(sparse, landing, config.sparsity)  # the model moved under its frozen routers
        found = evaluate(sparse, self.test, mode="hard")
        self.stages = {"lte1": stage, "lte2": second}
        extra = {"nll_soft": soft, "nll_hard_before_stage2": switched, "eta": stage.eta}
        return self._row(found, found.sparsity.overall) | extra

    def keep_largest(self) -> dict[str, Any]:
        """KLA oracle on the tuned dense model; no speed."""
        return self._selected(
            self.tuned(), lambda s: [KeepLargest(self.config.sparsity)] * len(s.gates)
        )

    def expert_oracle(self) -> dict[str, Any]:
        """Best experts by true activations, k-means groups, tuned dense model; no speed."""
        return self._selected(
            self.tuned(), lambda s: [TopExperts(self.config.sparsity)] * len(s.gates)
        )

    def moefication_oracle(self) -> dict[str, Any]:
        """ReLU model tuned equally long, experts by true activations; no speed."""
        return self._selected(
            self.tuned("relu"), lambda s: [TopExperts(self.config.sparsity)] * len(s.gates), "relu"
        )

    def moefication(self) -> dict[str, Any]:
        """ReLU model tuned equally long, experts by MoEfication's predictor."""
        return self._selected(
            self.tuned("relu"),
            lambda s: moefication(s, self._sample(), self.config.sparsity, seed=self.seed),
            "relu",
        )

    def deja_vu(self) -> dict[str, Any]:
        """Tuned dense model, neurons by Deja Vu's predictor; it pays for its predictor's FLOPs."""
        config = self.config
        predictor = predictor_width(config.hidden) * (config.hidden + config.neurons)
        sparsity = self._equal_flops(
            config.sparsity, predictor / (3 * config.hidden * config.neurons)
        )
        return self._selected(
            self.tuned(), lambda s: deja_vu(s, self._sample(), sparsity, seed=self.seed)
        )

    def cats(self) -> dict[str, Any]:
        """Tuned dense model, CATS' threshold on the gate, whose third of the FFN it always
        computes.
        """
        sparsity = self._equal_flops(1.5 * self.config.sparsity, 0.0)

        def selectors(sparse: SparseModel) -> list[Selector]:
            found: list[Selector] = [NeuronThreshold(sparsity) for _ in sparse.gates]
            sparse.set_selectors(found)
            with torch.no_grad():
                sparse.model(**self._sample()[0].inputs)
            return found

        return self._selected(self.tuned(), selectors)

    def teal(self) -> dict[str, Any]:
        """Tuned dense model, TEAL at the FLOPs of the FFN sparsity spread over all projections."""
        sparse = self._gated(self.tuned())
        shape = self.config.shape
        spread = self.config.sparsity * shape.ffn_weights
        spread /= shape.ffn_weights + shape.attention_weights
        teal(sparse, self._sample()[:2], spread)
        found = evaluate(sparse, self.test, mode="dense")
        return self._row(found, self.config.sparsity) | {"input_sparsity": spread}

    def wanda(self) -> dict[str, Any]:
        """Tuned dense model, Wanda unstructured on the FFNs."""
        sparse = self._gated(self.tuned())
        wanda(sparse, self._sample()[:2], self.config.sparsity)
        return self._row(evaluate(sparse, self.test, mode="dense"), self.config.sparsity)

    def wanda_2_4(self) -> dict[str, Any]:
        """Tuned dense model, Wanda 2:4 on the FFNs: half of the weights."""
        sparse = self._gated(self.tuned())
        wanda(sparse, self._sample()[:2], 0.5, pattern=4)
        return self._row(evaluate(sparse, self.test, mode="dense"), 0.5)

    def noisy_top_k(self) -> dict[str, Any]:
        """Noisy top-k softmax router trained with the model."""
        return self._trained("noisy_top_k", lambda s: noisy_top_k(s, self.config.sparsity))

    def sigma_moe(self) -> dict[str, Any]:
        """Sigmoid top-k router trained with the model."""
        sparsity = self.config.sparsity
        return self._trained("sigma_moe", lambda s: [SigmaTopK(sparsity)] * len(s.gates))

    def random_router(self) -> dict[str, Any]:
        """Fixed random router, the model tuned to it."""
        sparsity = self.config.sparsity
        return self._trained("random_router", lambda s: [FixedTopK(sparsity)] * len(s.gates))

    # --- shared ----------------------------------------------------------------------------

    def tuned(self, activation: str = "silu") -> dict[str, Tensor]:
        """Weights of the dense model after the common number of steps; trained once."""
        name = f"tuned-{activation}"
        kept = self.states.load(name) if self.states and activation not in self._tuned else None
        if kept is not None:
            self._tuned[activation] = kept
        if activation not in self._tuned:
            sparse = self._gated(self.base, activation)
            options = self._options(stage=0, steps=self.config.steps)
            self._run(Stage(sparse, self.train, options), f"{name}-training")
            self._tuned[activation] = _dense_weights(sparse.model)
            if self.states is not None:
                self.states.save(name, self._tuned[activation])
                self.states.drop(f"{name}-training")
        return self._tuned[activation]

    def _run(self, stage: Stage, name: str) -> None:
        run_stage(stage, name, self.states, self.on_step)

    def _options(self, **changes: Any) -> StageConfig:
        common = {"lr": self.config.lr, "batch": self.config.batch, "seed": 1 + self.seed}
        return StageConfig(**{**common, **changes})

    @staticmethod
    def _equal_flops(sparsity: float, extra: float) -> float:
        """Sparsity of a method that spends ``extra`` of the dense FFN's FLOPs on choosing."""
        return min(0.995, sparsity + extra)

    def _convert_config(self) -> ConvertConfig:
        return ConvertConfig(
            expert_size=self.config.expert_size,
            grouping=self.config.grouping,
            router_init="default" if self.config.router_init == "default" else "warm",
            seed=self.seed,
        )

    def _model(self, weights: Mapping[str, Tensor], activation: str = "silu") -> nn.Module:
        model = self.config.model(0, activation)
        model.load_state_dict(weights)
        return model

    def _gated(self, weights: Mapping[str, Tensor], activation: str = "silu") -> SparseModel:
        return SparseModel(self._model(weights, activation), self._convert_config())

    def _converted(self, weights: Mapping[str, Tensor], activation: str = "silu") -> SparseModel:
        return convert_model(self._model(weights, activation), self._convert_config()).sparse

    def _teacher(self) -> nn.Module:
        return self._model(self.tuned()).eval()

    def _sample(self) -> list[Batch]:
        return self.train.all_batches(self.config.batch, SAMPLE_BLOCKS)

    def _selected(
        self, weights: Mapping[str, Tensor],
        choose: Callable[[SparseModel], list[Any]], activation: str = "silu",
    ) -> dict[str, Any]:  # fmt: skip
        sparse = self._converted(weights, activation)
        sparse.set_selectors(choose(sparse))
        found = evaluate(sparse, self.test, mode=None)
        return self._row(found, found.sparsity.overall)

    def _trained(self, name: str, choose: Callable[[SparseModel], list[Any]]) -> dict[str, Any]:
        sparse = self._converted(self.base)
        selectors = choose(sparse)
        options = self._options(
            stage=1, steps=self.config.steps, eta=0.0, lam=0.0, router_lr=self.config.router_lr
        )
        self._run(Stage(sparse, self.train, options, selectors=selectors), name)
        sparse.set_selectors(selectors)
        found = evaluate(sparse, self.test, mode=None)
        return self._row(found, found.sparsity.overall)

    def _row(self, found: Evaluation, sparsity: float) -> dict[str, Any]:
        values = found.as_dict()
        return {
            "nll": values["nll"],
            "perplexity": values["perplexity"],
            "sparsity": sparsity,
            "gflops": flops.paper(self.config.shape, min(1.0, max(0.0, sparsity))),
            "sparsity_per_layer": values["sparsity_per_layer"],
        }


class _Later:
    """The same blocks from a later step on."""

    def __init__(self, blocks: TokenBlocks, start: int) -> None:
        self.blocks, self.start = blocks, start

    def batch(self, step: int, batch: int, seed: int, rank: int, world: int) -> Batch:
        return self.blocks.batch(self.start + step, batch, seed, rank, world)


def _dense_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: copy.deepcopy(tensor)
        for name, tensor in model.state_dict().items()
        if ".router." not in name
    }


# Those with a speed first; "oracle" ones and the controls cannot be served faster.
METHODS: dict[str, Callable[[Contest], dict[str, Any]]] = {
    "dense": Contest.dense,
    "dense_tuned": Contest.dense_tuned,
    "lte": Contest.lte,
    "moefication": Contest.moefication,
    "deja_vu": Contest.deja_vu,
    "noisy_top_k": Contest.noisy_top_k,
    "sigma_moe": Contest.sigma_moe,
    "random_router": Contest.random_router,
    "cats": Contest.cats,
    "teal": Contest.teal,
    "wanda": Contest.wanda,
    "wanda_2_4": Contest.wanda_2_4,
    "keep_largest": Contest.keep_largest,
    "expert_oracle": Contest.expert_oracle,
    "moefication_oracle": Contest.moefication_oracle,
}
REFERENCES = (
    "dense",
    "dense_tuned",
    "keep_largest",
    "expert_oracle",
    "moefication_oracle",
    "wanda_2_4",
)
