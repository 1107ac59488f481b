"""The simulator: hand-checked times, conservation, equal steps, policies, workloads."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysys.errors import ConfigError, DataError, InfeasibleError, StorageError
from raysys.machine import data_dir
from raysys.serving.andes.models import StepTime
from raysys.serving.andes.qoe import QoESpec, qoe_of_deliveries
from raysys.serving.andes.scheduler import AndesConfig
from raysys.serving.andes.simulator import engine as engine_module
from raysys.serving.andes.simulator import workload as workloads
from raysys.serving.andes.simulator.blocks import BlockPool, PrefixIndex
from raysys.serving.andes.simulator.engine import EngineConfig, SimEngine
from raysys.serving.andes.simulator.policies import BASELINES, Andes, policy_named
from raysys.serving.andes.simulator.result import simulate

SMALL = EngineConfig(kv_tokens=6000)


def fixed(arrivals, prompts, outputs, **extra):
    count = len(arrivals)
    return workloads.workload_of(
        "fixed",
        np.array(arrivals, dtype=np.float64),
        np.array(prompts, dtype=np.int64),
        np.array(outputs, dtype=np.int64),
        np.full(count, 0.25),
        **extra,
    )


def burst(seed=1, rate=0.6, duration=160.0):
    return workloads.cyclic_bursts(rate, duration, seed, cycle_s=duration)


def test_one_request_by_hand():
    result = simulate(fixed([2.0], [100], [3]), EngineConfig(), policy_named("fcfs"))
    first = 0.05 + 0.0005 + 100 / 8000
    step = 0.05 + 0.0005
    assert result.ttft_s[0] == pytest.approx(first)
    expected = qoe_of_deliveries([[first, first + step, first + 2 * step]], [QoESpec(1.0, 4.0)])
    assert result.qoe[0] == pytest.approx(expected[0])
    assert result.throughput == pytest.approx(3 / (first + 2 * step))


def test_long_prompts_are_chunked_by_the_budget():
    result = simulate(fixed([0.0], [5000], [1]), EngineConfig(), policy_named("fcfs"))
    assert result.stats.steps == 3
    assert result.ttft_s[0] == pytest.approx(3 * 0.0505 + 5000 / 8000)
    whole = simulate(fixed([0.0], [5000], [1]), EngineConfig(chunked=False), policy_named("fcfs"))
    assert whole.stats.steps == 1


def test_prefill_steps_stall_decodes_without_chunking():
    load = fixed([0.0, 0.3], [10, 2000], [40, 1])
    mixed = simulate(load, EngineConfig(), policy_named("fcfs"))
    apart = simulate(load, EngineConfig(chunked=False), policy_named("fcfs"))
    assert apart.stats.steps == mixed.stats.steps + 1


@pytest.mark.parametrize("name", ["andes", *BASELINES])
def test_every_policy_serves_everything_and_frees_every_block(name):
    load = burst()
    engine = SimEngine(load, SMALL, policy_named(name))
    engine.run()
    assert engine.final[0].tolist() == load.output_tokens.tolist()
    assert engine.pool.free == engine.pool.blocks
    assert len(engine.table) == 0
    assert (engine.first_s >= load.arrival_s).all()


def test_policy_names():
    assert policy_named("round_robin").name == "round_robin"
    with pytest.raises(ConfigError, match="policy"):
        policy_named("lottery")


@pytest.mark.parametrize("name", ["fcfs", "shortest_job"])
def test_advancing_steps_together_changes_nothing(name, monkeypatch):
    load = burst(seed=4, duration=120.0)
    together = simulate(load, SMALL, policy_named(name))
    monkeypatch.setattr(engine_module, "MAX_JUMP", 1)
    monkeypatch.setattr("raysys.serving.andes.simulator.policies.MAX_JUMP", 1)
    single = simulate(load, SMALL, policy_named(name))
    assert together.qoe == pytest.approx(single.qoe, abs=1e-9)
    assert together.ttft_s == pytest.approx(single.ttft_s, abs=1e-9)
    assert together.stats.steps == single.stats.steps


def test_below_the_trigger_andes_is_fcfs():
    load = workloads.poisson(0.3, 200.0, 5)
    fcfs = simulate(load, EngineConfig(), policy_named("fcfs"))
    andes = simulate(load, EngineConfig(), policy_named("andes"))
    assert andes.qoe.tolist() == fcfs.qoe.tolist()
    assert andes.ttft_s.tolist() == fcfs.ttft_s.tolist()
    assert andes.stats.pauses == 0


def test_andes_beats_fcfs_in_a_burst_without_losing_throughput():
    load = burst(seed=2, rate=0.8)
    fcfs = simulate(load, SMALL, policy_named("fcfs"))
    andes = simulate(load, SMALL, policy_named("andes"))
    assert andes.mean_qoe >= fcfs.mean_qoe + 0.1
    assert andes.throughput >= 0.9 * fcfs.throughput


def test_runs_are_deterministic():
    rows = [simulate(burst(3), SMALL, policy_named("andes")).row() for _ in range(2)]
    assert rows[0] == rows[1]


def test_latency_model_is_learnt_from_a_wrong_seed():
    policy = Andes(AndesConfig(step_time=StepTime(base_s=0.5, per_sequence_s=0.01)))
    simulate(burst(), SMALL, policy)
    learnt = policy.scheduler.latency.step_time
    assert learnt.predict(20, 0, 3000) == pytest.approx(0.06, rel=0.05)
    assert learnt.per_prefill_token_s == pytest.approx(1 / 8000, rel=0.2)


def test_a_short_pause_is_cheap_while_its_blocks_survive():
    engine = SimEngine(fixed([0.0], [320], [50]), EngineConfig(), policy_named("fcfs"))
    engine._arrive()
    engine._step()
    slot = engine.decoding[0]
    context = float(engine.table.context_tokens[slot])
    engine.pause(slot)
    assert engine.missing(slot) == context - 16 * (int(context) // 16)
    engine.pool.take(engine.pool.free)
    assert engine.missing(slot) == context
    assert engine.table.preemptions[slot] == 1


def test_cheap_restore_costs_its_share():
    config = EngineConfig(restore_fraction=0.1, prefix_cache=False)
    engine = SimEngine(fixed([0.0], [1000], [50]), config, policy_named("fcfs"))
    engine._arrive()
    engine._step()
    slot = engine.decoding[0]
    engine.pause(slot)
    assert engine.missing(slot) == 101.0


def test_known_prompt_prefixes_are_not_computed_again():
    ids = ((1, 2), (1, 2), (9,))
    load = fixed([0.0, 50.0, 100.0], [1024, 1100, 600], [2, 2, 2], prefix_ids=ids)
    config = EngineConfig(prefix_room=10)
    result = simulate(load, config, policy_named("fcfs"))
    assert result.stats.prefill_tokens == 1024 + (1100 - 1024) + 600


def test_impossible_requests_are_refused():
    with pytest.raises(InfeasibleError, match="7050 tokens"):
        simulate(fixed([0.0], [7000], [50]), SMALL, policy_named("fcfs"))


def test_no_requests_is_a_result_too():
    result = simulate(fixed([], [], []), SMALL, policy_named("andes"))
    assert result.mean_qoe == 1.0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_block_pool_never_keeps_more_than_is_free(moves):
    pool = BlockPool(50, 16, keep_freed=True)
    held: list[tuple[int, int]] = []
    for number, (take, size) in enumerate(moves):
        if take and size <= pool.free:
            pool.take(size)
            held.append((number, size))
        elif not take and held:
            request, count = held.pop(0)
            pool.give(count, request, count)
        kept = sum(pool.cached_tokens(r) for r in range(len(moves))) // 16
        assert kept <= pool.free
        assert pool.free + sum(s for _, s in held) == 50


def test_prefix_index_forgets_the_oldest():
    index = PrefixIndex(2)
    assert index.hits((1, 2)) == 0
    assert index.hits((1, 2, 3)) == 2
    assert index.hits((1,)) == 0


def test_workload_rates_and_targets():
    load = workloads.cyclic_bursts(2.0, 4000.0, 1, cycle_s=1000.0)
    assert load.size == pytest.approx(8000, rel=0.05)
    inside = (load.arrival_s % 1000.0) < 350.0
    assert inside.mean() == pytest.approx(0.7, abs=0.02)
    assert load.ttft_s.min() == 1.0
    assert load.tau_s.mean() == pytest.approx(0.2237, abs=0.002)
    bursts = workloads.random_bursts(1.0, 20_000.0, 1)
    assert bursts.size == pytest.approx(20_000, rel=0.2)
    slow = load.scaled(2.0)
    assert slow.tau_s[0] == 2 * load.tau_s[0]
    assert load.first(100.0).arrival_s.max() <= 100.0
    assert workloads.azure_like(5.0, 2000.0, 1).prompt_tokens.mean() == pytest.approx(
        1155, rel=0.05
    )
    with pytest.raises(ConfigError, match="intensity"):
        workloads.cyclic_bursts(1.0, 100.0, 1, intensity=4.0)
    with pytest.raises(ConfigError, match="rate_per_s"):
        workloads.poisson(0.0, 100.0, 1)


def test_azure_format(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n"
    )
    load = workloads.load_azure(path)
    assert load.arrival_s == pytest.approx([0.0, 4.314579])
    assert load.prompt_tokens.tolist() == [374, 396]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="Azure"):
        workloads.load_azure(path)
    with pytest.raises(StorageError):
        workloads.load_azure(tmp_path / "absent.csv")


def test_mooncake_format(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 1500, "input_length": 700, "output_length": 0, "hash_ids": [1, 3]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    load = workloads.load_mooncake(path)
    assert load.arrival_s.tolist() == [0.0, 1.5]
    assert load.output_tokens.tolist() == [5, 1]
    assert load.prefix_ids == ((1, 2), (1, 3))
    assert load.thinned(1.0, 0).prefix_ids == load.prefix_ids
    path.write_text("{not json")
    with pytest.raises(DataError, match="Mooncake"):
        workloads.load_mooncake(path)
    path.write_text("")
    with pytest.raises(DataError, match="no requests"):
        workloads.load_mooncake(path)


def test_the_azure_trace_itself():
    folder = data_dir()
    path = folder / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv" if folder else None
    if path is None or not path.is_file():
        pytest.skip("the Azure conversation trace is not on this machine")
    load = workloads.load_azure(path)
    assert load.size == 19_366
    assert load.prompt_tokens.mean() == pytest.approx(1155, abs=1)
