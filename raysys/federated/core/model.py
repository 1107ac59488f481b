"""Models as data: an architecture that can be built anywhere, and flat float32 weights.

An architecture is a small frozen value that travels between processes instead of a module; a
module of your own is named by an importable factory. Parameters live in one flat buffer in the
order of ``named_parameters()``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import math
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from raysys.config import check, check_choice
from raysys.errors import ConfigError
from raysys.federated.core.randomness import Purpose, torch_seed

FlatWeights = npt.NDArray[np.float32]
Task = Literal["classification", "regression"]


@runtime_checkable
class Architecture(Protocol):
    """Something hashable that builds a ``torch.nn.Module``."""

    def build(self) -> nn.Module:
        """Return a freshly initialised module in training mode."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mlp:
    """Multilayer perceptron with ReLU; two sizes make a linear model."""

    sizes: tuple[int, ...] = (64, 64, 10)

    def __post_init__(self) -> None:
        good = len(self.sizes) >= 2 and all(size >= 1 for size in self.sizes)
        check(self, "sizes", good, "at least input and output size, each at least 1")

    def build(self) -> nn.Module:
        """Flatten, then linear layers with ReLU between them."""
        layers: list[nn.Module] = [nn.Flatten()]
        for number, (inner, outer) in enumerate(zip(self.sizes, self.sizes[1:])):
            layers += [nn.ReLU()] if number else []
            layers.append(nn.Linear(inner, outer))
        return nn.Sequential(*layers)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cnn:
    """3x3 convolutions with ReLU and 2x2 max-pooling, then linear layers."""

    image: tuple[int, int, int] = (1, 8, 8)
    channels: tuple[int, ...] = (8, 16)
    hidden: tuple[int, ...] = ()
    classes: int = 10

    def __post_init__(self) -> None:
        smallest = min(self.image[1:]) >> len(self.channels)
        check(self, "channels", smallest >= 1 and bool(self.channels), "1 to log2(side) blocks")
        check(self, "classes", self.classes >= 1, "at least 1")

    def build(self) -> nn.Module:
        """Blocks of convolution, ReLU and pooling; then the hidden and output layers."""
        depth, height, width = self.image
        layers: list[nn.Module] = []
        for channels in self.channels:
            layers += [nn.Conv2d(depth, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            depth, height, width = channels, height // 2, width // 2
        layers.append(nn.Flatten())
        inner = depth * height * width
        for size in self.hidden:
            layers += [nn.Linear(inner, size), nn.ReLU()]
            inner = size
        return nn.Sequential(*layers, nn.Linear(inner, self.classes))


class _BagClassifier(nn.Module):
    """Mean of the embeddings of a bag of tokens, then a linear layer."""

    def __init__(self, vocabulary: int, dim: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.output = nn.Linear(dim, classes)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, classes] of int64 tokens [B, L]."""
        logits: Tensor = self.output(self.embedding(tokens_BL).mean(dim=1))
        return logits


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingBag:
    """Bag-of-tokens classifier for fixed-length int64 contexts, as next-character prediction."""

    vocabulary: int
    dim: int = 16
    classes: int = 10

    def __post_init__(self) -> None:
        for name in ("vocabulary", "dim", "classes"):
            check(self, name, getattr(self, name) >= 1, "at least 1")

    def build(self) -> nn.Module:
        """Embedding, mean over the context, linear output."""
        return _BagClassifier(self.vocabulary, self.dim, self.classes)


class _ContextClassifier(nn.Module):
    """Embeddings of a fixed-length context side by side, then an MLP."""

    def __init__(self, vocabulary: int, dim: int, context: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.inner = nn.Linear(context * dim, hidden)
        self.output = nn.Linear(hidden, classes)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits [B, classes] of int64 tokens [B, L]."""
        logits: Tensor = self.output(self.inner(self.embedding(tokens_BL).flatten(1)).relu())
        return logits


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ContextMlp:
    """Neural language model over a fixed context (Bengio et al. 2003): the order counts."""

    vocabulary: int
    context: int
    dim: int = 8
    hidden: int = 64
    classes: int = 10

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "dim", "hidden", "classes"):
            check(self, name, getattr(self, name) >= 1, "at least 1")

    def build(self) -> nn.Module:
        """Embedding, hidden layer with ReLU, linear output."""
        return _ContextClassifier(
            self.vocabulary, self.dim, self.context, self.hidden, self.classes
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FromFactory:
    """A module of your own: ``factory`` is ``"package.module:function"``, called with arguments.

    The function must be importable where workers run, and return a module whose parameters are
    all trained.
    """

    factory: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        """Import the factory and call it.

        Raises:
            ConfigError: it cannot be imported or does not return a module.
        """
        name, _, attribute = self.factory.partition(":")
        try:
            maker = getattr(importlib.import_module(name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(
                "model.factory", self.factory, "an importable package.module:function", str(error)
            ) from error
        module = maker(**dict(self.arguments))
        if not isinstance(module, nn.Module):
            raise ConfigError("model.factory", type(module).__name__, "a torch.nn.Module")
        return module


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """An architecture and what its outputs mean.

    Args:
        architecture: how to build the module.
        task: "classification" (cross-entropy on int64 labels) or "regression" (squared error on
            float32 targets [N, outputs]).
    """

    architecture: Any
    task: Task = "classification"

    def __post_init__(self) -> None:
        check_choice(self, "task", ("classification", "regression"))

    @property
    def spec_id(self) -> str:
        """Short identifier that changes with anything in the spec."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where each named tensor lies in the flat buffer."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def n_params(self) -> int:
        """Length of the flat buffer."""
        return sum(self.sizes)

    def split(self, flat_CP: Tensor) -> list[Tensor]:
        """Views of a stacked flat buffer [C, P] as one stacked tensor per parameter."""
        parts = torch.split(flat_CP, list(self.sizes), dim=1)
        return [part.reshape(len(flat_CP), *shape) for part, shape in zip(parts, self.shapes)]


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """A model's flat parameters, float32 [P], of one spec and version; read-only."""

    values: FlatWeights
    spec_id: str
    version: int = 0

    def __post_init__(self) -> None:
        if self.values.dtype != np.float32 or self.values.ndim != 1:
            raise ConfigError(
                "weights",
                f"{self.values.dtype} {self.values.shape}",
                "a flat float32 array",
                "Convert with numpy.ascontiguousarray(x, dtype=numpy.float32)",
            )

    def check_spec(self, spec: ModelSpec) -> None:
        """Raise a ConfigError unless these weights belong to ``spec``."""
        if self.spec_id != spec.spec_id:
            raise ConfigError("weights.spec_id", self.spec_id, spec.spec_id, "Another model's")
        if len(self.values) != layout_of(spec).n_params:
            raise ConfigError("weights", len(self.values), f"{layout_of(spec).n_params} values")


@functools.lru_cache(maxsize=64)
def layout_of(spec: ModelSpec) -> Layout:
    """Layout of a spec's parameters.

    Raises:
        ConfigError: the module has no parameters, or statistics that must not be averaged blindly.
    """
    with torch.random.fork_rng(devices=[]):
        module = spec.architecture.build()
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and name.rpartition(".")[2].startswith("running_"):
            raise ConfigError(
                "model",
                name,
                "no running statistics: averaging them over clients is wrong",
                "Use GroupNorm, or BatchNorm with track_running_stats=False",
            )
    named = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    if not named:
        raise ConfigError("model", type(module).__name__, "a module with parameters")
    return Layout(tuple(n for n, _ in named), tuple(s for _, s in named))


def initial_weights(spec: ModelSpec, seed: int, member: int = 0) -> Weights:
    """Freshly initialised weights; ``member`` numbers independent starts of one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, Purpose.INITIALISATION, member))
        module = spec.architecture.build()
    return Weights(flatten(module), spec.spec_id, 0)


def flatten(module: nn.Module) -> FlatWeights:
    """Parameters of a module as one flat float32 array."""
    parts = [p.detach().reshape(-1).to(torch.float32) for p in module.parameters()]
    return torch.cat(parts).numpy().copy()


def load_flat(module: nn.Module, values: FlatWeights) -> nn.Module:
    """Copy a flat buffer into the parameters of ``module`` and return it."""
    flat = torch.from_numpy(np.array(values, dtype=np.float32))
    offset = 0
    with torch.no_grad():
        for parameter in module.parameters():
            size = parameter.numel()
            parameter.copy_(flat[offset : offset + size].view_as(parameter))
            offset += size
    return module


def macs_per_sample(spec: ModelSpec, sample: Tensor) -> int:
    """Multiply-accumulates of one forward pass on a batch of one, counted by layer hooks."""
    total = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += module.in_features * output.numel()
        elif isinstance(module, nn.Conv2d):
            per_output = module.weight[0].numel()
            total += per_output * output.numel()

    with torch.random.fork_rng(devices=[]):
        module = spec.architecture.build().eval()
    hooks = [layer.register_forward_hook(count) for layer in module.modules()]
    with torch.no_grad():
        module(sample)
    for hook in hooks:
        hook.remove()
    return total
