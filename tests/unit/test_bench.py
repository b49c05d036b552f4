"""What is measured, on engines whose speed and answers are known beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwenrun import Engine
from qwenrun.demo import model_dir
from qwenrun.demo.dataset import pairs
from qwenrun.engine.events import Done, Event, ExpertUse, Token
from qwenrun.engine.sampler import SamplingParams
from qwenrun.errors import UsageError
from qwenrun.kernels.dispatch import refusal
from qwenrun.measure import bandwidth, quality
from qwenrun.measure import bench as bench_module
from qwenrun.measure.bench import BenchResult, Speed, bench
from qwenrun.measure.machine import diagnose, machine
from qwenrun.plan.device import free_memory
from qwenrun.ui import reports


class Clock:
    """Time that passes only when someone works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeSession:
    """Prefills a token in 1 ms; each step takes the next of `steps` seconds. Being slow elsewhere costs too."""

    def __init__(self, clock: Clock, steps: Sequence[float]) -> None:
        self.clock, self.steps = clock, list(steps)
        self.position = 0
        self.fed: list[int] = []

    def reset(self) -> None:
        self.position = 0
        self.clock.now += 100

    def prefill(self, ids: Sequence[int]) -> None:
        assert self.position == 0
        self.position += len(ids)
        self.fed += ids
        self.clock.now += len(ids) / 1000

    def step(self, token: int) -> None:
        self.position += 1
        self.fed.append(token)
        self.clock.now += self.steps.pop(0)


