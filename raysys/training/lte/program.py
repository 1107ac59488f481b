"""A stage from checkpoint to checkpoint: what one worker does, without knowing who runs it.

Reads an LTE checkpoint and text, trains, hands out states to resume from, evaluates on held-out
text and writes the next checkpoint. State and configuration travel together, so a run is not
resumed by mistake under other options.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raysys.config import config_to_dict
from raysys.training.lte import checkpoint as checkpoints
from raysys.training.lte.config import ConvertConfig, StageConfig, require
from raysys.training.lte.conversion import with_training
from raysys.training.lte.errors import LTECheckpointError, LTEConfigError, LTEDataError
from raysys.training.lte.evaluation import evaluate
from raysys.training.lte.fitting import fit_routers, land
from raysys.training.lte.gating import SparseModel
from raysys.training.lte.scopes import merge_lora
from raysys.training.lte.stage import AllReduce, Stage
from raysys.training.lte.text import TokenBlocks, corpus, to_bytes

# (figures, state to resume from or None): called at every checkpoint, and once at the end.
Report = Callable[[dict[str, Any], bytes | None], None]
# Figures of a step, or of held-out text (with ``perplexity``), as they come.
OnRow = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """Text to train and evaluate on.

    Args:
        corpus: ``"python"``, ``"shakespeare"`` or ``"folder"``.
        folder: of the optional data, or of the text files.
        tokens: ``"model"`` uses the model's tokeniser, ``"bytes"`` UTF-8 bytes.
        seq_len: tokens per sequence.
        held_out: held-out sequences to evaluate on; 0 takes all.
    """

    corpus: str = "python"
    folder: str = ""
    tokens: str = "model"
    seq_len: int = 128
    held_out: int = 32

    def __post_init__(self) -> None:
        require("tokens", self.tokens, self.tokens in ("model", "bytes"), "'model' or 'bytes'")
        require("seq_len", self.seq_len, self.seq_len >= 2, "at least 2")

    def blocks(self, model: Path) -> tuple[TokenBlocks, TokenBlocks]:
        """Training and held-out blocks."""
        found = corpus(self.corpus, Path(self.folder) if self.folder else None)
        encode = to_bytes if self.tokens == "bytes" else _tokeniser(model)
        train = TokenBlocks.encode(found.train, encode, self.seq_len)
        return train, TokenBlocks.encode(found.held_out, encode, self.seq_len)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ProgramConfig:
    """One stage over one checkpoint.

    Args:
        model: LTE checkpoint to start from; for stage 0 a dense model folder.
        out: where the trained checkpoint goes.
        teacher: dense model folder for distillation.
        checkpoint_every: steps between states to resume from.
        evaluate_every: steps between evaluations on held-out text (the curve, in steps and training
            tokens); 0 evaluates at the end only.
        fit: before stage 1, fit the routers to the target sparsity (needs ``router_init=warm``).
        threads: torch threads per worker.
        shard: spread weights and optimiser states over the workers; needs two or more.
        force: run stage 2 without a finished stage 1, and resume under another configuration.
    """

    model: str = ""
    out: str = ""
    teacher: str = ""
    text: TextConfig = dataclasses.field(default_factory=TextConfig)
    stage: StageConfig = dataclasses.field(default_factory=StageConfig)
    checkpoint_every: int = 50
    evaluate_every: int = 0
    fit: bool = False
    threads: int = 1
    shard: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        require("checkpoint_every", self.checkpoint_every, self.checkpoint_every >= 1, "at least 1")
        require("evaluate_every", self.evaluate_every, self.evaluate_every >= 0, "0 or more")
        require("threads", self.threads, self.threads >= 1, "at least 1")
        fits = not self.fit or (self.stage.stage == 1 and self.stage.target_sparsity is not None)
        lora = self.stage.scope == "lora+router"
        require("shard", self.shard, not (self.shard and lora), "false with scope lora+router")
        require("fit", self.fit, fits, "false without stage 1 and a target_sparsity")


def train(
    config: ProgramConfig,
    report: Report,
    *,
    saved: bytes | None = None,
    rank: int = 0,
    world: int = 1,
    reduce: AllReduce | None = None,
    started: Callable[[int], OnRow] | None = None,
) -> dict[str, Any]:
    """Run a stage as one of ``world`` workers; rank 0 reports states and writes the checkpoint.

    The last report has the final figures. ``started`` is called with the steps that are done
    already, and gives what takes the rows of rank 0.

    Returns:
        The final figures, JSON-ready.

    Raises:
        LTEConfigError, LTECheckpointError, LTEDataError, StorageError: see the configuration.
    """
    torch.set_num_threads(config.threads)
    source = Path(config.model)
    found = _open(config, source)
    text, held_out = config.text.blocks(source)
    if config.fit and saved is None:
        target = config.stage.target_sparsity or 0.0
        fit_routers(found.sparse, text.all_batches(config.stage.batch, 32), target)
    teacher = checkpoints.load_dense(Path(config.teacher)) if config.teacher else None
    stage = Stage(
        found.sparse, text, config.stage, teacher=teacher, rank=rank, world=world, reduce=reduce,
        shard=config.shard,
    )  # fmt: skip
    curve: list[dict[str, Any]] = []
    if saved is not None:
        curve = _resume(stage, config, saved)
    tests = held_out.all_batches(config.stage.batch, config.text.held_out or None)
    on_row = started(stage.step) if started is not None and rank == 0 else _unheard

    def evaluate_now() -> None:
        if rank == 0 or stage.sharded:
            curve.append(_point(stage, config, _evaluate(found.sparse, tests, config)))
            on_row(curve[-1])

    if config.evaluate_every and not curve and not stage.step:
        evaluate_now()
    while not stage.done:
        stage.run(until=_next_stop(stage.step, config), on_step=on_row)
        if _due(stage.step, config.evaluate_every):
            evaluate_now()
        if _due(stage.step, config.checkpoint_every) and not stage.done:
            state = _state(stage, config, curve, rank)
            report({**stage.log[-1], "curve": list(curve)}, state)
            stage.last_saved = stage.step
    state = _state(stage, config, curve, rank)
    result = _finish(config, found, stage, text, tests, curve, rank)
    report(result, state)
    return result


def _finish(
    config: ProgramConfig, found: checkpoints.Checkpoint, stage: Stage, text: TokenBlocks,
    tests: list[Any], curve: list[dict[str, Any]], rank: int,
) -> dict[str, Any]:  # fmt: skip
    if config.stage.scope == "lora+router":
        merge_lora(found.sparse)
    offset = 0.0
    if config.stage.stage > 0 and config.stage.target_sparsity is not None:
        sample = text.all_batches(config.stage.batch, 32)
        offset = land(found.sparse, sample, config.stage.target_sparsity)
    figures = _evaluate(found.sparse, tests, config)
    last = _point(stage, config, figures)
    result = {**last, "eta": stage.eta, "landing_offset": offset}
    result |= stage.expert_use() | {"curve": [*curve, last]}
    weights = stage.state_dict()["model"] if stage.sharded and config.out else None
    if rank == 0 and config.out:
        _write(config, _gathered(config, found, weights), figures)
    return result


def _gathered(
    config: ProgramConfig, found: checkpoints.Checkpoint, weights: dict[str, Any] | None
) -> checkpoints.Checkpoint:
    """The checkpoint with whole weights: itself, or its twin that is not sharded."""
    if weights is None:
        return found
    twin = _open(config, Path(config.model))
    twin.sparse.model.load_state_dict(weights)
    for mine, theirs in zip(twin.sparse.gates, found.sparse.gates):
        mine.threshold = theirs.threshold
    return twin


def _write(config: ProgramConfig, found: checkpoints.Checkpoint, figures: dict[str, Any]) -> None:
    if config.stage.stage == 0:
        architecture = type(found.sparse.model).__name__
        found.sparse.close()
        for gate in found.sparse.gates:
            del gate.ffn.entry.router
        checkpoints.write_folder(
            found.sparse.model, Path(config.out), extra={},
            changes={"architectures": [architecture]}, tokenizer_from=found.folder,
        )  # fmt: skip
        return
    keys = ("sparsity", "sparsity_per_layer")
    threshold = torch.sigmoid(torch.tensor(found.sparse.gates[0].threshold)).item()
    done = with_training(
        found,
        stage=config.stage.stage,
        threshold=threshold,
        sparsity={"overall": figures[keys[0]], "per_layer": figures[keys[1]]},
        thresholds=config.stage.threshold_offsets if config.stage.stage == 2 else (0.0,),
        training=config_to_dict(config.stage),
    )
    checkpoints.save(done, Path(config.out))


def _open(config: ProgramConfig, source: Path) -> checkpoints.Checkpoint:
    if config.stage.stage == 0:
        model = checkpoints.load_dense(source)
        size = _any_expert_size(model)
        return checkpoints.Checkpoint(
            SparseModel(model, ConvertConfig(expert_size=size)), [],
            checkpoints.LTEInfo(expert_size=size), source,
        )  # fmt: skip
    found = checkpoints.load(source)
    if config.stage.stage == 2 and found.info.stage < 1 and not config.force:
        reason = "has not finished stage 1, and stage 2 freezes its routers"
        raise LTECheckpointError(str(source), reason, "Run stage 1 first, or set force=true")
    return found


def _any_expert_size(model: torch.nn.Module) -> int:
    """Stage 0 has no experts; the gates only need a size that divides."""
    from raysys.training.lte.adapters import find_ffns

    return find_ffns(model)[0].neurons


def _unheard(row: dict[str, Any]) -> None:
    """Nobody asked for the rows."""


def _next_stop(step: int, config: ProgramConfig) -> int:
    periods = [p for p in (config.checkpoint_every, config.evaluate_every) if p]
    return min((step // p + 1) * p for p in periods)


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _evaluate(sparse: SparseModel, tests: list[Any], config: ProgramConfig) -> dict[str, Any]:
    found = evaluate(sparse, tests, mode="dense" if config.stage.stage == 0 else "hard").as_dict()
    found.pop("density_by_position")
    return found


def _point(stage: Stage, config: ProgramConfig, figures: dict[str, Any]) -> dict[str, Any]:
    """A point of the curve: figures after so many steps and training tokens."""
    tokens = stage.step * config.stage.batch * config.text.seq_len
    return {"step": stage.step, "tokens": tokens, **figures}


def _state(
    stage: Stage, config: ProgramConfig, curve: list[dict[str, Any]], rank: int
) -> bytes | None:
    """Rank 0's bytes; where weights are sharded, every rank takes part in gathering them."""
    if rank != 0 and not stage.sharded:
        return None
    state = stage.state_dict()
    if rank != 0:
        return None
    buffer = io.BytesIO()
    plain = config_to_dict(config.stage)
    torch.save({"stage": state, "config": plain, "curve": curve}, buffer)
    return buffer.getvalue()


def _resume(stage: Stage, config: ProgramConfig, saved: bytes) -> list[dict[str, Any]]:
    try:
        state = torch.load(io.BytesIO(saved), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise LTEDataError("checkpoint", f"damaged ({error})", "Use an older one") from error
    before, now = state["config"], config_to_dict(config.stage)
    changed = [name for name in now if before.get(name) != now[name]]
    if changed and not config.force:
        was = ", ".join(f"{name}={before.get(name)!r}" for name in changed)
        remedy = "Go on with the same options, or set force=true"
        raise LTEConfigError(f"stage.{changed[0]}", now[changed[0]], f"as before: {was}", remedy)
    stage.load_state_dict(state["stage"])
    return list(state["curve"])


def _tokeniser(folder: Path) -> Callable[[str], list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise LTEDataError(str(folder), "has no tokeniser", "Set text.tokens=bytes") from error
    return lambda text: list(tokenizer(text, verbose=False)["input_ids"])
