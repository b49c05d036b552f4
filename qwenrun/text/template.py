"""The chat template of Qwen3.5 and 3.6, rendered by hand: a conversation as text and control tokens, kept apart.

The models' own template is a Jinja file; this renders the same, character for character (the golden chats in
tests/golden hold it to that), without running a template that came with a download, and knowing which
`<tool_call>` the template wrote and which a user typed. Knows no token ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qwenrun.errors import UsageError

Message = Mapping[str, Any]

CONTROLS = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CONTROL = re.compile("(" + "|".join(map(re.escape, CONTROLS)) + ")")

# What the models were trained to see before and after the list of tools.
_TOOLS_HEAD = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
_TOOLS_TAIL = """
</tools>

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not tell \
the user about function calls
</IMPORTANT>"""


class Part(NamedTuple):
    """A piece of a prompt: ordinary text, or one control token by its spelling."""

    text: str
    control: bool = False


def to_text(parts: Iterable[Part]) -> str:
    """The prompt as the model's own template would print it."""
    return "".join(part.text for part in parts)


def render(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    enable_thinking: bool | None = None,
    thinking_default: bool = True,
    add_vision_id: bool = False,
    json_scalars: bool = False,
) -> list[Part]:
    """Render a conversation.

    messages: mappings with `role` (system, user, assistant, tool) and `content` (a text, or a list of
        {"type": "text", "text": ...}, {"type": "image"}, {"type": "video"}); assistant messages may have
        `reasoning_content` and `tool_calls` ({"function": {"name", "arguments": a mapping}}).
    tools: JSON objects that describe functions.
    enable_thinking: whether the answer begins inside an open think block; None leaves it to `thinking_default`
        (True for the models from 4B on).
    add_vision_id: number images and videos in the text.
    json_scalars: numbers, booleans and nulls in tool arguments as JSON (3.6), not as Python prints them (3.5).

    Reasoning is kept in assistant messages after the last user message, and dropped from those before. In an
    assistant's content everything up to a `</think>` is taken for its reasoning. Raises UsageError with the
    template's own words where it refuses a conversation.
    """
    return _Renderer(add_vision_id, json_scalars).conversation(
        messages, tools, add_generation_prompt, thinking_default if enable_thinking is None else enable_thinking
    )


