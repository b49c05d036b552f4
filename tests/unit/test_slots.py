"""SlotTable: never two experts in a slot, never a pinned one thrown out, the least asked for goes first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.engine.slots import SlotTable
from qwenrun.measure.routes import best_possible, made_up, replay


def consistent(table: SlotTable) -> None:
    for key, slot in enumerate(table.slot_of):
        assert slot == -1 or table.key_of[slot] == key
    for slot, key in enumerate(table.key_of):
        assert key == -1 or table.slot_of[key] == slot


STEPS = st.lists(
    st.tuples(st.sampled_from(["touch", "claim", "pin", "unpin", "drop"]), st.integers(0, 11)), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), STEPS)
def test_any_order_of_calls(slots: int, steps: list[tuple[str, int]]) -> None:
    table = SlotTable(12, slots, half_life=4)
    pins: dict[int, int] = {}
    for now, (what, key) in enumerate(steps):
        slot = int(table.slot_of[key])
        if what == "touch":
            table.touch(key, 1, now)
        elif what == "claim" and slot < 0:
            before = {int(table.key_of[s]): s for s in pins}
            got = table.claim(key)
            assert (got == -1) == (len(pins) == slots)
            if got >= 0:
                assert got not in pins
                pins[got] = 1
            for held, where in before.items():  # what is pinned stays where it is
                assert table.slot_of[held] == where
        elif what == "pin" and slot >= 0:
            table.pin(slot)
            pins[slot] = pins.get(slot, 0) + 1
        elif what == "unpin" and pins.get(slot):
            table.unpin(slot)
            pins[slot] -= 1
            if not pins[slot]:
                del pins[slot]
        elif what == "drop" and slot >= 0:
            table.drop(key)
            pins.pop(slot, None)
        consistent(table)
        assert table.claimable == slots - len(pins)


def fill(table: SlotTable, keys: list[int], now: float = 0.0) -> None:
    for key in keys:
        table.touch(key, 1, now)
        table.unpin(table.claim(key))


def test_the_least_asked_for_makes_room() -> None:
    table = SlotTable(10, 3, half_life=1e9)
    fill(table, [1, 2, 3])
    table.touch(1, 5, 1)
    table.touch(3, 2, 1)
    table.claim(7)
    assert table.slot_of[2] == -1
    assert table.slot_of[1] >= 0


def test_a_short_half_life_is_lru() -> None:
    table = SlotTable(10, 2, half_life=0.5)
    fill(table, [1], 0)
    for _ in range(50):
        table.touch(1, 1, 0)
    fill(table, [2], 20)
    table.claim(3)
    assert table.slot_of[1] == -1


def test_scores_do_not_overflow() -> None:
    table = SlotTable(4, 2, half_life=1.0)
    fill(table, [0, 1], 0)
    for now in range(0, 20_000, 7):
        table.touch(now % 2, 1, now)
    assert np.isfinite(table._score).all()
    table.touch(1, 1, 20_000)
    table.claim(3)
    assert (table.slot_of[0], table.slot_of[1] >= 0) == (-1, True)


def test_free_slots_go_first_and_all_pinned_is_said() -> None:
    table = SlotTable(5, 2)
    assert {table.claim(0), table.claim(1)} == {0, 1}
    assert table.claim(2) == -1
    table.drop(0)
    assert table.claim(2) == 0


@pytest.mark.parametrize("zipf", [0.0, 1.0])
def test_replayed_routes(zipf: float) -> None:
    trace, experts = made_up(layers=3, experts=32, top_k=4, tokens=150, zipf=zipf)
    for slots in (12, 48):
        rate, best = replay(trace, experts, slots, 256), best_possible(trace, experts, slots)
        assert 0 < rate < best < 1
        if zipf:  # a skewed layer is worth more than its share of slots
            assert rate > slots / experts
    # All of them fit: every expert is missed once.
    distinct = len({int(key) for keys, _, _ in trace for key in keys})
    assert replay(trace, experts, experts, 256) == best_possible(trace, experts, experts)
    assert replay(trace, experts, experts, 256) == pytest.approx(1 - distinct / sum(len(k) for k, _, _ in trace))
