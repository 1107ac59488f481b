"""Configuration of ``raysys train``."""

from __future__ import annotations

import dataclasses

from raysys.config import check, check_choice, check_range
from raysys.training.kgt import KGTConfig
from raysys.training.kgt.loop import Recipe

SOURCES = ("digits", "mnist1d", "fashion-mnist", "folder", "parquet")
NETWORKS = ("auto", "resnet", "transformer", "huggingface")
METHODS = ("kgt", "vanilla", "linear", "gradient", "static")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which examples.

    Args:
        source: a packaged set, ``folder`` (images in one sub-folder per class) or ``parquet``
            (columns ``label`` and ``image`` with encoded bytes, or ``text``).
        path: of the folder or the Parquet file.
        image_size: side to which images are resized.
        channels: 1 for grey, 3 for colour.
        text_length: bytes, or tokens, of text that are kept.
        tokenizer: local folder of a Hugging Face tokenizer; empty takes bytes as tokens.
        test_share: share held out where the source has no test part.
        train_rows: at most this many training examples; 0 takes all.
    """

    source: str = "digits"
    path: str = ""
    image_size: int = 28
    channels: int = 3
    text_length: int = 128
    tokenizer: str = ""
    test_share: float = 0.2
    train_rows: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "source", SOURCES)
        outside = self.source in ("folder", "parquet")
        check(self, "path", bool(self.path) == outside, "a path exactly for folder and parquet")
        check_range(self, "image_size", 8)
        check_choice(self, "channels", (1, 3))
        check_range(self, "text_length", 4)
        check_range(self, "test_share", 0, 1, low_open=True, high_open=True)
        check_range(self, "train_rows", 0)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """Which network.

    Args:
        kind: ``auto`` takes a residual net for signals and images, an encoder for text;
            ``huggingface`` a pretrained encoder from the local folder ``init``.
        widths: channels of each residual block.
        stem_stride: stride of the first convolution of a residual net.
        width: width of the encoder.
        blocks: blocks of the encoder.
        dropout: of the encoder.
        init: checkpoint of an earlier run, or model folder for ``huggingface``, to fine-tune from;
            a head for other classes is new.
    """

    kind: str = "auto"
    widths: tuple[int, ...] = (16, 16, 16, 32, 32, 32, 64, 64, 64)
    stem_stride: int = 1
    width: int = 64
    blocks: int = 4
    dropout: float = 0.1
    init: str = ""

    def __post_init__(self) -> None:
        check_choice(self, "kind", NETWORKS)
        check(self, "widths", bool(self.widths) and min(self.widths) > 0, "positive channel counts")
        check_range(self, "stem_stride", 1)
        check_range(self, "width", 4)
        check_range(self, "blocks", 1)
        check_range(self, "dropout", 0, 1, high_open=True)
        given = self.kind != "huggingface" or bool(self.init)
        check(self, "init", given, "a local model folder", "Set network.init=FOLDER")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """All of ``raysys train``.

    Args:
        method: what decides about freezing; ``vanilla`` freezes nothing.
        control: where KGT's reference and controller run: ``inline`` in the training process, or
            ``actors`` beside it.
        freeze_start: linear schedule: share of the run before the first freeze; static: before all.
        freeze_level: share of the modules that linear and static freeze at the end.
        gradient_interval: steps per interval of the gradient criterion.
        workers: data-parallel workers; more than one trains on Ray Train with gloo.
        exchange_every: steps between agreements of the workers on what is frozen.
        checkpoint_every: optimizer steps between checkpoints; 0 saves once per epoch.
        dry_run: print the layer modules, their measured costs and the interval; train nothing.
        threads: torch threads per worker.
    """

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    kgt: KGTConfig = dataclasses.field(default_factory=KGTConfig)
    method: str = "kgt"
    control: str = "inline"
    freeze_start: float = 0.5
    freeze_level: float = 1.0
    gradient_interval: int = 100
    workers: int = 1
    exchange_every: int = 10
    checkpoint_every: int = 0
    dry_run: bool = False
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self, "method", METHODS)
        check_choice(self, "control", ("inline", "actors"))
        check_range(self, "freeze_start", 0, 1, high_open=True)
        check_range(self, "freeze_level", 0, 1, low_open=True)
        check_range(self, "gradient_interval", 1)
        check_range(self, "workers", 1)
        check_range(self, "exchange_every", 1)
        check_range(self, "checkpoint_every", 0)
        check_range(self, "threads", 1)
        both = self.workers > 1 and self.control == "actors"
        check(self, "control", not both, "'inline' with several workers", "Set control=inline")
