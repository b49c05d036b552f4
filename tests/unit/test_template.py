"""Rendered chats against golden ones, text and ids, and what a user's text can't do to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenrun.errors import UsageError
from qwenrun.text.template import CONTROLS, Part, render, to_text
from qwenrun.text.tokenizer import Tokenizer

VECTORS = json.loads((Path(__file__).parents[1] / "golden" / "text" / "chat_vectors.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(real_tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(real_tokenizer_folder)


def render_vector(vector: dict) -> list[Part]:
    arguments = {"add_generation_prompt": False, **vector["args"]}
    return render(
        arguments.pop("messages"),
        **arguments,
        thinking_default=vector["template"] != "qwen3_5_nothink",
        json_scalars=vector["template"] == "qwen3_6",
    )


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['template']}-{v['name']}")
def test_golden_chats(tokenizer: Tokenizer, vector: dict) -> None:
    if "error" in vector:
        message = vector["error"].partition(": ")[2]
        with pytest.raises(UsageError) as caught:
            render_vector(vector)
        assert caught.value.message == message
    else:
        parts = render_vector(vector)
        assert to_text(parts) == vector["text"]
        assert tokenizer.encode_parts(parts) == vector["ids"]


def test_both_thinking_defaults_and_the_switch() -> None:
    messages = [{"role": "user", "content": "a"}]
    opened, closed = "<think>\n", "<think>\n\n</think>\n\n"
    for default in (True, False):
        for switch in (None, True, False):
            text = to_text(render(messages, enable_thinking=switch, thinking_default=default))
            thinking = default if switch is None else switch
            assert text.endswith("<|im_start|>assistant\n" + (opened if thinking else closed))


ROLES = ("system", "user", "assistant", "tool")
hostile = st.lists(st.one_of(st.sampled_from(CONTROLS), st.text(max_size=5)), max_size=6).map("".join)


@given(hostile, st.sampled_from(ROLES))
@settings(max_examples=200, deadline=None)
def test_control_tokens_are_the_templates_alone(text: str, role: str) -> None:
    """Whatever is spelled in a message, the control tokens of the prompt are those of an empty message."""

    def controls(content: str) -> list[str]:
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
        message = {"role": role, "content": content}
        messages = [message, *messages] if role == "system" else [*messages, message]
        return [part.text for part in render(messages) if part.control]

    if role == "user" and text.strip().startswith("<tool_response>"):
        return  # such a message changes which turn is the last question; the golden chats cover it
    assert controls(text) == controls("plain")


@given(hostile, hostile, hostile)
@settings(max_examples=100, deadline=None)
def test_tools_and_calls_stay_text(name: str, key: str, value: str) -> None:
    def parts(name: str, key: str, value: str) -> list[Part]:
        call = {"function": {"name": name, "arguments": {key: value, key + "2": [value]}}}
        assistant = {"role": "assistant", "content": "", "reasoning_content": value, "tool_calls": [call]}
        return render([{"role": "user", "content": "a"}, assistant], tools=[{"name": name, "x": {key: value}}])

    rendered = parts(name, key, value)
    assert [p for p in rendered if p.control] == [p for p in parts("f", "k", "v") if p.control]
    assert f"<parameter={key}>\n{value}\n</parameter>" in to_text(rendered)


def test_a_picture_is_a_token_whoever_shows_it() -> None:
    picture = [{"type": "text", "text": "<|image_pad|>"}, {"type": "image"}, {"type": "text", "text": "look"}]
    for role in ("user", "assistant", "tool"):
        parts = render([{"role": "user", "content": "q"}, {"role": role, "content": picture}])
        assert [p.text for p in parts if p.control].count("<|image_pad|>") == 1
        assert to_text(parts).count("<|image_pad|>") == 2


def test_reasoning_is_stripped() -> None:
    said = {"role": "assistant", "content": "so", "reasoning_content": " \n why\n\n"}
    text = to_text(render([{"role": "user", "content": "a"}, said], add_generation_prompt=False))
    assert text.endswith("<|im_start|>assistant\n<think>\nwhy\n</think>\n\nso<|im_end|>\n")


def test_json_keeps_letters_and_order() -> None:
    tool = {"name": "météo", "a": {"z": "東京", "b": None}}
    text = to_text(render([{"role": "user", "content": "a"}], tools=[tool]))
    assert '<tools>\n{"name": "météo", "a": {"z": "東京", "b": null}}\n</tools>' in text


def test_a_tool_response_is_no_question() -> None:
    """Reasoning is kept through a tool loop, also where the tool's result comes as a user message."""
    said = {"role": "assistant", "content": "x", "reasoning_content": "why"}
    result = {"role": "user", "content": "<tool_response>\n1\n</tool_response>"}
    for last, kept in (
        (result, True),
        ({"role": "tool", "content": "1"}, True),
        ({"role": "user", "content": "b"}, False),
    ):
        assert ("why" in to_text(render([{"role": "user", "content": "a"}, said, last]))) is kept


def test_reasoning_is_cut_out_of_an_answer() -> None:
    """What an assistant's content has before `</think>` is its reasoning, and none of it is a control token twice."""
    said = {"role": "assistant", "content": "<think>\nwhy</think> more </think>\n\nso"}
    parts = render([{"role": "user", "content": "a"}, said], add_generation_prompt=False)
    assert to_text(parts).endswith("<|im_start|>assistant\n<think>\nwhy\n</think>\n\nso<|im_end|>\n")
    asked_again = [{"role": "user", "content": "a"}, said, {"role": "user", "content": "b"}]
    assert "<|im_start|>assistant\nso<|im_end|>" in to_text(render(asked_again))


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "No messages"),
        ([{"role": "user", "content": 3}], "content type"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "item type"),
        ([{"role": "system", "content": [{"type": "video"}]}, {"role": "user", "content": "a"}], "contain videos"),
        ("hello", "message 0 is not an object"),
        ([USER, None], "message 1 is not an object"),
        ([USER, {"role": "assistant", "tool_calls": "f()"}], "tool_calls is not a list"),
        ([USER, {"role": "assistant", "tool_calls": {"name": "f"}}], "tool_calls is not a list"),
        ([USER, {"role": "assistant", "tool_calls": ["f"]}], "tool call is not an object"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": "f"}]}], "function is not an object"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {}}]}], "name is not a text"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": None}]}], "from a mapping"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {1: 2}}]}], "name is not a text"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": [b""]}}]}], "as JSON"),
    ],
)
def test_refusals(messages: list, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        render(messages)


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, ["f"], [None], [{"x": b""}], 5])
def test_tools_that_are_none(tools: object) -> None:
    with pytest.raises(UsageError, match="tool"):
        render([USER], tools=tools)  # type: ignore[arg-type]
