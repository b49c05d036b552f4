"""Decoding by graphs on a device that is not there (see `fake_device`): a number of the host's that crept into one, or
a buffer that is not where it was, gives other hidden states than the model computes token by token."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import FakeMover, Tape, watch
from torch import Tensor

from qwenrun import Engine
from qwenrun.engine.arena import Arena
from qwenrun.engine.engine import _cap
from qwenrun.engine.experts import Experts
from qwenrun.engine.graph import GraphDecoder
from qwenrun.engine.routed import RoutedExperts
from qwenrun.engine.sampler import SamplingParams
from qwenrun.engine.sources import PackSource
from qwenrun.engine.state import SequenceState
from qwenrun.errors import ModelError
from qwenrun.kernels.ops import decode, sum_in_order
from qwenrun.measure.synth import synth_config, synthesize
from qwenrun.model.bind import bind
from qwenrun.model.config import ModelConfig
from qwenrun.plan.buffers import Run
from qwenrun.plan.planner import Budget, least_budget, place, weigh, whole_budget
from qwenrun.quant.packfile.reader import PackReader
from qwenrun.quant.recipe import Recipe

SMALL = {"hidden_size": 128, "vocab_size": 300, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
SMALL |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_attention_heads": 4, "num_experts_per_tok": 4}
EXPERTS, LAYERS, TOP_K = 12, 4, 4


def experts_of_a_device(
    x: Tensor, gate_up: Any, down: Any, index: Tensor, weight: Tensor, base: Tensor | None = None, distinct: int = 0
) -> Tensor:
    """As `ops.experts`, and as on a card: nothing of `index` is the host's to know."""
    first = torch.einsum("tkij,tj->tki", decode(gate_up[index]), x)
    gate, up = first.chunk(2, -1)
    rows = torch.einsum("tkij,tkj->tki", decode(down[index]), torch.nn.functional.silu(gate) * up)
    total = sum_in_order(rows * weight[..., None])
    return total if base is None else total.add_(base)


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWENRUN_BACKEND", "ref")
    made = RoutedExperts.__init__

    def init(self: Any, *args: Any) -> None:
        made(self, *args)
        self._op = experts_of_a_device

    monkeypatch.setattr(RoutedExperts, "__init__", init)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = synth_config("35b", layers=LAYERS, experts=EXPERTS, changes=SMALL)
    return synthesize(tmp_path_factory.mktemp("synth") / "p", config, Recipe.load("nvfp4")).path


class Device:
    """A pack opened as beside a card, with `device_share` and `host_share` of its experts' slots."""

    def __init__(self, path: Path, device_share: float, host_share: float, kv: str, assist: bool) -> None:
        self.reader = PackReader.open(path)
        config = ModelConfig.from_hf(self.reader.config)
        run = Run(64, kv=kv, mtp=False, vision=False)
        weights = weigh(config, [(e.info, e.assignment) for e in self.reader.tensors.values()], run)
        least, most = (f(config, weights, run, True) for f in (least_budget, whole_budget))
        small = place(config, weights, run, Budget(least, 10**12, gpu=True))
        fixed = small.parts("host")["runtime"] + sum(8 * pool.record for pool in small.pools)
        host = fixed + int(host_share * (small.total("host") - fixed))
        self.plan = place(config, weights, run, Budget(least + int(device_share * (most - least)), host, gpu=True))
        arena = Arena.from_plan(self.plan, "cpu")
        self.mover, self.tape = FakeMover(), Tape()
        self.experts = Experts(self.reader, self.plan, arena, mover=self.mover)
        if not assist:
            self.experts._assists = dict.fromkeys(self.experts._assists)
        for cache in {id(c): c for c in self.experts._caches.values()}.values():
            watch(cache, self.mover)
        self.model = bind(PackSource(self.reader, arena, self.experts.of), config)
        self.state = SequenceState(config, run, arena.sequence(0))
        self.decode = GraphDecoder(self.model, self.state, self.tape)

    def close(self) -> None:
        self.experts.close()
        self.reader.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., Device]]:
    made: list[Device] = []

    def open_(path: Path, device: float, host: float, kv: str = "bf16", assist: bool = False) -> Device:
        made.append(Device(path, device, host, kv, assist))
        return made[-1]

    yield open_
    for device in made:
        device.close()


