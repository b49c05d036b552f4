"""Routed experts out of a cache: the same bits at any size, errors that lose nothing, and what is counted."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_device import FakeMover, watch

from qwenrun import Engine
from qwenrun.engine.arena import Arena
from qwenrun.engine.expert_cache import ExpertCache
from qwenrun.engine.expert_store import ExpertStore
from qwenrun.engine.experts import Experts, measure_assist
from qwenrun.engine.routed import Assist
from qwenrun.errors import DoesNotFitError, ModelError
from qwenrun.measure.synth import synth_config, synthesize
from qwenrun.plan.buffers import Run
from qwenrun.plan.planner import Budget, least_budget, place, weigh, whole_budget
from qwenrun.quant.errors import PackError
from qwenrun.quant.packfile.reader import PackReader
from qwenrun.quant.recipe import Recipe

SMALL = {"hidden_size": 128, "vocab_size": 300, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
SMALL |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_attention_heads": 4, "num_experts_per_tok": 4}
EXPERTS, LAYERS, TOP_K = 24, 4, 4


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = synth_config("35b", layers=LAYERS, experts=EXPERTS, changes=SMALL)
    return synthesize(tmp_path_factory.mktemp("synth") / "p", config, Recipe.load("int4")).path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sizes of records: the first layer's experts in int8."""
    rules = [{"match": "*layers.0.mlp.experts.*", "format": "int8-g32"}, {"match": "*.experts.*", "format": "nvfp4"}]
    recipe = Recipe.from_dict({"name": "mixed", "rules": rules}, "test")
    config = synth_config("35b", layers=LAYERS, experts=EXPERTS, changes=SMALL)
    return synthesize(tmp_path_factory.mktemp("synth") / "m", config, recipe).path


def budgets(path: Path, **run: Any) -> tuple[int, int]:
    """The least and the largest sensible budget for a context of 64."""
    with PackReader.open(path) as reader:
        config = _config(reader)
        weights = weigh(config, [(e.info, e.assignment) for e in reader.tensors.values()], _run(**run))
    return least_budget(config, weights, _run(**run)), whole_budget(config, weights, _run(**run))


def _run(**run: Any) -> Run:
    return Run(64, mtp=False, vision=False, **run)


def _config(reader: PackReader) -> Any:
    from qwenrun.model.config import ModelConfig

    return ModelConfig.from_hf(reader.config)


def logits_of(path: Path, ram: int | None, **options: Any) -> tuple[torch.Tensor, Any]:
    """Logits of a prompt in uneven chunks and some steps after it, and the counts."""
    rng = random.Random(5)
    with Engine.open(path, ctx=64, ram=ram, **options) as engine:
        session = engine.session()
        out = [session.prefill([rng.randrange(300) for _ in range(count)]) for count in (1, 30, 2)]
        out += [session.step(rng.randrange(300)) for _ in range(12)]
        return torch.stack(out), engine.expert_stats()


@pytest.mark.parametrize("which", ["pack", "mixed"])
@pytest.mark.parametrize("backend", ["", "ref"])
def test_the_same_bits_at_any_budget(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, which: str, backend: str
) -> None:
    monkeypatch.setenv("QWENRUN_BACKEND", backend)
    path = request.getfixturevalue(which)
    least, most = budgets(path)
    whole, counts = logits_of(path, None)
    assert counts.disk_bytes > 0
    assert torch.isfinite(whole).all()
    rates = []
    for share in (0.0, 0.3, 0.7, 1.0):
        got, use = logits_of(path, least + int(share * (most - least)))
        assert torch.equal(got, whole), f"share {share}"
        assert use.lookups == counts.lookups
        assert 0 <= use.ahead_used <= use.ahead
        rates.append((use.hits + use.ahead_used) / use.lookups)
        assert use.disk_bytes >= counts.disk_bytes
    assert rates[0] < rates[-1]


def test_with_and_without_reading_ahead_and_the_page_cache(pack: Path) -> None:
    least, most = budgets(pack)
    ram = (least + most) // 2
    plain, without = logits_of(pack, ram, prefetch=False, direct=False)
    ahead, with_it = logits_of(pack, ram, prefetch=True, direct=True)
    assert torch.equal(plain, ahead)
    assert (without.ahead, without.ahead_used) == (0, 0)
    assert with_it.ahead > 0


