"""One lease carried through: plan, model, training under Swan, update, lease given back.

Every stage is written down before the next begins, so that a killed device goes on where it was if
its lease still lives.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import Executor
from typing import Any

from actors.edge.client import DownloadBrokenError
from actors.edge.device import Device
from actors.edge.profiles import Profiles
from actors.edge.state import CHECKPOINTS, MODEL, UPDATE, Work
from actors.edge.trainer import train_plan
from actors.swan.engine import Swan
from actors.venn.client import ticket_at
from raysys.errors import InterruptedRunError, RaysysError, RemoteError
from raysys.federated.core.training import Samples
from raysys.federated.swan.energy import EnergyLoan
from raysys.federated.swan.plans import (
    Plan,
    PlanRefusedError,
    check_work,
    pack_update,
    plan_from_json,
    unpack_weights,
)

DONE, DECLINED, FAILED, KEPT = 0, 1, 2, -1
RENEW_SHARE = 0.3


class Errand:
    """Carries leases through for one device.

    Args:
        trainer: one thread, in which all training happens.
    """

    def __init__(
        self, device: Device, samples: Samples, loan: EnergyLoan, trainer: Executor
    ) -> None:
        self.device, self.samples, self.loan, self.trainer = device, samples, loan, trainer
        self.updates = 0
        self.profiles = Profiles(device)
        self._declined: dict[str, float] = {}

    async def run(self, work: Work) -> int:
        """Carry one lease through; every outcome but a stop (``KEPT``) ends with it given back."""
        device = self.device
        device.state.work = work
        device.save()
        renewing = asyncio.create_task(self._renew(work))
        outcome = FAILED
        try:
            self._check_offer(work)
            await self._plan(work)
            await self._download(work)
            await self._train(work)
            outcome = await self._upload(work)
        except PlanRefusedError as error:
            outcome = DECLINED
            self._declined[work.job_id] = device.clock() + device.config.decline_s
            device.note("refused", str(error))
        except InterruptedRunError:
            outcome = KEPT
            device.note("stopped", "work stays on disk")
        except RaysysError as error:
            device.note("failed", str(error))
        finally:
            renewing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewing
        if outcome != KEPT:
            await self._release(work, outcome)
        return outcome

    def _check_offer(self, work: Work) -> None:
        for endpoint in (work.endpoint, work.upload):
            if not self.device.config.may_call(endpoint):
                reason = f"it sends us to {endpoint!r}, which is not among the allowed hosts"
                raise PlanRefusedError(work.gateway_address, reason, "Add the host to `hosts`")
        if self._declined.get(work.job_id, 0.0) > self.device.clock():
            raise PlanRefusedError(work.gateway_address, f"job {work.job_id} was refused before")
        if self._key(work) in self.device.state.done:
            raise PlanRefusedError(work.gateway_address, "this lease was used before (replayed?)")

    async def _plan(self, work: Work) -> None:
        if work.stage != "leased":
            return

        async def ask() -> Any:
            async with self.device.edge(work.endpoint) as client:
                return await client.plan(work, self.device.config.limits)

        planned = await self.device.patiently("plan", ask, work)
        check_work(
            planned.plan, len(self.samples.targets), self.device.config.limits, work.endpoint
        )
        work.plan, work.nonce = planned.text, planned.nonce.hex()
        work.model_bytes = planned.model_bytes
        work.model_sha256 = planned.model_sha256.hex()
        self._advance(work, "planned")

    async def _download(self, work: Work) -> None:
        if work.stage != "planned":
            return
        have = self.device.folder.read(MODEL)

        async def ask() -> bytes:
            nonlocal have
            async with self.device.edge(work.endpoint) as client:
                try:
                    return await client.download(work, have)
                except DownloadBrokenError as broken:
                    have = broken.content
                    raise broken.cause from broken

        content = await self.device.patiently("download", ask, work)
        plan = plan_from_json(work.plan, self.device.config.limits, work.endpoint)
        unpack_weights(content, plan.spec, work.endpoint)
        self.device.folder.write(MODEL, content)
        self._advance(work, "downloaded")

    async def _train(self, work: Work) -> None:
        if work.stage != "downloaded":
            return
        loop = asyncio.get_running_loop()
        plan = plan_from_json(work.plan, self.device.config.limits, work.endpoint)
        key = self.profiles.key(plan)
        own = self.profiles.own(key)
        known = own or await self.profiles.ask(work, key)
        trained = await loop.run_in_executor(
            self.trainer, self._train_here, work, plan, known, own is not None
        )
        content, profile, verified = trained
        self.device.folder.write(UPDATE, content)
        self._advance(work, "trained")
        if own is None:
            await self.profiles.tell(work, key, profile, verified)

    def _train_here(
        self, work: Work, plan: Plan, known: dict[str, Any] | None, trusted: bool
    ) -> tuple[bytes, dict[str, Any], bool | None]:
        """In the training thread: the whole local training under one engine.

        Returns:
            The packed update, the profile of its steps, and whether a shared profile held.
        """
        weights = unpack_weights(self.device.folder.read(MODEL), plan.spec, work.endpoint)
        with Swan(self.device.config.engine, shared=known, trusted=trusted) as engine:
            engine.pilot.loan.load(self.loan.state())
            try:
                result = train_plan(
                    plan,
                    weights,
                    self.samples,
                    engine=engine,
                    folder=self.device.folder.folder / CHECKPOINTS,
                    stopped=self.device.stopped,
                )
            finally:  # a training that was stopped has borrowed as well
                self.loan.load(engine.pilot.loan.state())
                self.device.state.loan = self.loan.state()
            moves, choice = engine.moves, engine.status()["choice"]
            # Exploration that the task was too short for is not shared as if it were finished.
            done = not engine.pilot.exploring
            profile = {**engine.pilot.profile.to_plain(), "device": self.profiles.kind}
            verified = engine.pilot.verified
        self.device.note(
            "trained", f"{result.facts['steps']:.0f} steps, {moves} moves, on {choice}"
        )
        profile = profile if done else {**profile, "choices": []}
        return pack_update(result.delta, result.facts), profile, verified

    async def _upload(self, work: Work) -> int:
        content = self.device.folder.read(UPDATE)

        async def ask() -> Any:
            async with self.device.edge(work.upload) as client:
                receipt = await client.upload(work, content)
                if not receipt.complete:
                    raise RemoteError(work.upload, "UNAVAILABLE: the upload is incomplete")
                return receipt

        receipt = await self.device.patiently("upload", ask, work)
        self.updates += 1
        self.device.note("uploaded", "accepted" if receipt.accepted else receipt.reason)
        return DONE if receipt.accepted else FAILED

    async def _release(self, work: Work, outcome: int) -> None:
        """Give the lease back and forget the work; the gateway may be gone by now."""
        self.device.state.done.append(self._key(work))
        self.device.state.work = None
        self.device.save()
        self.device.folder.clear_work()
        try:
            async with self.device.gateway(work.gateway_address) as client:
                await client.release(work.epoch, [work.counter], [outcome])
        except RemoteError as error:
            self.device.note("offline", f"lease not given back: {error}")

    async def _renew(self, work: Work) -> None:
        """Keep the lease alive while we work."""
        while True:
            left_s = work.expires_s - self.device.clock()
            await asyncio.sleep(max(RENEW_SHARE * left_s, 0.2))
            with contextlib.suppress(RemoteError):
                async with self.device.gateway(work.gateway_address) as client:
                    left, tickets = await client.prolong(work.epoch, [work.counter])
                alive = len(left) == 1 and float(left[0]) > 0
                work.expires_s = self.device.clock() + float(left[0]) if alive else 0.0
                if alive and tickets:
                    work.ticket = ticket_at(tickets, 0).hex()
                    self.device.save()  # a killed device must not come back with an old ticket

    def _advance(self, work: Work, stage: str) -> None:
        work.stage = stage
        self.device.save()

    @staticmethod
    def _key(work: Work) -> str:
        return f"{work.gateway}/{work.epoch}/{work.counter}"
