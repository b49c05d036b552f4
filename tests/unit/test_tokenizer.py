"""The tokenizer against golden ids, and control tokens that only the template can place."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.errors import ModelError, UsageError
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
    for no_token in (248_200, 248_077, -1, 1 << 40):
        assert tokenizer.token_bytes(no_token) == b""
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
    ids = [tokenizer.control_id("<|im_end|>"), tokenizer.control_id("<tool_call>")]
    assert [stream.push(token) for token in ids] == ["", "<tool_call>"]
    assert tokenizer.decode(ids, skip_special=True) == "<tool_call>"
    assert tokenizer.decode(ids) == "<|im_end|><tool_call>"


@given(st.lists(st.one_of(st.integers(0, 255), st.integers(0, 248_100)), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_ids_stream_as_they_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Ids drawn without regard to characters: every prefix, flushed, is the batch decoding of that prefix."""
    for cut in range(len(ids) + 1):
        stream = Detokenizer(tokenizer)
        text = "".join([*(stream.push(token) for token in ids[:cut]), stream.flush()])
        assert text == tokenizer.decode(ids[:cut], skip_special=True)
        assert text == b"".join(
            tokenizer.token_bytes(token) for token in ids[:cut] if not tokenizer.hidden(token)
        ).decode("utf-8", "replace")


def test_undecodable_bytes_are_refused(tokenizer: Tokenizer) -> None:
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    with pytest.raises(UsageError, match="lone surrogates"):
        tokenizer.encode(text)


def test_same_ids_as_transformers(tokenizer: Tokenizer, real_tokenizer_folder: Path, tmp_path: Path) -> None:
    """As transformers' own class encodes, from the files it saves: through its reader and through ours."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.Qwen3_5Tokenizer.from_pretrained(real_tokenizer_folder)
    reference.save_pretrained(tmp_path)
    saved = Tokenizer.load(tmp_path)
    assert (saved.vocab_size, saved.eos_ids) == (tokenizer.vocab_size, tokenizer.eos_ids)
    for text in [*SCRIPTS.values(), *(v["text"] for v in VECTORS), "a\n\n\nb  c\t\td   ", "x".join(CONTROLS)]:
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode_with_controls(text) == ids
        assert saved.encode_with_controls(text) == ids
        for skip in (True, False):
            assert saved.decode(ids, skip_special=skip) == reference.decode(ids, skip_special_tokens=skip)


def small_file() -> dict:
    """A tokenizer.json with 256 bytes, two merges and two control tokens, in the middle of whose ids is a gap."""
    letters = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]), *map(chr, range(256, 324))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "added_tokens": [{"id": 300, "content": "<|im_end|>", "special": True}, {"id": 302, "content": "<think>"}],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"<|im_end|>": {"id": "<|im_end|>", "ids": [300], "tokens": ["<|im_end|>"]}},
        },
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "model": {
            "type": "BPE",
            "vocab": {letter: i for i, letter in enumerate(letters)} | {"ab": 290, "abc": 291},
            "merges": [["a", "b"], ["ab", "c"]],
        },
    }


def write(folder: Path, data: dict, settings: dict | None = None) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(data))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("merges", [["a b", "ab c"], [["a", "b"], ["ab", "c"]]], ids=["old", "new"])
def test_either_form_of_merges(tmp_path: Path, merges: list) -> None:
    data = small_file()
    data["model"]["merges"] = merges
    tokenizer = Tokenizer.load(write(tmp_path, data))
    assert tokenizer.encode("abcab<think>")[:2] == [291, 290]
    assert tokenizer.encode_with_controls("ab<think>abc") == [290, 302, 291]
    assert tokenizer.decode(tokenizer.encode("é\0\n ab")) == "é\0\n ab"
    assert tokenizer.vocab_size == 303
    assert tokenizer.eos_ids == (300,)


def test_control_tokens_of_the_settings(tmp_path: Path) -> None:
    decoder = {"301": {"content": "<|audio_pad|>", "special": True}, "300": {"content": "<|im_end|>", "special": True}}
    settings = {"added_tokens_decoder": decoder, "eos_token": {"content": "<think>"}}
    tokenizer = Tokenizer.load(write(tmp_path, small_file(), settings))
    assert tokenizer.control_id("<|audio_pad|>") == 301
    assert tokenizer.hidden(301)
    assert tokenizer.eos_ids == (300, 302)
    for broken in ([1], {"x": {"content": "a"}}, {"5": {}}, {"5": 5}):
        with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
            Tokenizer.load(write(tmp_path, small_file(), {"added_tokens_decoder": broken}))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model["vocab"].pop("a"),
        lambda model: model["vocab"].update({"not a byte": 299}),
        lambda model: model["vocab"].update({"ac": "299"}),
        lambda model: model["vocab"].update({"ac": -1}),
        lambda model: model["vocab"].update({"ac": 1 << 40}),
        lambda model: model["merges"].append(["a", "zz"]),
        lambda model: model["merges"].append(["a"]),
        lambda model: model["merges"].append(7),
        lambda model: model.update(merges=None),
        lambda model: model.update(end_of_word_suffix="</w>"),
    ],
)
def test_broken_models(tmp_path: Path, change: Callable[[dict], object]) -> None:
    data = small_file()
    change(data["model"])
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(write(tmp_path, data))


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
