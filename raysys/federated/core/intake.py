"""Takes updates that come from outside, as safetensors or Arrow, and screens everything about them.

Bytes from a device are untrusted: nothing is unpickled, sizes are checked before anything is
allocated, and an update must be of this model, this round and a client that was asked. What passes
goes through the same norm and finiteness screens as simulated clients and into the same kind of
partial sum, so a job may mix simulated and real devices. Bad bytes never raise: they are refused
with a reason, since one device must not stop a round.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raysys.errors import CapabilityError, ConfigError, DataError, RaysysError
from raysys.federated.core.ladder import Trained
from raysys.federated.core.messages import Partial, Status, TrainTask
from raysys.federated.core.model import layout_of
from raysys.federated.core.population import Population
from raysys.federated.core.serialize import pack_arrays, unpack_arrays
from raysys.federated.core.training import TaskFold

FORMAT = "raysys-update-1"
HEADER_BYTES = 1 << 20
MAX_SAMPLES = 1_000_000
FLOATS = ("float16", "float32", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One client's answer: ``delta`` float32 [P], trained less received weights, and facts."""

    spec_id: str
    round_id: int
    attempt: int
    client: int
    n_samples: int
    delta: npt.NDArray[Any]
    loss_first: float = 0.0
    loss_last: float = 0.0


class Verdict(enum.Enum):
    """What became of an offered update."""

    TAKEN = "taken"
    DUPLICATE = "duplicate"  # the client's first answer counts
    LATE = "late"  # of a round that is closed
    REFUSED = "refused"


def pack_update(update: Update, kind: str = "safetensors") -> bytes:
    """Serialise an update, as a device does.

    Args:
        kind: "safetensors" or "arrow".
    """
    if kind == "arrow":
        numbers = [update.round_id, update.attempt, update.client, update.n_samples]
        return pack_arrays(
            {
                "format": np.frombuffer(FORMAT.encode(), dtype=np.uint8),
                "spec_id": np.frombuffer(update.spec_id.encode(), dtype=np.uint8),
                "numbers": np.array(numbers, dtype=np.int64),
                "losses": np.array([update.loss_first, update.loss_last], dtype=np.float64),
                "delta": np.ascontiguousarray(update.delta),
            }
        )
    if kind != "safetensors":
        raise ConfigError("kind", kind, "'safetensors' or 'arrow'")
    facts = {k: v for k, v in dataclasses.asdict(update).items() if k != "delta"}
    metadata = {"format": FORMAT, **{name: str(value) for name, value in facts.items()}}
    content: bytes = _safetensors().save({"delta": np.ascontiguousarray(update.delta)}, metadata)
    return content


def read_update(content: bytes) -> Update:
    """Read what :func:`pack_update` or a device wrote; decides by the first bytes.

    Raises:
        DataError: anything else, above all a pickle.
    """
    if content[:1] == b"\x80":
        raise DataError("update", "is a pickle, which could run code here", "Send safetensors")
    try:
        if content[:4] == b"\xff\xff\xff\xff":
            return _from_arrow(unpack_arrays(content, "update"))
        return _from_safetensors(content)
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise DataError("update", f"is malformed ({error})", f"Send {FORMAT}") from error