def fake_engine(session: Any, ctx: int = 64) -> Any:
    return SimpleNamespace(
        session=lambda: session,
        run=SimpleNamespace(ctx=ctx, kv="int8"),
        config=SimpleNamespace(name="fake"),
        path=Path("/fake"),
        device=torch.device("cpu"),
        vocab_size=50,
        bytes_per_token=lambda: 2_000_000_000,
        plan=SimpleNamespace(parts=lambda tier="device": {"total": 7}, experts=10, slots=4),
        expert_stats=lambda: ExpertUse(*(len(session.fed) // n for n in (1, 2)), disk_bytes=len(session.fed) * 3),
        disk_reads=lambda: (len(session.fed) * 10, session.clock.now / 2),
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(bench_module.time, "perf_counter", found)
    monkeypatch.setattr(bench_module, "read_bandwidth", lambda: (50e9, "told"))
    return found


def test_medians_without_the_first_run(clock: Clock) -> None:
    # Runs of four steps: a slow one to warm up, then 0.1, 0.2 and 0.4 seconds a token.
    session = FakeSession(clock, [9.0] * 4 + [0.1] * 4 + [0.4] * 4 + [0.2] * 4)
    seen: list[tuple[int, int, str]] = []

    def progress(done: int, total: int, what: str) -> None:
        clock.now += 1000
        seen.append((done, total, what))

    result = bench(fake_engine(session), 20, 4, 3, progress)
    assert result.decode.runs == pytest.approx((10.0, 2.5, 5.0))
    assert result.decode.median == pytest.approx(5.0)
    assert result.prefill.runs == pytest.approx((1000.0,) * 3)
    assert result.achieved == pytest.approx(10e9)
    # Of the three measured runs: 20 tokens of prompt and 4 after them.
    assert result.prefill_experts == ExpertUse(lookups=60, hits=30, disk_bytes=180)
    assert result.decode_experts == ExpertUse(lookups=12, hits=6, disk_bytes=36)
    assert result.to_json()["decode_experts"]["disk_bytes_per_token"] == 3
    assert result.to_json()["decode_experts"]["hit_rate"] == 0.5
    assert result.plan["resident_experts"] == 4
    assert (result.read_bandwidth, result.bandwidth_method) == (50e9, "told")
    assert (result.prompt_tokens, result.gen_tokens, result.ctx, result.kv) == (20, 4, 64, "int8")
    assert len(session.fed) == 4 * (20 + 4)
    assert all(0 <= token < 50 for token in session.fed)
    assert seen[-1] == (20, 20, "decode")
    assert [what for _, _, what in seen].count("prefill") == 4


def test_what_does_not_fit_is_not_measured(clock: Clock) -> None:
    with pytest.raises(UsageError) as error:
        bench(fake_engine(FakeSession(clock, []), ctx=63), 60, 4, 1)
    assert error.value.hint == "--ctx 64"


RESULT = BenchResult(
    model="fake",
    path="/fake",
    prompt_tokens=256,
    gen_tokens=32,
    ctx=288,
    kv="bf16",
    prefill=Speed((400.0, 500.0, 450.0)),
    decode=Speed((9.0, 11.0, 10.0)),
    bytes_per_token=7_390_000_000,
    read_bandwidth=100e9,
    bandwidth_method="told",
    threads=8,
    machine="a machine",
    in_cache=False,
    plan={
        "experts": 6_144,
        "resident_experts": 1_402,
        "device_bytes": {"total": 1},
        "host_bytes": {},
        "disk_bytes": {},
    },
    prefill_experts=ExpertUse(),
    decode_experts=ExpertUse(
        lookups=1000, hits=750, disk_bytes=96 * 10**9, ahead=100, ahead_used=40, stall_seconds=2.5
    ),
    disk_read_bandwidth=1e9,
    peak_rss=12 << 30,
)


def test_the_report_says_how_far_there_is_to_go(capsys: pytest.CaptureFixture[str]) -> None:
    reports.bench_report(RESULT, as_json=False)
    out = capsys.readouterr().out
    assert "450.0 tok/s (median of 3, 400.0 to 500.0), 256 tokens" in out
    assert "73.90 GB/s (74% of it)" in out
    assert "100.00 GB/s" in out
    # 96 GB in three runs of 32 tokens.
    told = "1,402 of 6,144 resident; decode: hits 75.0%, 1.00 GB a token from disk, 40% of 100 read ahead were used"
    assert f"{told}, stalled 2.5 s, disk 1.00 GB/s" in out


def test_the_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    reports.bench_report(RESULT, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "qwenrun.bench/1"
    assert document["decode_tokens_per_second"] == {"median": 10.0, "min": 9.0, "max": 11.0, "runs": [9.0, 11.0, 10.0]}
    assert document["achieved_bytes_per_second"] == pytest.approx(73.9e9)
    assert {"machine", "threads", "read_bandwidth_bytes_per_second", "weights_fit_in_cache"} <= set(document)


def test_read_bandwidth_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "SMALLEST", 64 << 20)
    monkeypatch.setattr(bandwidth, "LARGEST", 64 << 20)
    seen: list[tuple[int, int]] = []
    rate, how = bandwidth.read_bandwidth(lambda done, total: seen.append((done, total)))
    print(f"{rate / 1e9:.1f} GB/s: {how}")
    assert 0.2e9 < rate < 5e12
    assert "64 MiB" in how
    assert seen[-1] == (15, 15)


def test_this_machine() -> None:
    here = machine()
    assert here.cores >= 1
    assert here.cpu
    assert here.cpu in here.line()
    free = free_memory()
    if here.memory_bytes is not None:
        assert free is not None
        assert 0 < free <= here.memory_bytes


def test_diagnosis_names_a_backend_for_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    found = diagnose()
    assert {row["op"] for row in found["backends"]} >= {"linear", "experts", "attention", "delta_rule"}
    assert all(row["backend"] for row in found["backends"])
    assert found["libraries"]["torch"]
    if not refusal("cpu", "rms_norm", "cpu", None):
        assert found["kernels"]["cpu"].startswith(("avx2", "avx512-vnni"))
    reports.doctor_report(found, as_json=False)
    assert "delta_rule" in capsys.readouterr().out


# -- answers --------------------------------------------------------------------------------------------------


class Parrot:
    """Answers from a book, and notes how it was asked."""

    def __init__(self, book: dict[str, str]) -> None:
        self.book, self.asked = book, []  # type: ignore[var-annotated]

    def session(self) -> Parrot:
        return self

    def sampling(self, think: bool | None = None) -> SamplingParams:
        return SamplingParams(temperature=0.7, top_k=20, presence_penalty=1.5)

    def chat(self, messages: list[dict[str, str]], **options: Any) -> Iterator[Event]:
        self.asked.append((messages, options))
        text = self.book[messages[-1]["content"]]
        yield Token(0, text, "answer")
        yield Done("stop", text, "thought", (0,))


def test_exact_answers_are_counted() -> None:
    parrot: Any = Parrot({"a?": "A.", "b?": " B.\n", "c?": "c.", "d?": ""})
    seen: list[tuple[int, int, str]] = []
    sets = {"one": [("a?", "A."), ("b?", "B.")], "two": [("c?", "C."), ("d?", "D."), ("a?", "A.")]}
    one, two = quality.exact_answers(
        parrot, sets, max_tokens=9, progress=lambda done, total, what: seen.append((done, total, what))
    )
    assert (one.name, one.exact, one.rate) == ("one", 2, 1.0)
    assert (two.exact, two.rate) == (1, pytest.approx(1 / 3))
    assert [answer.answer for answer in two.answers if not answer.exact] == ["c.", ""]
    assert seen[-1] == (5, 5, "two")
    for messages, options in parrot.asked:
        assert [message["role"] for message in messages] == ["user"]
        assert options["params"].greedy
        assert options["params"].presence_penalty == 0
        assert options["max_tokens"] == 9
        assert options["think"] is False


def test_a_model_beside_itself_and_beside_another(tmp_path: Path, quantize: Any) -> None:
    """Against logits of whole conversations, spelled out here."""
    quantize(model_dir(), tmp_path / "p", "int4")
    pairs = next(iter(quality.question_sets(None).values()))[:4]
    with (
        Engine.open(model_dir(), ctx=256) as one,
        Engine.open(model_dir(), ctx=256) as two,
        Engine.open(tmp_path / "p", ctx=256) as coded,
    ):
        (same,) = quality.distances(one, two, {"four": pairs})
        assert (same.divergence, same.error, same.agree) == (0, 0, 1)
        (apart,) = quality.distances(coded, one, {"four": pairs})
        sums, agreed, tokens = [], 0, 0
        for question, answer in pairs:
            logits = []
            start = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
            for engine in (one, coded):
                ids = engine.tokenizer.encode_with_controls(f"{start}{answer}<|im_end|>")
                begin = len(engine.tokenizer.encode_with_controls(start))
                session = engine.session()
                logits.append(session.prefill(ids, all_logits=True)[begin - 1 : -1, : engine.vocab_size].double())
                del session
            wanted, got = (each.log_softmax(-1) for each in logits)
            sums.append(float((wanted.exp() * (wanted - got)).sum()))
            agreed += int((wanted.argmax(-1) == got.argmax(-1)).sum())
            tokens += len(wanted)
    assert apart.tokens == tokens
    assert apart.divergence == pytest.approx(sum(sums) / tokens, rel=2e-2)
    assert 0 < apart.error < 0.01
    assert apart.agree == pytest.approx(agreed / tokens)
    figures: Any = [quality.Figures("four", (quality.Answered("q?", "A", "A", True),))]
    reports.eval_report(fake_engine(None), figures, [apart], "demo", as_json=False)


def test_the_report_of_answers(capsys: pytest.CaptureFixture[str]) -> None:
    engine: Any = fake_engine(None)
    figures = [quality.Figures("one", (quality.Answered("q?", "A", "B\x1b[2J", False),) * 12)]
    reports.eval_report(engine, figures, as_json=False)
    out = capsys.readouterr().out
    assert "0.0%" in out
    assert "the first 10 of 12" in out
    assert "\x1b" not in out
    reports.eval_report(engine, figures, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "qwenrun.eval/1"
    assert document["sets"][0]["answers"][0] == {
        "question": "q?",
        "expected": "A",
        "answer": "B\x1b[2J",
        "exact": False,
    }


def test_questions_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "a?", "answer": "ä", "extra": 1}\n\n{"question": "b?", "answer": ""}\n', "utf-8")
    assert quality.question_sets(file) == {"mine": [("a?", "ä"), ("b?", "")]}


@pytest.mark.parametrize(
    "line",
    ["not json", "[1]", '{"question": "a?"}', '{"question": "", "answer": "x"}', '{"question": 1, "answer": "x"}'],
)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(f'{{"question": "a?", "answer": "b"}}\n{line}\n')
    with pytest.raises(UsageError, match=r"mine\.jsonl:2"):
        quality.question_sets(file)


def test_files_without_questions(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, words in (("empty.jsonl", "no questions"), ("none.jsonl", "can't be read")):
        with pytest.raises(UsageError, match=words):
            quality.question_sets(tmp_path / name)


def test_the_demos_sets_are_those_it_was_made_with() -> None:
    sets = quality.question_sets(None)
    assert list(sets) == ["heldin", "heldout"]
    assert sets["heldout"] == [(qa.question, qa.answer) for qa in pairs("heldout")]
    assert not {question for question, _ in sets["heldin"]} & {question for question, _ in sets["heldout"]}