def follow(device: Device, steps: int, seed: int = 1) -> list[Tensor]:
    """Hidden states of a prompt's last token and of `steps` tokens after it."""
    rng = random.Random(seed)
    prompt = torch.tensor([rng.randrange(300) for _ in range(7)])
    out = [device.model.forward(prompt, device.state)[-1:]]
    return out + [device.decode(rng.randrange(300)) for _ in range(steps)]


def wanted(device: Device, steps: int, seed: int = 1) -> list[Tensor]:
    """The same, every token through `Model.forward`."""
    rng = random.Random(seed)
    prompt = torch.tensor([rng.randrange(300) for _ in range(7)])
    out = [device.model.forward(prompt, device.state)[-1:]]
    return out + [device.model.forward(torch.tensor([rng.randrange(300)]), device.state) for _ in range(steps)]


def close_to(got: list[Tensor], want: list[Tensor]) -> None:
    """A key that is rounded the other way moves a hidden state by some 1e-5, a wrong expert or place by 1e-1."""
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert float((a - b).norm() / b.norm()) < 1e-3, f"token {number}"


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_experts_that_move_need_no_new_graph(pack: Path, opened: Callable[..., Device], kv: str) -> None:
    """Few slots in both tiers: nearly every layer of every token waits for experts."""
    device = opened(pack, 0.3, 0.3, kv)
    got = follow(device, 25)
    assert device.experts.stats().copied_bytes > 25 * device.plan.pools[0].record
    assert device.decode._whole is None
    # Begin, end, a layer until its experts are chosen and its experts: recorded once each, or never.
    assert device.tape.recorded <= 2 + 2 * LAYERS
    assert device.tape.played > 20 * LAYERS
    close_to(got, wanted(opened(pack, 1.0, 1.0, kv), 25))
    for cache in {id(c): c for c in device.experts._caches.values()}.values():
        assert cache.table.claimable == cache.table.slots


@pytest.mark.parametrize("assist", [False, True])
def test_what_is_missing_may_be_computed_beside(pack: Path, opened: Callable[..., Device], assist: bool) -> None:
    device = opened(pack, 0.3, 1.0, "bf16", assist)
    got = follow(device, 20)
    assert (device.experts.stats().assisted > 0) <= assist
    close_to(got, wanted(opened(pack, 1.0, 1.0), 20))


def test_a_token_is_one_graph_once_every_expert_has_its_slot(pack: Path, opened: Callable[..., Device]) -> None:
    device = opened(pack, 1.0, 1.0)
    for routed in device.decode._cached:
        everyone = torch.arange(EXPERTS).view(3, TOP_K)
        routed(torch.zeros(3, 128), everyone, torch.ones(3, TOP_K), torch.zeros(3, 128))
    before = device.experts.stats()
    got = follow(device, 12)
    use = device.experts.stats() - before
    assert (device.tape.recorded, device.tape.played) == (1, 11)  # the first token is computed as it is
    assert use.hits == use.lookups
    assert use.lookups > 12 * LAYERS * TOP_K
    close_to(got, wanted(opened(pack, 1.0, 1.0), 12))


