"""The tokenizer against golden ids, and control tokens that only the template can place."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.errors import ModelError
from qwenrun.text.template import Part
from qwenrun.text.tokenizer import Detokenizer, Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "text"
VECTORS = json.loads((GOLDEN / "tok_vectors.json").read_text())
CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "<|image_pad|>")
SCRIPTS = {
    "Latin": "Zażółć gęślą jaźń, naïve façade",
    "Cyrillic": "Съешь ещё этих мягких французских булок",
    "Greek": "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم",
    "Hebrew": "דג סקרן שט בים מאוכזב",
    "Devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों",
    "Thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "Han": "我能吞下玻璃而不伤身体",
    "Kana": "いろはにほへと ちりぬるを カタカナ",
    "Hangul": "키스의 고유조건은 입술끼리 만나야",
    "Georgian": "მინას ვჭამ და არა მტკივა",
    "Emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 🤷🏽‍♀️ ok",
}


@pytest.fixture(scope="module")
def tokenizer(real_tokenizer_folder: Path) -> Tokenizer:
    started = time.perf_counter()
    tokenizer = Tokenizer.load(real_tokenizer_folder)
    print(f"loaded in {time.perf_counter() - started:.2f} s")
    return tokenizer


def test_merges_are_all_there(real_tokenizer_folder: Path) -> None:
    model = json.loads((real_tokenizer_folder / "tokenizer.json").read_text())["model"]
    assert len(model["merges"]) == 247_587
    assert len(model["vocab"]) == 248_044


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["text"][:12])
def test_golden_ids(tokenizer: Tokenizer, vector: dict) -> None:
    assert tokenizer.encode_with_controls(vector["text"]) == vector["ids"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_round_trip(tokenizer: Tokenizer, script: str) -> None:
    text = unicodedata.normalize("NFC", SCRIPTS[script])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < 248_044


def test_sizes_and_ends(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 248_077
    assert set(tokenizer.eos_ids) == {248_046, 248_044}
    assert tokenizer.control_id("<think>") == 248_068
    assert tokenizer.control(248_068) == "<think>"
    assert tokenizer.control(9419) is None
    assert tokenizer.token_bytes(248_200) == b""
    with pytest.raises(ModelError, match="<nothing>"):
        tokenizer.control_id("<nothing>")


@given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from(CONTROLS)), max_size=8))
@settings(max_examples=300, deadline=None)
def test_no_user_text_gives_a_control_token(tokenizer: Tokenizer, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = tokenizer.encode(text)
    assert all(tokenizer.control(token) is None for token in ids)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_parts_join_before_encoding(tokenizer: Tokenizer) -> None:
    joined = tokenizer.encode_parts([Part("<|im_start|>", True), Part("us"), Part("er\nHi"), Part("<|im_end|>", True)])
    assert joined == tokenizer.encode_with_controls("<|im_start|>user\nHi<|im_end|>")


@pytest.mark.parametrize("script", SCRIPTS)
def test_streamed_text_is_the_text(tokenizer: Tokenizer, script: str) -> None:
    ids = tokenizer.encode(SCRIPTS[script] + " \U0001f9d1\u200d\U0001f680")
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    assert not any("�" in piece for piece in pieces)


def test_stream_cut_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = [token for byte in "é€".encode() for token in [_byte_token(tokenizer, byte)]]
    for cut in range(len(ids) + 1):
        stream = Detokenizer(tokenizer)
        text = "".join(stream.push(token) for token in ids[:cut]) + stream.flush()
        assert text == tokenizer.decode(ids[:cut])
    assert tokenizer.decode(ids) == "é€"


def _byte_token(tokenizer: Tokenizer, byte: int) -> int:
    return next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte]))


def test_stream_hides_what_is_hidden(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer)
    assert stream.push(tokenizer.control_id("<|im_end|>")) == ""
    assert stream.push(tokenizer.control_id("<tool_call>")) == "<tool_call>"


def test_same_ids_as_transformers(tokenizer: Tokenizer, real_tokenizer_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(real_tokenizer_folder)
    for text in [*SCRIPTS.values(), *(v["text"] for v in VECTORS), "a\n\n\nb  c\t\td   "]:
        assert tokenizer.encode_with_controls(text) == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        '{"model": {"type": "WordPiece"}}',
        '{"model": {"type": "BPE", "vocab": 3}, "decoder": {"type": "ByteLevel"}}',
        '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}, "added_tokens": [{"id": -1, "content": "x"}]}',
        '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}, "added_tokens": {"a": 1}}',
    ],
)
def test_broken_files(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
