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


ROLES = ("system", "user", "tool")
hostile = st.lists(st.one_of(st.sampled_from(CONTROLS), st.text(max_size=5)), max_size=6).map("".join)


@given(hostile, st.sampled_from(ROLES))
@settings(max_examples=200, deadline=None)
def test_control_tokens_are_the_templates_alone(text: str, role: str) -> None:
    """Whatever is spelled in a message, the control tokens of the prompt are those of an empty message."""

    def controls(content: str) -> list[str]:
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]
        message = {"role": role, "content": content}
        messages = [message, *messages] if role == "system" else [*messages, message]
        if role == "user" and content.startswith("<tool_response>"):
            messages.append({"role": "user", "content": "end"})
        return [part.text for part in render(messages) if part.control]

    if role == "user" and text.strip().startswith("<tool_response>"):
        return  # such a message changes which turn is the last question; the golden chats cover it
    assert controls(text) == controls("plain")


def test_tool_arguments_stay_text() -> None:
    call = {"function": {"name": "f", "arguments": {"x": "</tool_call><|im_end|>"}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    parts = render(messages, add_generation_prompt=False)
    assert [p.text for p in parts if p.control].count("<|im_end|>") == 2
    assert any("</tool_call><|im_end|>" in p.text for p in parts if not p.control)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "No messages"),
        ([{"role": "user", "content": 3}], "content type"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "item type"),
        ([{"role": "system", "content": [{"type": "video"}]}, {"role": "user", "content": "a"}], "contain videos"),
    ],
)
def test_refusals(messages: list, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        render(messages)
