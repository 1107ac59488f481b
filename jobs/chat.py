"""Chat in the terminal with a served model; text appears at reading pace.

`raysys chat` talks to `raysys serve` on this machine; `--set url=http://HOST:8000/v1` to another.
An empty line ends it. `--set prompt='Why is the sky blue?'` asks one question and ends.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.serving import packaged_model
from actors.serving.client import NO_KEY, describe_failure, qoe_fields
from actors.serving.endpoint import quiet_logs
from jobs.launcher import Job, JobContext, Summary, main
from raysys.config import check, check_range
from raysys.errors import CapabilityError, RemoteError, StorageError
from raysys.serving.andes.paced_chat import AsyncPacedChat, pieces_of
from raysys.serving.andes.pacer import Pacer, PacerReport
from raysys.serving.andes.qoe import QoESpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatConfig:
    """A conversation.

    Args:
        url: address of an OpenAI-compatible endpoint.
        model: name of the model there.
        ttft_s, tds: when the first token is expected, and how fast you read.
        max_tokens: length limit of an answer.
        temperature: 0 always says the most likely thing.
        paced: show text at reading pace; false shows it as it arrives.
        prompt: ask this and end; null asks on the terminal.
        timeout_s: how long to wait for the endpoint.
        key_file: file that holds your API key, where the endpoint wants one. (A key given here
            itself would be noted in the run's manifest.)
    """

    url: str = "http://127.0.0.1:8000/v1"
    model: str = packaged_model.NAME
    ttft_s: float = 1.0
    tds: float = 4.8
    max_tokens: int = 256
    temperature: float = 0.0
    paced: bool = True
    prompt: str | None = None
    timeout_s: float = 120.0
    key_file: str | None = None

    def __post_init__(self) -> None:
        web = self.url.startswith(("http://", "https://"))
        check(self, "url", web, "an address that starts with http:// or https://")
        check_range(self, "max_tokens", 1)
        check_range(self, "temperature", 0.0, 2.0)
        check_range(self, "timeout_s", 0.0, low_open=True)
        QoESpec(ttft_s=self.ttft_s, tds=self.tds)

    @property
    def spec(self) -> QoESpec:
        return QoESpec(ttft_s=self.ttft_s, tds=self.tds)


def run(config: ChatConfig, context: JobContext) -> Summary:
    reports: list[PacerReport] = []
    history: list[dict[str, str]] = []
    for prompt in prompts(config):
        history.append({"role": "user", "content": prompt})
        text, report = asyncio.run(answer(config, history))
        history.append({"role": "assistant", "content": text})
        reports.append(report)
        context.metrics.record("qoe", report.qoe, step=len(reports))
        context.console.print(describe(report), style="dim")
    return Summary(lines=[f"{len(reports)} answers"])


def prompts(config: ChatConfig) -> Iterator[str]:
    """The configured question, or lines of standard input until an empty one."""
    if config.prompt is not None:
        yield config.prompt
        return
    while True:
        if sys.stdin.isatty():
            print("you: ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


async def answer(config: ChatConfig, history: Sequence[dict[str, str]]) -> tuple[str, PacerReport]:
    """Ask, print the answer as it is read, and return it with what the reader experienced.

    Raises:
        CapabilityError: the OpenAI client is not installed.
        RemoteError: the endpoint cannot be reached, refuses, or fails in mid-stream.
    """
    try:
        import openai
    except ImportError as error:
        raise CapabilityError("the OpenAI client", str(error), "Run `make setup`") from error
    quiet_logs()
    submitted = time.perf_counter()
    shown: list[str] = []
    try:
        async with openai.AsyncOpenAI(
            base_url=config.url,
            api_key=read_key(config.key_file),
            max_retries=0,
            timeout=config.timeout_s,
        ) as client:
            stream = await open_stream(client, config, history)
            report = await print_answer(stream, config, submitted, shown)
    except openai.OpenAIError as problem:
        remedy = "Is `raysys serve` running there? Or change it with --set url=..."
        raise RemoteError(f"endpoint {config.url}", describe_failure(problem), remedy) from None
    finally:
        print(flush=True)
    return "".join(shown), report


async def print_answer(
    stream: Any, config: ChatConfig, submitted_s: float, shown: list[str]
) -> PacerReport:
    """Print the pieces at reading pace, or as they arrive."""
    clock = time.perf_counter
    if config.paced:
        paced = AsyncPacedChat(stream, config.spec, clock, submitted_s=submitted_s)
        async for piece in paced:
            show(piece, shown)
        return paced.report()
    pacer: Pacer[str] = Pacer(config.spec, submitted_s, flush="now")
    async for chunk in stream:
        pacer.push(pieces := pieces_of(chunk), clock())
        for piece in pieces:
            show(piece, shown)
    pacer.end(clock())
    return pacer.report()


def read_key(path: str | None) -> str:
    """The API key from its file.

    Raises:
        StorageError: the file cannot be read, or is empty.
    """
    if path is None:
        return NO_KEY
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(path, str(error), "Give a readable file to key_file") from error
    if not key:
        raise StorageError(path, "no key in it", "Write the key into the file")
    return key


async def open_stream(client: Any, config: ChatConfig, history: Sequence[dict[str, str]]) -> Any:
    """Send the conversation."""
    return await client.chat.completions.create(
        model=config.model,
        messages=list(history),
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        stream=True,
        extra_body={"vllm_xargs": qoe_fields(config.spec)},
    )


def show(piece: str, shown: list[str]) -> None:
    """Print one piece of the answer at once."""
    shown.append(piece)
    print(piece, end="", flush=True)


def describe(report: PacerReport) -> str:
    """One line on how the answer came."""
    if not report.delivered_s:
        return "(no text)"
    stalls = f", {report.stalls} stalls of {report.stall_s:.1f} s" if report.stalls else ""
    first, last = report.delivered_s[0], report.delivered_s[-1]
    return (
        f"({len(report.delivered_s)} tokens, first after {first:.2f} s, all after {last:.2f} s"
        f"{stalls}, QoE {report.qoe:.2f})"
    )


JOB = Job(name="chat", config=ChatConfig, run=run)

if __name__ == "__main__":
    raise SystemExit(main(JOB))