class _Renderer:
    def __init__(self, add_vision_id: bool, json_scalars: bool) -> None:
        self.add_vision_id = add_vision_id
        self.json_scalars = json_scalars
        self.images = self.videos = 0
        self.parts: list[Part] = []

    def own(self, text: str) -> None:
        """The template's words: control tokens in them are meant."""
        self.parts += [Part(piece, piece in CONTROLS) for piece in _CONTROL.split(text) if piece]

    def theirs(self, parts: list[Part]) -> None:
        self.parts += [part for part in parts if part.text]

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, generate: bool, think: bool
    ) -> list[Part]:
        if not messages:
            raise UsageError("No messages provided.")
        for index, message in enumerate(messages):
            _require(message, Mapping, f"message {index}")
        for tool in _require(tools or [], Sequence, "tools"):
            _require(tool, Mapping, "a tool")
        self.system(messages[0], tools)
        last_query = self.last_query(messages)
        for index, message in enumerate(messages):
            role = message.get("role")
            if role == "system":
                if index:
                    raise UsageError("System message must be at the beginning.")
            elif role == "user":
                self.own("<|im_start|>user\n")
                self.theirs(_strip(self.content(message.get("content"))))
                self.own("<|im_end|>\n")
            elif role == "assistant":
                self.assistant(message, index > last_query)
            elif role == "tool":
                if index and messages[index - 1].get("role") != "tool":
                    self.own("<|im_start|>user")
                self.own("\n<tool_response>\n")
                self.theirs(_strip(self.content(message.get("content"))))
                self.own("\n</tool_response>")
                if index + 1 == len(messages) or messages[index + 1].get("role") != "tool":
                    self.own("<|im_end|>\n")
            else:
                raise UsageError("Unexpected message role.")
        if generate:
            self.own("<|im_start|>assistant\n<think>\n" + ("" if think else "\n</think>\n\n"))
        return self.parts

    def system(self, first: Message, tools: Sequence[Mapping[str, Any]] | None) -> None:
        is_system = first.get("role") == "system"
        content = _strip(self.content(first.get("content"), in_system=True)) if is_system else []
        if not tools and not is_system:
            return
        self.own("<|im_start|>system\n")
        if tools:
            self.own(_TOOLS_HEAD)
            for tool in tools:
                self.theirs([Part("\n" + _json(tool))])
            self.own(_TOOLS_TAIL)
            if to_text(content):
                self.own("\n\n")
        self.theirs(content)
        self.own("<|im_end|>\n")

    def last_query(self, messages: Sequence[Message]) -> int:
        """Index of the last user message that is not just a tool's response."""
        for index in range(len(messages) - 1, -1, -1):
            if messages[index].get("role") == "user":
                counter = _Renderer(False, False)
                text = to_text(_strip(counter.content(messages[index].get("content"))))
                if not (text.startswith("<tool_response>") and text.endswith("</tool_response>")):
                    return index
        raise UsageError("No user query found in messages.")

    def assistant(self, message: Message, after_query: bool) -> None:
        parts = _strip(self.content(message.get("content")))
        content = to_text(parts)
        reasoning = message.get("reasoning_content")
        if not isinstance(reasoning, str):
            reasoning = ""
            if "</think>" in content:
                before, _, content = content.rpartition("</think>")
                reasoning = before.partition("</think>")[0].rstrip("\n").rpartition("<think>")[2].lstrip("\n")
                content = content.lstrip("\n")
                parts = [Part(content)]
        self.own("<|im_start|>assistant\n")
        if after_query:
            self.own("<think>\n")
            self.theirs([Part(reasoning.strip())])
            self.own("\n</think>\n\n")
        self.theirs(parts)
        for number, call in enumerate(_require(message.get("tool_calls") or [], Sequence, "tool_calls")):
            self.tool_call(call, "\n" if number else "\n\n" if content.strip() else "")
        self.own("<|im_end|>\n")

    def tool_call(self, call: Mapping[str, Any], before: str) -> None:
        call = _require(call, Mapping, "a tool call")
        call = _require(call.get("function", call), Mapping, "a tool call's function")
        self.own(before + "<tool_call>\n<function=")
        self.theirs([Part(_require(call.get("name"), str, "a tool call's name"))])
        self.own(">\n")
        arguments = call.get("arguments", {})
        if not isinstance(arguments, Mapping):
            raise UsageError("Can only get item pairs from a mapping.")
        for key, value in arguments.items():
            self.own("<parameter=")
            self.theirs([Part(_require(key, str, "an argument's name"))])
            self.own(">\n")
            self.theirs([Part(self.argument(value))])
            self.own("\n</parameter>\n")
        self.own("</function>\n</tool_call>")

    def argument(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        return _json(value) if self.json_scalars or isinstance(value, Mapping | list | tuple) else str(value)

    def content(self, content: Any, in_system: bool = False) -> list[Part]:
        """A message's content; images and videos are placeholders of one pad each."""
        if content is None:
            return []
        if isinstance(content, str):
            return [Part(content)]
        if not isinstance(content, Sequence):
            raise UsageError("Unexpected content type.")
        out: list[Part] = []
        for item in content:
            kind = item.get("type") if isinstance(item, Mapping) else None
            for name in ("image", "video"):
                if kind == name or (isinstance(item, Mapping) and (name in item or f"{name}_url" in item)):
                    if in_system:
                        raise UsageError(f"System message cannot contain {name}s.")
                    out += self.vision(name)
                    break
            else:
                if not isinstance(item, Mapping) or not isinstance(item.get("text"), str):
                    raise UsageError("Unexpected item type in content.")
                out.append(Part(item["text"]))
        return out

    def vision(self, name: str) -> list[Part]:
        if name == "image":
            self.images += 1
        else:
            self.videos += 1
        label = f"Picture {self.images}: " if name == "image" else f"Video {self.videos}: "
        pads = [Part(f"<|{x}|>", control=True) for x in ("vision_start", f"{name}_pad", "vision_end")]
        return [Part(label), *pads] if self.add_vision_id else pads


def _strip(parts: list[Part]) -> list[Part]:
    """White space off both ends of the whole."""
    parts = list(parts)
    while parts and not parts[0].control and not parts[0].text.strip():
        del parts[0]
    while parts and not parts[-1].control and not parts[-1].text.strip():
        del parts[-1]
    if parts and not parts[0].control:
        parts[0] = Part(parts[0].text.lstrip())
    if parts and not parts[-1].control:
        parts[-1] = Part(parts[-1].text.rstrip())
    return parts


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"a tool or an argument can't be written as JSON: {error}") from error


_NAMES: dict[type, str] = {Mapping: "an object", Sequence: "a list", str: "a text"}


def _require(value: Any, kind: type, what: str) -> Any:
    """`value`, if it is of that kind (a text is no list)."""
    if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str | bytes)):
        raise UsageError(f"{what} is not {_NAMES[kind]}: {value!r:.80}")
    return value
