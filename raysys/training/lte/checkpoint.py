"""Checkpoints: a Hugging Face folder of the base architecture plus routers and the permutation.

The dense tensors keep their usual names, permuted, so a stock loader can open the folder and ignore
the rest. ``lte.perm.{l}`` holds the original index of every neuron, so a conversion can be undone.
A folder is written under a temporary name and renamed: it is complete or not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raysys import scratch
from raysys.errors import StorageError
from raysys.training.lte.adapters import adapter_of
from raysys.training.lte.config import FORMAT_VERSION, ConvertConfig
from raysys.training.lte.errors import LTECheckpointError, LTEConfigError
from raysys.training.lte.gating import SparseModel

PREFIX = "LTE"
WEIGHTS = "model.safetensors"
PERMUTATION = "lte.perm."
_KEPT = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "generation_config.json",
         "added_tokens.json", "chat_template*", "*.model")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LTEInfo:
    """The ``lte`` entry of ``config.json``.

    Args:
        stage: last finished training stage; 0 right after the conversion.
        thresholds: offsets of the threshold in logits that the model was trained for.
        sparsity: ``{"overall": ..., "per_layer": [...]}`` on held-out data, where it was measured.
        base_architecture: class of the dense model.
        base_sha256: digest of the dense weights that were converted.
        training: the last stage's configuration, for reference.
    """

    expert_size: int
    threshold: float = 0.5
    stage: int = 0
    router_bias: bool = False
    router_dtype: str = "float32"
    grouping: str = "kmeans"
    thresholds: tuple[float, ...] = (0.0,)
    sparsity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base_architecture: str = ""
    base_sha256: str = ""
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    version: int = FORMAT_VERSION

    def convert_config(self) -> ConvertConfig:
        """Options under which gates and routers are rebuilt."""
        return ConvertConfig(
            expert_size=self.expert_size,
            threshold=self.threshold,
            router_init="warm" if self.router_bias else "default",
        )


@dataclasses.dataclass(slots=True, eq=False)
class Checkpoint:
    """A loaded checkpoint: the gated model, its permutations and its facts."""

    sparse: SparseModel
    permutations: list[Tensor]
    info: LTEInfo
    folder: Path


def read_info(folder: Path) -> LTEInfo | None:
    """The ``lte`` entry of a model folder; None for a dense model.

    Raises:
        StorageError: there is no such folder.
        LTECheckpointError: the entry is malformed or of another version.
    """
    config = read_config(folder)
    entry = config.get("lte")
    if entry is None:
        return None
    where = str(folder / "config.json")
    if not isinstance(entry, dict) or entry.get("version") != FORMAT_VERSION:
        found = entry.get("version") if isinstance(entry, dict) else entry
        reason = f"lte.version is {found!r}, and this raysys reads {FORMAT_VERSION}"
        raise LTECheckpointError(where, reason, "Convert again, or use the raysys that wrote it")
    known = {field.name for field in dataclasses.fields(LTEInfo)}
    try:
        values = {key: value for key, value in entry.items() if key in known}
        return LTEInfo(**{**values, "thresholds": tuple(values.get("thresholds", (0.0,)))})
    except TypeError as error:
        raise LTECheckpointError(where, f"lte is incomplete ({error})", "Convert again") from None


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        StorageError: no such folder, or it cannot be read.
        LTECheckpointError: it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(str(path), reason, "Give a folder in the Hugging Face layout") from error
    except ValueError as error:
        raise LTECheckpointError(str(path), f"not JSON ({error})", "Convert again") from None
    if not isinstance(value, dict):
        raise LTECheckpointError(str(path), "not a JSON object", "Convert again")
    return value


def set_entry(folder: Path, **values: Any) -> None:
    """Change keys of the ``lte`` entry of a checkpoint's ``config.json``, in one step.

    Raises:
        StorageError, LTECheckpointError: it cannot be read or written, or is a dense model.
    """
    config = read_config(folder)
    if not isinstance(config.get("lte"), dict):
        raise LTECheckpointError(str(folder), "is a dense model", "Convert it: raysys lte convert")
    config["lte"] |= values
    partial = folder / ".config.json.part"
    try:
        partial.write_text(json.dumps(config, indent=2) + "\n")
        os.replace(partial, folder / "config.json")
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(str(folder), reason, "Make the folder writable") from error


def load_dense(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a dense model folder with the class that its configuration names.

    Raises:
        StorageError: no such folder.
        LTEConfigError: the architecture cannot be converted, or already is an LTE model.
    """
    if read_info(folder) is not None:
        raise LTEConfigError("model", str(folder), "a dense model", "It is an LTE model already")
    return _load(folder, _architecture(folder), dtype)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Load and check an LTE checkpoint.

    Raises:
        StorageError: no such folder.
        LTECheckpointError: it is a dense model, or its parts do not fit together.
    """
    info = read_info(folder)
    if info is None:
        raise LTECheckpointError(str(folder), "is a dense model", "Convert it: raysys lte convert")
    extras = _extras(folder)
    model = _load(folder, info.base_architecture, dtype)
    sparse = SparseModel(model, info.convert_config())
    permutations = []
    for gate in sparse.gates:
        name = f"{gate.ffn.path}.router"
        weight = _expect(extras, folder, f"{name}.weight", tuple(gate.router.weight.shape))
        with torch.no_grad():
            gate.router.weight.copy_(weight)
            if gate.router.bias is not None:
                bias = _expect(extras, folder, f"{name}.bias", (gate.experts,))
                gate.router.bias.copy_(bias)
        permutation = _expect(extras, folder, f"{PERMUTATION}{gate.ffn.index}", (gate.ffn.neurons,))
        if not torch.equal(permutation.sort().values.long(), torch.arange(gate.ffn.neurons)):
            where = str(folder / WEIGHTS)
            reason = f"{PERMUTATION}{gate.ffn.index} is not a permutation"
            raise LTECheckpointError(where, reason, "Convert again")
        permutations.append(permutation)
    if extras:
        reason = f"holds {min(extras)}, which this model has no place for"
        raise LTECheckpointError(str(folder / WEIGHTS), reason, "Was it made for more layers?")
    return Checkpoint(sparse, permutations, info, folder)


def save(checkpoint: Checkpoint, folder: Path, *, tokenizer_from: Path | None = None) -> None:
    """Write a checkpoint; whatever was at ``folder`` is replaced at the very end.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    extra = {
        f"{PERMUTATION}{index}": permutation.to(torch.int32)
        for index, permutation in enumerate(checkpoint.permutations)
    }
    entry = dataclasses.asdict(checkpoint.info)
    write_folder(
        checkpoint.sparse.model,
        folder,
        extra=extra,
        changes={"architectures": [PREFIX + checkpoint.info.base_architecture], "lte": entry},
        tokenizer_from=tokenizer_from or checkpoint.folder,
    )