class TaskIntake:
    """Collects the answers to one task from outside, and closes to its partial sum.

    Args:
        task: which clients were asked, for which model and round.
        population: the clients. max_samples: largest number of samples a client may claim.

    Raises:
        ConfigError: the strategy needs what a device does not send (control variates, losses of
            the received weights), or the clients themselves must add noise.
    """

    def __init__(
        self, task: TrainTask, population: Population, max_samples: int = MAX_SAMPLES
    ) -> None:
        feedback = task.feedback
        if feedback.controls or feedback.halves or feedback.weighting == "loss":
            raise ConfigError("feedback", feedback, "samples or uniform weights, no controls")
        if task.local_noise:
            raise ConfigError("local_noise", task.local_noise, "0: real devices add their own")
        self._task = task
        self._place = {client: place for place, client in enumerate(task.clients.tolist())}
        self._population = population
        self._max_samples = max_samples
        self._taken: dict[int, Update] = {}
        self._n_params = layout_of(task.spec).n_params
        self.refused: list[str] = []

    @property
    def missing(self) -> list[int]:
        """Clients that have not answered."""
        return [client for client in self._place if client not in self._taken]

    def offer(self, content: bytes) -> tuple[Verdict, str]:
        """Take one update, or say why not; never raises for what the bytes hold."""
        try:
            if len(content) > 8 * self._n_params + HEADER_BYTES:
                raise DataError("update", f"is {len(content)} bytes long", "Send float32")
            update = read_update(content)
            self._check(update)
        except RaysysError as error:
            self.refused.append(str(error))
            return Verdict.REFUSED, str(error)
        task = self._task
        if (update.round_id, update.attempt) != (task.round_id, task.attempt):
            return Verdict.LATE, f"round {task.round_id} is open, this is of {update.round_id}"
        if update.client in self._taken:
            return Verdict.DUPLICATE, f"client {update.client} has answered"
        self._taken[update.client] = update
        return Verdict.TAKEN, ""

    def close(self) -> Partial:
        """The partial sum; clients that did not answer have failed. Order of arrival is nothing."""
        counts = self._population.counts(self._task.clients).copy()
        fold = TaskFold(self._task, np.maximum(counts, 1), self._n_params)
        places = sorted(self._place[client] for client in self._taken)
        if places:
            updates = [self._taken[int(self._task.clients[place])] for place in places]
            where = np.array(places, dtype=np.int64)
            fold.n_samples[where] = [update.n_samples for update in updates]
            delta = torch.from_numpy(np.stack([update.delta for update in updates]))
            first = torch.tensor([update.loss_first for update in updates], dtype=torch.float32)
            last = torch.tensor([update.loss_last for update in updates], dtype=torch.float32)
            fold.add(where, Trained(delta, first, last), None, [])
        absent = [self._place[client] for client in self.missing]
        fold.mark(np.array(absent, dtype=np.int64), Status.FAILED)
        return fold.result()

    def _check(self, update: Update) -> None:
        if update.spec_id != self._task.spec.spec_id:
            raise DataError("update.spec_id", f"{update.spec_id!r}", "Fetch the current model")
        if update.client not in self._place:
            raise DataError("update.client", f"{update.client} was not asked", "Wait to be asked")
        if not 1 <= update.n_samples <= self._max_samples:
            raise DataError(
                "update.n_samples", f"claims {update.n_samples}", f"1 to {self._max_samples}"
            )
        if update.delta.shape != (self._n_params,):
            raise DataError("update.delta", f"has shape {update.delta.shape}", f"{self._n_params}")


def _from_arrow(arrays: dict[str, npt.NDArray[Any]]) -> Update:
    if arrays["format"].tobytes() != FORMAT.encode():
        raise DataError("update", "is of another format", f"Send {FORMAT}")
    round_id, attempt, client, n_samples = (int(n) for n in arrays["numbers"])
    first, last = (float(loss) for loss in arrays["losses"])
    return Update(
        spec_id=arrays["spec_id"].tobytes().decode(),
        round_id=round_id,
        attempt=attempt,
        client=client,
        n_samples=n_samples,
        loss_first=first,
        loss_last=last,
        delta=_floats(arrays["delta"]),
    )


def _from_safetensors(content: bytes) -> Update:
    length = int.from_bytes(content[:8], "little")
    if length > min(HEADER_BYTES, len(content) - 8):
        raise DataError("update", "is neither safetensors nor Arrow", f"Send {FORMAT}")
    facts = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    if facts.get("format") != FORMAT:
        raise DataError("update", "is of another format", f"Send {FORMAT}")
    library = _safetensors()
    try:
        tensors = library.load(content)
    except Exception as error:  # its error class is native and of no public module
        raise DataError("update", f"is damaged ({error})", "Send it again") from error
    return Update(
        spec_id=facts["spec_id"],
        round_id=int(facts["round_id"]),
        attempt=int(facts["attempt"]),
        client=int(facts["client"]),
        n_samples=int(facts["n_samples"]),
        loss_first=float(facts["loss_first"]),
        loss_last=float(facts["loss_last"]),
        delta=_floats(tensors["delta"]),
    )


def _floats(delta: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """As float32; what does not fit becomes infinite and is screened as such."""
    if delta.dtype.name not in FLOATS:
        raise DataError("update.delta", f"is {delta.dtype}", f"Send one of {FLOATS}")
    with np.errstate(over="ignore"):
        return np.array(delta, dtype=np.float32)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise CapabilityError(
            "safetensors", str(error), "pip install safetensors, or send Arrow"
        ) from error
    return safetensors.numpy
