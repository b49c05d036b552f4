"""GraphDecoder: one token through the model as graphs that are recorded once and played for every token.

A token is always the same kernels on the same memory: its id, its place in the cache and the numbers of its experts'
slots are read from device memory when a graph is played. Where every expert has its slot for good, a token is one
graph, and the slots come from a table on the device. Otherwise the host looks up each layer's choice between two graphs
and writes the slots where the next one reads them. So an expert that moves changes a number, and nothing is recorded
again.

Nothing here calls CUDA: a Recorder does, and tests give one that plays what it was told in the order it was told.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from qwenrun.engine.routed import RoutedExperts
from qwenrun.engine.state import SequenceState
from qwenrun.model.moe import MoE
from qwenrun.model.qwen3_5 import Model, Table

T = TypeVar("T")
# Experts of a layer that are fetched at a token though nobody chose them.
BROUGHT = 2


class Recorder(Protocol):
    """Makes graphs."""

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What `work` asks of the device, recorded and not done: (what plays it, what `work` gave).

        The tensors that it gave are written anew whenever it is played, and so is every tensor it changes.
        """


class CudaRecorder:
    """CUDA graphs that share one pool of memory: they are played in the order in which they were recorded."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Threads that read experts call nothing of CUDA; what other libraries' threads do is none of this graph.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                made = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, made


class Segment(Generic[T]):
    """Work of the device that is done as it is the first time, when kernels are compiled, and recorded the second.

    What it gave last is in `out`; once it is recorded, that is always the same memory.
    """

    def __init__(self, recorder: Recorder, work: Callable[[], T]) -> None:
        self._recorder, self._work = recorder, work
        self._play: Callable[[], None] | None = None
        self._warm = False
        self.out: T

    def __call__(self) -> T:
        if self._play is None:
            if not self._warm:
                self.out = self._work()
                self._warm = True
                return self.out
            self._play, self.out = self._recorder.record(self._work)
        self._play()
        return self.out


class _AtPlace:
    """A layer's keys and values as `model.attention` asks for them, for a token whose place is on the device."""

    def __init__(self, kept: Any, place: Tensor) -> None:
        self._kept, self._place = kept, place

    def attend(self, start: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """start is not used: a graph knows none."""
        return self._kept.attend_at(self._place, q, k, v, scale)


class GraphDecoder:
    """The next token of the sequence `state`: a callable of its id that gives the hidden state f32 [1, H] after the
    final norm, as `Model.forward` does. The state moves on by one token."""

    def __init__(self, model: Model, state: SequenceState, recorder: Recorder) -> None:
        self._model, self._state, self._recorder = model, state, recorder
        device = state.device
        self._ids = torch.zeros(1, dtype=torch.long, device=device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._x = torch.zeros(1, model.config.hidden_size, device=device)
        self._states: list[Any] = [_AtPlace(s, self._place) if hasattr(s, "attend_at") else s for s in state.layers]
        self._cached = [
            layer.mlp.routed
            for layer in model.layers
            if isinstance(layer.mlp, MoE) and isinstance(layer.mlp.routed, RoutedExperts)
        ]
        if self._cached:
            self._slots = torch.zeros(1, model.config.top_k, dtype=torch.long, device=device)
            self._fronts = [Segment(recorder, partial(self._front, n)) for n in range(len(model.layers))]
            self._backs = [Segment(recorder, partial(self._back, n)) for n in range(len(model.layers))]
        self._begin = Segment(recorder, self._start)
        self._end = Segment(recorder, self._finish)
        self._whole: Segment[Tensor] | None = None
        self._tables: list[Tensor] = []

    @torch.inference_mode()
    def __call__(self, token: int) -> Tensor:
        """Raises what reading an expert raises; the state is then as after an interruption."""
        self._ids.fill_(token)
        self._place.fill_(self._state.position)
        if not isinstance(self._model.embed, Table):
            self._x.copy_(self._model.embed(self._ids))
        hidden = self._all_at_once() if self._settled() else self._layer_by_layer()
        self._state.position += 1
        return hidden.clone()

    # -- everything in its place: one graph --------------------------------------------------------------------

    def _settled(self) -> bool:
        """Whether no layer's experts will ever move again, and nobody wants to see which are chosen."""
        if self._whole is not None:
            return all(routed.trace is None for routed in self._cached)
        # What no token has chosen yet may not be chosen for a long time, and until then a token is many graphs.
        for routed in self._cached:
            routed.bring(BROUGHT)
        tables = []
        for routed in self._cached:
            table = routed.table()
            if table is None:
                return False
            tables.append(torch.from_numpy(table).to(self._state.device))
        self._tables = tables
        self._whole = Segment(self._recorder, self._one_token)
        return True

    def _all_at_once(self) -> Tensor:
        assert self._whole is not None
        hidden = self._whole()
        for routed in self._cached:
            routed.count_hits(self._model.config.top_k)
        return hidden

    def _one_token(self) -> Tensor:
        rotary = self._start()
        routed, tables = iter(self._cached), iter(self._tables)
        for layer, state in zip(self._model.layers, self._states):
            if self._cached:
                _, normed, index, weight, base = layer.until_routed(self._x, rotary, state, 0)
                self._x.copy_(next(routed).compute(normed, next(tables)[index], weight, base))
            else:
                self._x.copy_(layer(self._x, rotary, state, 0))
        return self._finish()

    # -- layer by layer, the host in between -------------------------------------------------------------------

    def _layer_by_layer(self) -> Tensor:
        self._begin()
        for layer, front, back, routed in zip(self._model.layers, self._fronts, self._backs, self._cached):
            stream, normed, index, weight, base = front()
            if layer.between is not None:
                layer.between(stream)
            wanted, keys, slots = routed.look_up(index)
            if slots is not None:
                self._slots.copy_(torch.from_numpy(slots))
                back()
            else:
                self._x.copy_(routed.fetch_and_compute(normed, wanted, keys, weight, base))
            routed.done(keys, slots is not None)
        return self._end()

    def _start(self) -> tuple[Tensor, Tensor]:
        if isinstance(self._model.embed, Table):
            self._x.copy_(self._model.embed(self._ids))
        return self._model.rotary(self._place)

    def _front(self, number: int) -> tuple[Tensor, ...]:
        """A layer until the experts are chosen: see `kernels.ops.moe_entry`."""
        return self._model.layers[number].until_routed(self._x, self._begin.out, self._states[number], 0)

    def _back(self, number: int) -> None:
        """Its experts, from the slots that were looked up."""
        _, normed, _, weight, base = self._fronts[number].out
        self._x.copy_(self._cached[number].compute(normed, self._slots, weight, base))

    def _finish(self) -> Tensor:
        model = self._model
        return model.rms_norm(self._x, model.norm, model.config.rms_norm_eps)