def test_planned_bytes_are_allocated_bytes(pack: Path) -> None:
    least, most = budgets(pack)
    for ram in (least, (least + most) // 2, most):
        with Engine.open(pack, ctx=64, ram=ram) as engine:
            parts = engine.plan.parts()
            assert parts["total"] <= ram
            assert engine.allocated_bytes == parts["total"] - parts["workspace"] - parts["runtime"]
    with pytest.raises(DoesNotFitError):
        Engine.open(pack, ctx=64, ram=least - 1)


def test_a_prompt_reads_each_expert_at_most_once_a_chunk(pack: Path) -> None:
    """Far more tokens than slots: expert by expert, not token by token."""
    with Engine.open(pack, ctx=64, ram=budgets(pack)[0]) as engine:
        session = engine.session()
        before = engine.expert_stats()
        session.prefill([random.Random(1).randrange(300) for _ in range(60)])
        use = engine.expert_stats() - before
        record = engine.plan.pools[0].record
        assert use.disk_bytes <= use.lookups * record <= LAYERS * EXPERTS * record


# -- what can go wrong -----------------------------------------------------------------------------------------


@pytest.fixture
def copy(pack: Path, tmp_path: Path) -> Path:
    """A pack that may be damaged."""
    out = tmp_path / "copy"
    out.mkdir()
    for path in pack.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def test_a_flipped_bit_is_found_when_its_expert_is_read(copy: Path) -> None:
    with Engine.open(copy, ctx=64, ram=budgets(copy)[0]) as engine:
        session = engine.session()
        session.prefill([1, 2, 3])
        expected = session.step(4)
        session.rollback(1)
        record = engine.plan.pools[0].record
        everywhere = [(path, n * record + 100) for path in copy.glob("experts-*.bin") for n in range(EXPERTS)]
        for path, at in everywhere:
            damage(path, at)
        with pytest.raises(ModelError, match=r"experts-\d\d\.bin: expert \d+ is not what was written") as caught:
            session.prefill(list(range(10, 50)))
        assert "qwenrun verify" in caught.value.hint
        # The session is where it was, and goes on when the file is whole again.
        assert session.tokens == [1, 2, 3]
        for path, at in everywhere:
            damage(path, at)
        assert float((session.step(4) - expected).norm() / expected.norm()) < 0.05


def test_a_file_that_becomes_shorter(copy: Path) -> None:
    with Engine.open(copy, ctx=64, ram=budgets(copy)[0]) as engine:
        session = engine.session()
        for path in copy.glob("experts-*.bin"):
            os.truncate(path, engine.plan.pools[0].record // 2 // 4096 * 4096)
        with pytest.raises(ModelError, match=r"can't be read any more: it ends inside expert \d+"):
            session.prefill(list(range(30)))
        assert session.tokens == []


def test_a_read_error(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.open(copy, ctx=64, ram=budgets(copy)[0]) as engine:
        session = engine.session()
        session.prefill([1, 2])
        expected = session.step(3)
        session.rollback(1)
        real = os.preadv

        def broken(fd: int, buffers: Any, offset: int) -> int:
            if len(buffers[0]) < 4096:  # a row of the embedding
                return real(fd, buffers, offset)
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("qwenrun.engine.expert_store.os.preadv", broken)
        with pytest.raises(ModelError, match=r"experts-\d\d\.bin can't be read any more: Input/output error"):
            session.prefill(list(range(60)))
        monkeypatch.setattr("qwenrun.engine.expert_store.os.preadv", real)
        assert session.tokens == [1, 2]
        assert float((session.step(3) - expected).norm() / expected.norm()) < 0.05


def test_the_embedding_on_a_disk_that_goes(copy: Path) -> None:
    with Engine.open(copy, ctx=64, ram=budgets(copy)[0]) as engine:
        assert engine.plan.embedding_on_disk
        os.truncate(copy / "dense.safetensors", 5000)
        with pytest.raises(PackError, match=r"ends inside .*embed_tokens"):
            engine.session().prefill([299])


def test_an_interruption_leaves_no_pin(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while an expert is awaited: later answers are as if nothing had been, and every slot can be had."""
    with Engine.open(pack, ctx=64, ram=budgets(pack, sequences=2)[0], prefetch=False, sequences=2) as engine:
        expected = engine.session().prefill(list(range(40)))
        session = engine.session()
        real, calls = ExpertCache.wait, iter(range(10**6))

        def interrupted(self: ExpertCache, keys: Any) -> list[int]:
            if next(calls) == 7:
                raise KeyboardInterrupt
            return real(self, keys)

        monkeypatch.setattr(ExpertCache, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.prefill(list(range(40)))
        monkeypatch.setattr(ExpertCache, "wait", real)
        assert torch.equal(session.prefill(list(range(40))), expected)
        caches = {id(c): c for c in engine._experts._caches.values()}.values()  # type: ignore[union-attr]
        assert all(cache.table.claimable == cache.table.slots for cache in caches)


# -- a device with memory of its own ---------------------------------------------------------------------------


def on_a_device(path: Path, device_share: float, host_share: float, mover: FakeMover, assist: bool) -> Iterator[Any]:
    """The routed experts of all layers with slots in both tiers."""
    reader = PackReader.open(path)
    config = _config(reader)
    weights = weigh(config, [(e.info, e.assignment) for e in reader.tensors.values()], _run())
    least, most = (f(config, weights, _run(), True) for f in (least_budget, whole_budget))
    small = place(config, weights, _run(), Budget(least, 10**12, gpu=True))
    all_on_host = small.total("host")
    fixed = small.parts("host")["runtime"]
    window = sum(8 * pool.record for pool in small.pools)
    host = fixed + window + int(host_share * (all_on_host - fixed - window))
    plan = place(config, weights, _run(), Budget(least + int(device_share * (most - least)), host, gpu=True))
    arena = Arena.from_plan(plan, "cpu")
    assert set(arena.host) == {f"slots.{n}" for n in range(len(plan.pools))}
    experts = Experts(reader, plan, arena, mover=mover)
    if not assist:
        experts._assists = dict.fromkeys(experts._assists)
    for cache in {id(c): c for c in experts._caches.values()}.values():
        watch(cache, mover)
    yield plan
    yield {prefix: experts.of(prefix) for prefix in reader.expert_prefixes}
    yield experts
    experts.close()
    reader.close()


@pytest.mark.parametrize("which", ["pack", "mixed"])
@pytest.mark.parametrize(("device", "host"), [(0.0, 0.0), (0.0, 0.5), (0.4, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("assist", [False, True])
def test_two_tiers_give_the_same_bits(
    request: pytest.FixtureRequest, which: str, device: float, host: float, assist: bool
) -> None:
    path = request.getfixturevalue(which)
    mover = FakeMover()
    stages = on_a_device(path, device, host, mover, assist)
    plan, layers, experts = next(stages), next(stages), next(stages)
    generator = torch.Generator().manual_seed(1)
    with PackReader.open(path) as reader:
        for number in range(30):
            for prefix, routed in layers.items():
                tokens = (1, 1, 1, 40)[number % 4]
                x = torch.randn(tokens, 128, generator=generator)
                index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])
                weight = torch.rand(tokens, TOP_K, generator=generator)
                if number % 3 == 1:
                    experts._caches[prefix].prefetch(prefix, index[0].tolist()[:2], 8)
                block = reader.experts(prefix)
                base = torch.randn(x.shape, generator=generator)
                want = routed._op(x, block.gate_up, block.down, index, weight, base)
                assert torch.equal(routed(x, index, weight, base), want)
    use = experts.stats()
    assert use.copied_bytes > 0
    assert mover.copies * plan.pools[0].record <= use.copied_bytes * 2
    assert (use.assisted > 0) <= assist
    assert use.ahead >= use.ahead_used
    for cache in {id(c): c for c in experts._caches.values()}.values():
        assert cache.table.claimable == cache.table.slots
    assert next(stages, None) is None


def test_a_read_error_below_two_tiers(copy: Path) -> None:
    mover = FakeMover()
    stages = on_a_device(copy, 0.0, 0.0, mover, False)
    next(stages)
    layers, _ = next(stages), next(stages)
    prefix, routed = next(iter(layers.items()))
    x, weight, base = torch.randn(1, 128), torch.ones(1, TOP_K), torch.randn(1, 128)
    index = torch.arange(TOP_K)[None]
    file = copy / "experts-00.bin"
    whole = file.read_bytes()
    os.truncate(file, 0)
    with pytest.raises(ModelError, match="can't be read any more"):
        routed(x, index, weight, base)
    file.write_bytes(whole)
    with PackReader.open(copy) as reader:
        block = reader.experts(prefix)
        for _ in range(3):
            want = routed._op(x, block.gate_up, block.down, index, weight, base)
            assert torch.equal(routed(x, index, weight, base), want)
    assert next(stages, None) is None


def test_how_many_the_cpu_takes() -> None:
    host: Any = None
    assert Assist(host, cpu=0.0, link=25e9).share(8) == 0
    assert Assist(host, cpu=25e9, link=25e9).share(8) == 4
    assert Assist(host, cpu=50e9, link=25e9).share(6) == 4
    assert Assist(host, cpu=1e9, link=25e9).share(8) == 0
    assert Assist(host, cpu=1e9, link=1e6).share(3) == 3
    assert Assist(host, cpu=1.0, link=1.0).share(0) == 0


def test_the_two_speeds_are_measured(pack: Path) -> None:
    with PackReader.open(pack) as reader:
        prefix = reader.expert_prefixes[0]
        file = reader.expert_file(prefix)
        store = ExpertStore({prefix: file}, direct=False)
        host = ExpertCache({prefix: file}, torch.zeros(8, file.record_size, dtype=torch.uint8), store)
        found = measure_assist(host, torch.zeros(6, file.record_size, dtype=torch.uint8), FakeMover(), TOP_K)
        store.close()
    assert found.cpu > 0
    assert found.link > 0


def test_prompt_and_answer_are_counted_apart(pack: Path) -> None:
    from qwenrun.engine.sampler import SamplingParams

    with Engine.open(pack, ctx=64, ram=budgets(pack)[0]) as engine:
        *_, done = engine.session().generate(list(range(20)), SamplingParams(temperature=0), max_tokens=4, stop_ids=())
        prompt, answer = done.stats.prefill_experts, done.stats.decode_experts
        assert 0 < prompt.lookups <= LAYERS * EXPERTS
        assert answer.lookups == 3 * LAYERS * TOP_K == done.stats.decode_steps * LAYERS * TOP_K
        assert prompt.disk_bytes + answer.disk_bytes == engine.expert_stats().disk_bytes
        assert engine.disk_reads()[0] >= engine.expert_stats().disk_bytes
        assert engine.disk_reads()[1] > 0


def test_routes_can_be_recorded(pack: Path) -> None:
    with Engine.open(pack, ctx=64) as engine:
        seen: list[tuple[str, Any]] = []
        engine.record_routes(lambda prefix, chosen: seen.append((prefix, chosen)))
        engine.session().prefill([1, 2, 3])
        engine.record_routes(None)
    assert [chosen.shape for _, chosen in seen] == [(3, TOP_K)] * LAYERS
    assert len({prefix for prefix, _ in seen}) == LAYERS


@pytest.mark.parametrize(("gain", "on"), [(True, True), (False, False)])
def test_reading_ahead_stays_only_if_it_pays(gain: bool, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock and a cache that are told what each way costs."""
    from types import SimpleNamespace

    from qwenrun.engine import prefetch
    from qwenrun.engine.events import ExpertUse

    now = 0.0
    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: now)
    asked: list[list[int]] = []

    def note(prefix: str, experts: Any, limit: int) -> None:
        nonlocal now
        asked.append(list(experts))
        now += 0.001

    cache: Any = SimpleNamespace(stats=ExpertUse(), prefetch=note)
    layers: Any = [SimpleNamespace(preview=lambda x: torch.tensor([[3, 5]]), between=None) for _ in range(3)]
    ahead = prefetch.Prefetcher(layers, [("a", cache), ("b", cache), ("c", cache)])
    x = torch.zeros(1, 4)
    seen = []
    for _ in range(2 * prefetch.TRIAL + 100):
        for layer in layers[:2]:
            layer.between(x)
        seen.append(ahead.on)
        cache.stats.stall_seconds += 0.010 if not ahead.on else 0.005 if gain else 0.020
    assert seen[: prefetch.TRIAL] == [True] * prefetch.TRIAL
    assert seen[prefetch.TRIAL : 2 * prefetch.TRIAL] == [False] * prefetch.TRIAL
    assert set(seen[2 * prefetch.TRIAL + 1 :]) == {on}
    assert asked[0] == [3, 5]
    assert layers[2].between is None
    count = len(asked)
    layers[0].between(torch.zeros(50, 4))  # a prompt
    assert len(asked) == count