def write_folder(
    model: nn.Module,
    folder: Path,
    *,
    extra: Mapping[str, Tensor],
    changes: Mapping[str, Any],
    tokenizer_from: Path | None,
) -> None:
    """Write a model folder in one step.

    Raises:
        StorageError: it cannot be written.
    """
    from safetensors.torch import save_file

    try:
        with scratch.beside(folder) as partial:
            save_file({**_tensors(model), **extra}, partial / WEIGHTS, metadata={"format": "pt"})
            config = model.config.to_dict()  # type: ignore[union-attr, operator]
            config = {**config, **changes}
            config = {key: value for key, value in config.items() if value is not None}
            (partial / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
            for pattern in _KEPT if tokenizer_from is not None else ():
                for path in tokenizer_from.glob(pattern):  # type: ignore[union-attr]
                    shutil.copy2(path, partial / path.name)
            partial.chmod(0o755)
            _replace(partial, folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(str(folder), reason, "Free space or choose another folder") from error


def digest(model: nn.Module) -> str:
    """SHA-256 over the names and contents of a model's weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(_tensors(model).items()):
        total.update(name.encode())
        total.update(np.ascontiguousarray(tensor.contiguous().view(torch.uint8).numpy()).data)
    return total.hexdigest()


def _replace(partial: Path, folder: Path) -> None:
    """Put the new folder in place; an old one steps aside first and is then removed."""
    if not folder.exists():
        os.rename(partial, folder)
        return
    aside = folder.with_name(f".{folder.name}-old-{os.getpid()}")
    os.rename(folder, aside)
    os.rename(partial, folder)
    shutil.rmtree(aside, ignore_errors=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name; of tied ones only the first."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        found[name] = tensor.detach().cpu().contiguous()
    return found


def _architecture(folder: Path) -> str:
    names = read_config(folder).get("architectures") or []
    if not names:
        raise LTEConfigError("architectures", names, "the name of a model class", "In config.json")
    return str(names[0])


def _load(folder: Path, architecture: str, dtype: torch.dtype) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    adapter_of(config)  # refuses what cannot be converted before anything large is read
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise LTEConfigError("architectures", architecture, "a class of transformers")
    config.architectures = [architecture]
    level = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # it warns of the routers, which are read later
    transformers.utils.logging.disable_progress_bar()
    try:
        model = kind.from_pretrained(str(folder), config=config, dtype=dtype, local_files_only=True)
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
    assert isinstance(model, nn.Module)
    return model.eval()


def _extras(folder: Path) -> dict[str, Tensor]:
    """Routers and permutations of all weight files; the dense tensors stay on disk."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names = [
                    n
                    for n in file.keys()  # noqa: SIM118
                    if ".router." in n or n.startswith(PERMUTATION)
                ]
                found |= {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise LTECheckpointError(str(path), f"unreadable ({error})", "Convert again") from None
    return found


def _expect(extras: dict[str, Tensor], folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    where = str(folder / WEIGHTS)
    if name not in extras:
        raise LTECheckpointError(where, f"{name} is missing", "Convert again")
    tensor = extras.pop(name)
    if tuple(tensor.shape) != shape:
        reason = f"{name} has shape {tuple(tensor.shape)} instead of {shape}"
        raise LTECheckpointError(where, reason, "Convert again")
    if not bool(torch.isfinite(tensor.double()).all()):
        raise LTECheckpointError(where, f"{name} holds NaN or infinity", "Convert again")
    return tensor
