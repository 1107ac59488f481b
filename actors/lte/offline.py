"""Greedy generation by vLLM without a server, timed; a process of its own.

    python -m actors.lte.offline REQUEST.json ANSWER.json

The engine core runs in this process, so that the operator's counters can be read afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysys import machine, scratch
from raysys.config import config_from_dict, config_to_dict
from raysys.errors import RemoteError

START_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OfflineRequest:
    """What to generate.

    Args:
        folder: model folder.
        prompts: token ids, one list per prompt; all run in one batch.
        tokens: new tokens per prompt, never ended early.
        repeats: timed repeats of the batch, after one that is not timed.
        dtype: float32 or bfloat16.
        max_model_len: longest prompt and answer.
    """

    folder: str
    prompts: list[list[int]]
    tokens: int = 32
    repeats: int = 3
    dtype: str = "float32"
    max_model_len: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OfflineAnswer:
    """What came out.

    Args:
        tokens: new token ids of every prompt.
        seconds: of each timed repeat, prefill included; CPU time of the whole process, because
            others may use the machine too.
        first_s: of generating one token per prompt, the same number of repeats.
        wall_s: of each timed repeat, by the clock.
        density: share of experts that were on in the timed repeats; 0 for a dense model.
        paths: tokens by path of the operator.
    """

    tokens: list[list[int]]
    seconds: list[float]
    first_s: list[float]
    wall_s: list[float]
    density: float
    paths: dict[str, int]

    @property
    def tokens_per_s(self) -> list[float]:
        """Decoded tokens per second of CPU time in each repeat, without the prefill."""
        count = sum(len(tokens) - 1 for tokens in self.tokens)
        return [count / max(1e-9, s - f) for s, f in zip(self.seconds, self.first_s)]


def generate(request: OfflineRequest) -> OfflineAnswer:
    """Run a request in a new process.

    Raises:
        RemoteError: vLLM failed; the text has the last line of its log.
    """
    with scratch.folder("lte") as folder:
        question, answer = folder / "request.json", folder / "answer.json"
        question.write_text(json.dumps(config_to_dict(request)))
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        command = [sys.executable, "-m", "actors.lte.offline", str(question), str(answer)]
        done = subprocess.run(
            command, cwd=machine.app_root(), env=environment, capture_output=True, text=True,
            check=False, timeout=START_TIMEOUT_S,
        )  # fmt: skip
        if done.returncode != 0 or not answer.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1] if lines else f"exit code {done.returncode}"
            raise RemoteError("vLLM", reason, "Run the command by hand to see its log")
        return config_from_dict(OfflineAnswer, json.loads(answer.read_text()))


def serve_one(request: OfflineRequest) -> OfflineAnswer:
    """The work, inside the new process."""
    from vllm import LLM, SamplingParams

    from actors.serving.application import engine_options
    from actors.serving.config import EngineConfig
    from raysys.ops.lte_ops import PATHS
    from raysys.serving.model_files import read_facts

    facts = read_facts(Path(request.folder) / "config.json", "Give a model folder")
    config = EngineConfig(
        dtype=request.dtype,  # type: ignore[arg-type]
        max_model_len=request.max_model_len,
        max_num_seqs=max(8, len(request.prompts)),
        prefix_caching=False,
    )
    options = engine_options(config, facts)
    options.pop("stream_interval", None)
    engine = LLM(model=request.folder, skip_tokenizer_init=True, seed=0, **options)
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in request.prompts]

    def run(tokens: int) -> tuple[list[list[int]], float, float]:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        wall, used = time.perf_counter(), time.process_time()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        took = time.process_time() - used, time.perf_counter() - wall
        return [list(output.outputs[0].token_ids) for output in outputs], *took

    run(2)
    PATHS.active = PATHS.possible = 0
    found: list[list[int]] = []
    seconds, first_s, wall_s = [], [], []
    for _ in range(request.repeats):
        first_s.append(run(1)[1])
        found, took, wall = run(request.tokens)
        seconds.append(took)
        wall_s.append(wall)
    return OfflineAnswer(
        tokens=found, seconds=seconds, first_s=first_s, wall_s=wall_s, density=PATHS.density,
        paths=PATHS.tokens,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Read a request, write the answer."""
    request = config_from_dict(OfflineRequest, json.loads(Path(arguments[0]).read_text()))
    answer = serve_one(request)
    Path(arguments[1]).write_text(json.dumps(config_to_dict(answer)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
