"""Run as a program by ``test_andes_vllm_engine``: one small in-process engine, facts as JSON.

The model has random weights and two layers, so that a step takes milliseconds; the engine, its
scheduler and its KV cache are the real ones.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True, "initializer_range": 0.5,
}  # fmt: skip
BLOCKS = 17  # one reserved: room for 512 tokens
# Pauses at the slightest gain: what is tested is that they do no harm to the text.
PLANNER = {
    "gate": False, "refiner": False, "horizon_s": 0.2, "plan_every": 2, "max_preemptions": 5,
    "running_bonus": 1.0, "guard_s": 0.0, "max_tds": 1000.0,
}  # fmt: skip


def make_engine(folder: Path) -> Any:
    from vllm import LLM

    from actors.andes.engine_settings import AndesEngineConfig, engine_arguments
    from raysys.config import config_from_dict

    values = {
        "switchable": True,
        "scheduler": {"planner": PLANNER},
        "step_log": str(folder.parent / "steps.jsonl"),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="float32",
        enforce_eager=True, max_model_len=256, max_num_seqs=16, block_size=32, seed=0,
        num_gpu_blocks_override=BLOCKS, kv_cache_memory_bytes=64 * 2**20,
        **engine_arguments(config_from_dict(AndesEngineConfig, values)),
    )  # fmt: skip


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def generate(llm: Any, policy: str, count: int = 8) -> list[list[int]]:
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": [3 + (7 * i + 5 * j) % 500 for j in range(24 + 4 * i)]}
        for i in range(count)
    ]
    params = [
        SamplingParams(
            temperature=0.0, max_tokens=56, ignore_eos=True, detokenize=False,
            extra_args={"qoe_ttft_s": 0.0, "qoe_tds": 1000.0 if i % 2 else 20.0,
                        "andes_policy": policy, "qoe_tenant": "odd" if i % 2 else "even"},
        )
        for i in range(count)
    ]  # fmt: skip
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.reset_prefix_cache()
    return [list(output.outputs[0].token_ids) for output in outputs]


def compare_policies(llm: Any) -> dict[str, Any]:
    scheduler = scheduler_of(llm)
    stock = generate(llm, "fcfs")
    before = scheduler.brain.counters.pauses
    ours = generate(llm, "andes")
    return {
        "equal": stock == ours,
        "distinct": len({tuple(tokens) for tokens in stock}),
        "pauses_fcfs": before,
        "pauses_andes": scheduler.brain.counters.pauses - before,
        "faults": scheduler.brain.counters.faults,
        "left_slots": len(scheduler.slots),
        "free_after": scheduler.kv_free(),
        "capacity": scheduler.kv_capacity(),
        "steps": scheduler.brain.counters.steps,
        "status": scheduler.status(time.monotonic()),
    }


def abort_midway(llm: Any) -> dict[str, Any]:
    """Clients that leave while running, waiting and paused must give everything back."""
    from vllm import SamplingParams

    scheduler = scheduler_of(llm)
    engine = llm.llm_engine
    ids = []
    for index in range(8):
        params = SamplingParams(
            temperature=0.0, max_tokens=200, ignore_eos=True, detokenize=False,
            extra_args={"qoe_ttft_s": 0.0, "qoe_tds": 500.0, "andes_policy": "andes"},
        )  # fmt: skip
        prompt = {"prompt_token_ids": [5 + index + j for j in range(40)]}
        engine.add_request(f"leaver-{index}", prompt, params)
        ids.append(f"leaver-{index}")
    states: set[str] = set()
    for _ in range(400):  # until somebody is paused: when depends on how long steps take
        engine.step()
        states = {str(request.status.name) for request in scheduler.requests.values()}
        if {"RUNNING", "PREEMPTED"} <= states:
            break
    engine.abort_request(ids)
    engine.abort_request(ids)  # twice must not matter
    for _ in range(3):
        engine.step()
    llm.reset_prefix_cache()
    return {
        "states": sorted(states),
        "left": len(scheduler.requests),
        "left_slots": len(scheduler.slots),
        "free": scheduler.kv_free(),
        "capacity": scheduler.kv_capacity(),
    }


def long_queue(llm: Any, count: int = 10_000) -> dict[str, Any]:
    """Ten thousand requests wait: steps go on, plans stay short, and nothing is left behind."""
    from vllm import SamplingParams

    from raysys.serving.andes.planner import Planner

    scheduler = scheduler_of(llm)
    engine = llm.llm_engine
    eager = scheduler.brain.planner
    scheduler.brain.planner = Planner()  # as it is served; the eager one would pause at every plan
    scheduler.plan_ms.clear()
    params = SamplingParams(
        temperature=0.0, max_tokens=4, ignore_eos=True, detokenize=False,
        extra_args={"qoe_tds": 5.0, "andes_policy": "andes"},
    )  # fmt: skip
    ids = [f"queued-{index}" for index in range(count)]
    for index, name in enumerate(ids):
        engine.add_request(name, {"prompt_token_ids": [3 + index % 500, 7, 9]}, params)
    finished = 0
    for _ in range(60):
        finished += sum(output.finished for output in engine.step())
    waiting = len(scheduler.waiting)
    engine.abort_request(ids)
    for _ in range(3):
        engine.step()
    scheduler.brain.planner = eager
    llm.reset_prefix_cache()
    plans = sorted(scheduler.plan_ms)
    return {
        "waiting": waiting,
        "finished": finished,
        "plans": len(plans),
        "plan_ms": plans[len(plans) // 2],
        "faults": scheduler.brain.counters.faults,
        "left_slots": len(scheduler.slots),
        "free": scheduler.kv_free(),
        "capacity": scheduler.kv_capacity(),
    }


def bad_targets(llm: Any) -> dict[str, Any]:
    from vllm import SamplingParams

    scheduler = scheduler_of(llm)
    before = scheduler.bad_targets
    params = SamplingParams(
        max_tokens=2, detokenize=False, ignore_eos=True, extra_args={"qoe_tds": -1.0}
    )
    [output] = llm.generate([{"prompt_token_ids": [4, 5, 6]}], [params], use_tqdm=False)
    return {
        "counted": scheduler.bad_targets - before,
        "tokens": len(output.outputs[0].token_ids),
    }


def failing_plan(llm: Any) -> dict[str, Any]:
    """A planner with a bug must not take the engine down."""
    scheduler = scheduler_of(llm)
    planner = scheduler.brain.planner
    faults = scheduler.brain.counters.faults

    class Broken:
        config = planner.config

        def plan(self, *args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError("a bug")

    scheduler.brain.planner = Broken()
    tokens = generate(llm, "andes", count=4)
    scheduler.brain.planner = planner
    return {
        "faults": scheduler.brain.counters.faults - faults,
        "lengths": [len(answer) for answer in tokens],
    }


def guard() -> dict[str, Any]:
    """What happens on another vLLM."""
    import vllm

    from actors.andes import vllm_scheduler
    from raysys.errors import CapabilityError

    messages = {}

    def attempt(name: str, force: bool = False) -> None:
        try:
            vllm_scheduler.check_engine(force)
            messages[name] = "accepted"
        except CapabilityError as error:
            messages[name] = str(error)

    attempt("as tested")
    version, vllm.__version__ = vllm.__version__, "0.32.0"
    attempt("other version")
    attempt("other version, forced", force=True)
    vllm.__version__ = version
    original = vllm_scheduler.Scheduler._preempt_request
    vllm_scheduler.Scheduler._preempt_request = lambda self, request, timestamp: None
    attempt("changed method")
    vllm_scheduler.Scheduler._preempt_request = original
    return messages


def main() -> None:
    folder, result = Path(sys.argv[1]), Path(sys.argv[2])
    llm = make_engine(folder)
    facts = {
        "policies": compare_policies(llm),
        "aborts": abort_midway(llm),
        "long_queue": long_queue(llm),
        "bad_targets": bad_targets(llm),
        "failing_plan": failing_plan(llm),
        "guard": guard(),
    }
    result.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
