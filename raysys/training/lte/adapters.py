"""Where the FFNs of a model are: one row per architecture, and a view that hides the differences.

An FFN is an *input module* (its first argument is the FFN's input, and it gets the router), one
or two input projections, and an output projection whose input is the activated hidden vector.
GPT-2 stores its projections transposed; BERT spreads the FFN over two modules of a layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raysys.training.lte.errors import LTEConfigError, LTEDataError

_GELU = "gelu"
_TANH = "gelu_tanh"
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": _GELU,
    "gelu_new": _TANH,
    "gelu_pytorch_tanh": _TANH,
    "relu": "relu",
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """Names inside a model.

    Args:
        layers: candidates for the dotted path of the list of layers.
        entry: input module, inside a layer.
        inputs: input projections inside a layer: gate and up, or one.
        output: output projection inside a layer.
        activation: field of the model's configuration.
    """

    layers: tuple[str, ...]
    entry: str
    inputs: tuple[str, ...]
    output: str
    activation: str = "hidden_act"

    @property
    def gated(self) -> bool:
        return len(self.inputs) == 2


_LLAMA = Adapter(
    layers=("model.layers", "layers"),
    entry="mlp",
    inputs=("mlp.gate_proj", "mlp.up_proj"),
    output="mlp.down_proj",
)
_GEMMA = dataclasses.replace(_LLAMA, activation="hidden_activation")
_BERT_PATHS = ("roberta.encoder.layer", "bert.encoder.layer", "encoder.layer")
_BERT = Adapter(
    layers=_BERT_PATHS, entry="intermediate", inputs=("intermediate.dense",), output="output.dense"
)
ADAPTERS: Mapping[str, Adapter] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gpt2": Adapter(
        layers=("transformer.h", "h"),
        entry="mlp",
        inputs=("mlp.c_fc",),
        output="mlp.c_proj",
        activation="activation_function",
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "opt": Adapter(
        layers=("model.decoder.layers", "decoder.layers"),
        entry="fc1",
        inputs=("fc1",),
        output="fc2",
        activation="activation_function",
    ),
}
_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class FFN:
    """One FFN of a live model.

    Args:
        index: number of its layer.
        path: dotted path of its input module in the model.
        entry, inputs, output: the modules.
        activation: one of ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"relu"``.
    """

    index: int
    path: str
    entry: nn.Module
    inputs: tuple[nn.Module, ...]
    output: nn.Module
    activation: str

    @property
    def gated(self) -> bool:
        return len(self.inputs) == 2

    @property
    def neurons(self) -> int:
        return int(self.rows(0).shape[0])

    @property
    def hidden(self) -> int:
        return int(self.rows(0).shape[1])

    def rows(self, which: int) -> Tensor:
        """Input weights [f, d], one row per neuron; a view of the parameter."""
        return _oriented(self.inputs[which])

    def columns(self) -> Tensor:
        """Output weights [f, d]: row j is what neuron j writes; a view of the parameter."""
        return _oriented(self.output).T

    def biases(self) -> list[nn.Parameter]:
        """Biases that travel with the neurons."""
        found = [getattr(module, "bias", None) for module in self.inputs]
        return [bias for bias in found if bias is not None]

    @torch.no_grad()
    def permute(self, order: Tensor) -> None:
        """Put neuron ``order[j]`` in place j; the function stays the same."""
        order = order.long()
        for which in range(len(self.inputs)):
            rows = self.rows(which)
            rows.copy_(rows[order].clone())
        columns = self.columns()
        columns.copy_(columns[order].clone())
        for bias in self.biases():
            bias.copy_(bias[order].clone())


def adapter_of(config: Any) -> Adapter:
    """The adapter of a model's configuration.

    Raises:
        LTEConfigError: the architecture is unknown, already a mixture of experts, or quantised.
    """
    kind = str(getattr(config, "model_type", "none"))
    experts = [name for name in _EXPERT_FIELDS if getattr(config, name, None)]
    if experts or "moe" in kind or kind == "mixtral":
        remedy = "Its FFNs already choose experts; LTE converts dense FFNs"
        raise LTEConfigError("model", kind, "a dense model", remedy)
    if getattr(config, "quantization_config", None) is not None:
        remedy = "De-quantise the weights and save them as safetensors first"
        raise LTEConfigError("model", f"{kind} (quantised)", "floating-point weights", remedy)
    if kind not in ADAPTERS:
        expected = "one of " + ", ".join(sorted(ADAPTERS))
        raise LTEConfigError("model_type", kind, expected, "Add a row to lte/adapters.py")
    return ADAPTERS[kind]


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFNs of a live Hugging Face model, checked.

    Raises:
        LTEConfigError: unknown architecture or activation, or projections of another class.
        LTEDataError: a weight is not finite.
    """
    config = model.config
    adapter = adapter_of(config)
    name = str(getattr(config, adapter.activation, None) or getattr(config, "hidden_act", None))
    if name not in ACTIVATIONS:
        raise LTEConfigError("activation", name, "one of " + ", ".join(ACTIVATIONS))
    found = []
    for index, (path, layer) in enumerate(_layers(model, adapter)):
        ffn = FFN(
            index,
            f"{path}.{adapter.entry}",
            layer.get_submodule(adapter.entry),
            tuple(layer.get_submodule(item) for item in adapter.inputs),
            layer.get_submodule(adapter.output),
            ACTIVATIONS[name],
        )
        _check(ffn)
        found.append(ffn)
    return found


def _layers(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, nn.Module]]:
    for path in adapter.layers:
        try:
            layers = functools.reduce(getattr, path.split("."), model)
        except AttributeError:
            continue
        for index, layer in enumerate(layers):  # type: ignore[arg-type, var-annotated]
            yield f"{path}.{index}", layer
        return
    kind = type(model).__name__
    raise LTEConfigError("model", kind, "layers at " + " or ".join(adapter.layers))


def _oriented(module: nn.Module) -> Tensor:
    """Weight as [out, in]; GPT-2's Conv1D stores [in, out]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _check(ffn: FFN) -> None:
    for module in (*ffn.inputs, ffn.output):
        kind = type(module).__name__
        weight = getattr(module, "weight", None)
        plain = isinstance(module, nn.Linear) or kind == "Conv1D"
        if not plain or weight is None or not weight.is_floating_point():
            remedy = "De-quantise the weights and save them as safetensors first"
            raise LTEConfigError(f"{ffn.path}", kind, "plain floating-point projections", remedy)
        if not bool(torch.isfinite(weight).all()):
            raise LTEDataError(ffn.path, "weights hold NaN or infinity", "Repair the checkpoint")