def test_experts_that_nobody_chose_come_too(pack: Path, opened: Callable[..., Device]) -> None:
    """Else a token would be many graphs until the rarest expert was chosen; where not all have room none is fetched."""
    device = opened(pack, 1.0, 1.0)
    for _ in range(EXPERTS // 2 + 2):
        device.decode(7)
    assert device.decode._whole is not None
    assert all(routed.table() is not None for routed in device.decode._cached)
    for cache in {id(c): c for c in device.experts._caches.values()}.values():
        assert cache.table.claimable == cache.table.slots
    few = opened(pack, 0.3, 1.0)
    few.decode(7)
    before = few.experts.stats().copied_bytes
    for routed in few.decode._cached:
        routed.bring(100)
    assert few.experts.stats().copied_bytes == before


def test_routes_are_seen_while_somebody_looks(pack: Path, opened: Callable[..., Device]) -> None:
    """The host has to know what was chosen: no whole graph meanwhile, and one again after it."""
    device = opened(pack, 1.0, 1.0)
    for routed in device.decode._cached:
        everyone = torch.arange(EXPERTS).view(3, TOP_K)
        routed(torch.zeros(3, 128), everyone, torch.ones(3, TOP_K), torch.zeros(3, 128))
    follow(device, 3)
    seen: list[Any] = []
    device.experts.record(lambda prefix, chosen: seen.append(chosen))
    device.decode(5)
    assert [chosen.shape for chosen in seen] == [(1, TOP_K)] * LAYERS
    device.experts.record(None)
    played = device.tape.played
    device.decode(6)
    assert device.tape.played == played + 1
    assert len(seen) == LAYERS


def test_another_turn_plays_the_same_graphs(pack: Path, opened: Callable[..., Device]) -> None:
    """Back to the start, a checkpoint restored, a longer prompt: states lie where they lay."""
    device, other = opened(pack, 0.4, 1.0), opened(pack, 1.0, 1.0)
    for one, feed in ((device, follow), (other, wanted)):
        feed(one, 5)
        one.state.checkpoint()
        feed(one, 4, seed=2)
    recorded = device.tape.recorded
    for one in (device, other):
        one.state.restore_nearest(12)
    close_to(follow(device, 9, seed=3), wanted(other, 9, seed=3))
    device.state.reset()
    other.state.reset()
    close_to(follow(device, 9, seed=4), wanted(other, 9, seed=4))
    assert device.tape.recorded <= max(recorded, 2 + 2 * LAYERS)


def test_a_failed_read_leaves_the_graphs_whole(pack: Path, opened: Callable[..., Device], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in pack.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    device, other = opened(copy, 0.3, 0.3), opened(pack, 1.0, 1.0)
    follow(device, 6)
    wanted(other, 6)
    files = sorted(copy.glob("experts-*.bin"))
    whole = {path: path.read_bytes() for path in files}
    for path in files:
        path.write_bytes(b"")
    saved = device.state.copy()
    error = None
    for token in range(60):
        saved = device.state.copy()
        try:
            device.decode(token)
        except ModelError as found:
            error = found
            break
        other.model.forward(torch.tensor([token]), other.state)
    assert "can't be read any more" in str(error)
    assert device.state.position == other.state.position
    for path, data in whole.items():
        path.write_bytes(data)
    device.state.restore(saved)
    for token in (7, 8, 9):
        want = other.model.forward(torch.tensor([token]), other.state)
        close_to([device.decode(token)], [want])


def test_the_tape_refuses_what_a_graph_cannot_hold() -> None:
    x, tape = torch.arange(4.0), Tape()
    for work in (lambda: x.sum().item(), lambda: x[x > 1], lambda: torch.tensor([1.0]) + x, lambda: x.unique()):
        with pytest.raises(AssertionError, match="no place in a graph"):
            tape.record(work)
    total = torch.zeros(1)
    play, made = tape.record(lambda: total.add_(x.sum()).clone())
    assert total == 0
    play()
    x.fill_(1.0)
    play()
    assert total == made == 10


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"hidden_size": 128, "vocab_size": 300, "intermediate_size": 192, "num_attention_heads": 4}
    changes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    config = synth_config("27b", layers=LAYERS, changes=changes)
    return synthesize(tmp_path_factory.mktemp("synth") / "d", config, Recipe.load("int4")).path


def test_a_session_decodes_by_them(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated, taken back and continued as without them; a dense model's token is one graph from the start."""
    said, tapes = [], []

    def decoder(engine: Engine, state: SequenceState) -> GraphDecoder:
        tapes.append(Tape())
        return GraphDecoder(engine.model, state, tapes[-1])

    for graphs in (False, True):
        if graphs:
            monkeypatch.setattr(Engine, "decoder", decoder)
        with Engine.open(dense, ctx=64) as engine:
            session = engine.session()
            params = SamplingParams(temperature=0)
            *_, done = session.generate([5, 7, 9], params, max_tokens=8, stop_ids=())
            session.rollback(4)
            *_, again = session.generate([11], params, max_tokens=8, stop_ids=())
            said.append((done.ids, again.ids, session.tokens))
    assert said[0] == said[1]
    assert tapes[0].recorded == 1
    assert tapes[0].played > 10


def test_there_are_none_without_a_card(dense: Path) -> None:
    with Engine.open(dense, ctx=64) as engine:
        assert engine.session()._decode is None


def test_a_card_is_asked_for_no_more_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch may take the budget without the driver's share, beside what another engine holds."""
    asked: list[float] = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append(share))
    plan: Any = SimpleNamespace(budget=Budget(24 << 30, gpu=True), parts=lambda: {"runtime": 1 << 30})
    _cap(torch.device("cuda"), plan)
    _cap(torch.device("cpu"), plan)
    assert asked == [26 / 80]
