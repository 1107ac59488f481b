"""The server's side of a federated round whose devices come one by one, as Venn grants them.

A lease buys one plan; a plan carries a nonce and takes one update. What comes twice is answered as
the first time; what comes late, under another lease or with a wrong nonce is refused. At the end
the updates are folded in the order of clients, so that the sums do not depend on who was first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from raysys.errors import InfeasibleError
from raysys.federated.core.aggregation import ClientTable, ModelSum
from raysys.federated.core.messages import ScreenConfig, Status
from raysys.federated.core.model import layout_of
from raysys.federated.core.strategy import RoundReport, Strategy
from raysys.federated.swan.plans import FACTS, Plan, unpack_update

LeaseKey = tuple[str, int, int]  # gateway, its epoch, counter


@dataclasses.dataclass(frozen=True, slots=True)
class Admission:
    """A plan given to a lease; ``nonce`` must come back with the update."""

    plan: Plan
    nonce: bytes
    device: bytes


@dataclasses.dataclass(slots=True)
class _Answer:
    delta: npt.NDArray[np.float32]
    facts: dict[str, float]
    norm: float
    status: Status


class EdgeRound:
    """One open round of one job.

    Args:
        strategy: whose model is trained; its first model is used.
        wanted: updates that close the round.
        secret: of the job, for nonces.
        reject_above: norm above which an update is dropped.
    """

    def __init__(
        self,
        strategy: Strategy,
        round_id: int,
        wanted: int,
        *,
        seed: int,
        secret: bytes,
        screen: ScreenConfig | None = None,
        reject_above: float = math.inf,
    ) -> None:
        self.strategy, self.round_id, self.wanted, self.seed = strategy, round_id, wanted, seed
        self.screen = screen or ScreenConfig()
        self.weights = strategy.weights(0)
        self.refused = 0
        self.duplicates = 0
        self.closed = False
        self._secret, self._reject_above = secret, reject_above
        self._spec = strategy.model_spec(0)
        self._layout = layout_of(self._spec)
        self._admitted: dict[LeaseKey, Admission] = {}
        self._clients: dict[int, LeaseKey] = {}
        self._answers: dict[int, _Answer] = {}

    @property
    def answers(self) -> int:
        """Updates that were kept."""
        return sum(answer.status == Status.OK for answer in self._answers.values())

    @property
    def complete(self) -> bool:
        return self.answers >= self.wanted

    def admit(self, lease: LeaseKey, device: bytes, client: int) -> Admission:
        """The plan of a lease; asking again gives the same plan.

        Raises:
            InfeasibleError: the round is closed, or the device has another lease in it.
        """
        if self.closed:
            raise InfeasibleError(f"round {self.round_id}", "it is closed", "Check in again")
        held = self._admitted.get(lease)
        if held is not None:
            if held.device != device:
                self.refused += 1
                raise InfeasibleError("this lease", "it is another device's", "Check in again")
            return held
        other = self._clients.get(client)
        if other is not None and client in self._answers:
            raise InfeasibleError("a second plan", "this device has answered", "Check in again")
        if other is not None:
            # The device lost its first lease (a crash, a lapsed lease); the newer one counts.
            del self._admitted[other]
        assigned = self.strategy.assign(self.round_id, np.array([client], dtype=np.int64))[0]
        plan = Plan(
            spec=self._spec,
            local=assigned.local,
            client=client,
            seed=self.seed,
            round_id=self.round_id,
            version=assigned.version,
            clip_norm=self.screen.clip_norm or 0.0,
        )
        admission = Admission(plan, self._nonce(lease, device), device)
        self._admitted[lease] = admission
        self._clients[client] = lease
        return admission

    def answer(self, lease: LeaseKey, device: bytes, nonce: bytes, content: bytes) -> bool:
        """Take an update; True when it is (or was) accepted for the round.

        Raises:
            InfeasibleError: no such lease here, another device's, a wrong nonce, or too late.
            DataError: the content is damaged or of the wrong shape.
        """
        held = self._admitted.get(lease)
        if held is None or held.device != device or not hmac.compare_digest(held.nonce, nonce):
            self.refused += 1
            raise InfeasibleError("this update", "its lease or nonce is not of this round", "")
        if held.plan.client in self._answers:
            self.duplicates += 1
            return self._answers[held.plan.client].status == Status.OK
        if self.closed:
            raise InfeasibleError("this update", f"round {self.round_id} is closed", "")
        delta, facts = unpack_update(content, self._layout)
        norm = float(np.linalg.norm(delta.astype(np.float64)))
        status = Status.OK
        if not math.isfinite(norm):
            status = Status.NONFINITE
        elif norm > self._reject_above:
            status = Status.REJECTED
        self._answers[held.plan.client] = _Answer(delta, facts, norm, status)
        return status == Status.OK

    def close(self, duration_s: float = 0.0) -> RoundReport:
        """Fold what was kept into the strategy and make the server step."""
        self.closed = True
        order = sorted(self._answers)
        total = ModelSum(np.zeros(self._layout.n_params))
        for client, weight in zip(order, self._weights(order)):
            answer = self._answers[client]
            if answer.status != Status.OK:
                continue
            scale = 1.0
            if self.screen.clip_norm and answer.norm > self.screen.clip_norm:
                scale = self.screen.clip_norm / answer.norm
            total.delta += weight * scale * answer.delta.astype(np.float64)
            total.weight += float(weight)
            total.clients += 1
        report = self._report(order, duration_s)
        self.strategy.fold(self.round_id, 0, total)
        self.strategy.close(self.round_id, report)
        return report

    def norms(self) -> list[float]:
        """Norms of the updates that were kept."""
        return [a.norm for a in self._answers.values() if a.status == Status.OK]

    def response_s(self) -> list[float]:
        """Training seconds that devices reported."""
        found = [a.facts["steps"] * a.facts["seconds_per_step"] for a in self._answers.values()]
        return [value for value in found if math.isfinite(value) and value >= 0]

    def _held(self, order: list[int]) -> list[Admission]:
        return [self._admitted[self._clients[client]] for client in order]

    def _weights(self, order: list[int]) -> npt.NDArray[np.float64]:
        """Weight of each answer: 0 where it was not kept."""
        by_samples = self.strategy.feedback_spec().weighting == "samples"
        answers = [self._answers[client] for client in order]
        return np.array(
            [
                (a.facts["n_samples"] if by_samples else 1.0) * (a.status == Status.OK)
                for a in answers
            ]
        )

    def _nonce(self, lease: LeaseKey, device: bytes) -> bytes:
        text = f"{self.round_id}|{lease}|".encode() + device
        return hmac.new(self._secret, text, hashlib.sha256).digest()

    def _report(self, order: list[int], duration_s: float) -> RoundReport:
        rows = [self._answers[client] for client in order]
        facts = {name: np.array([row.facts[name] for row in rows]) for name in FACTS}
        status = np.array([row.status for row in rows], dtype=np.int8)
        single = self.strategy.feedback_spec().update_group > 0
        weights = self._weights(order)
        table = ClientTable(
            clients=np.array(order, dtype=np.int64),
            rows=np.zeros(len(order), dtype=np.int64),
            loss_first=facts["loss_first"].astype(np.float32),
            loss_last=facts["loss_last"].astype(np.float32),
            norm=np.array([row.norm for row in rows], dtype=np.float32),
            n_samples=facts["n_samples"].astype(np.int64),
            status=status,
            updates=np.stack([row.delta for row in rows]) if single and rows else None,
            update_weight=weights.astype(np.float32) if single else None,
            update_row=np.zeros(len(order), dtype=np.int64) if single else None,
        )
        kept = table.ok
        n_bytes = 4 * self._layout.n_params
        counts: dict[str, Any] = {s.name.lower(): table.count(s) for s in Status if s < Status.LATE}
        counts["late"] = 0
        counts["failed"] = len(self._admitted) - len(order)
        batches = np.array([held.plan.local.batch_size for held in self._held(order)])
        trained = facts["steps"] * np.minimum(facts["n_samples"], batches)
        return RoundReport(
            round_id=self.round_id,
            attempts=1,
            counts=counts,
            loss_first=_mean(table.loss_first[kept]),
            loss_last=_mean(table.loss_last[kept]),
            bytes_down=n_bytes * len(self._admitted),
            bytes_up=n_bytes * len(order),
            macs=int(3 * self._layout.n_params * float(np.nansum(trained))),
            virtual_s=0.0,
            duration_s=duration_s,
            table=table,
        )


def _mean(values: npt.NDArray[np.float32]) -> float:
    return float(values.mean(dtype=np.float64)) if values.size else math.nan
