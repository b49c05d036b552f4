"""The tokenizer of a model folder: byte-level BPE from its `tokenizer.json`, with control tokens kept apart.

Ordinary text is encoded by a tokenizer that does not know the control tokens, so `<|im_start|>` or `<think>`
spelled in a message, a file or a tool's result is just text. Control tokens enter by name, where the chat
template places them. No token id is written down here: models of the family differ in them.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenrun.errors import ModelError, UsageError
from qwenrun.text.template import Part

if TYPE_CHECKING:
    import tokenizers

_MAX_BYTES = 256 << 20
# A turn ends with either, whatever a config says (some files name only one of them).
END_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Tokenizer:
    """Text to ids and back.

    vocab_size: one more than the highest id; a model's rows from there on are padding.
    eos_ids: the control tokens that end a turn.
    """

    def __init__(
        self, plain: tokenizers.Tokenizer, base_size: int, controls: dict[str, tuple[int, bool]], eos: str | None
    ) -> None:
        """plain: a tokenizer without control tokens, whose ids are below base_size. controls: {spelling: (id, is
        it hidden in text)}."""
        self._plain = plain
        self._ids = {spelling: number for spelling, (number, _) in controls.items()}
        self._controls = {number: spelling for spelling, (number, _) in controls.items()}
        self._hidden = {number for number, hidden in controls.values() if hidden}
        self.vocab_size = max([base_size - 1, *self._controls]) + 1
        ends = dict.fromkeys([*END_TOKENS, *([eos] if eos else [])])
        self.eos_ids = tuple(self._ids[spelling] for spelling in ends if spelling in self._ids)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, and from `tokenizer_config.json` the end token and control tokens that only it
        lists. Raises ModelError."""
        import tokenizers

        path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
        data = _read_object(path)
        settings = _read_object(settings_path) if settings_path.is_file() else {}
        controls = _controls(settings_path, _listed(settings.get("added_tokens_decoder", {})))
        controls |= _controls(path, data.get("added_tokens", []))
        model = data.get("model")
        if not isinstance(model, dict) or not _is_byte_level(data, model):
            raise ModelError(f"{path} is not a byte-level BPE tokenizer", hint="download the file again")
        # A post-processor adds tokens around a text; a conversation places its own. The model is handed over as
        # it was parsed: written out again for the library to read, it takes twice the time and memory.
        shell = {key: data.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
        shell["model"] = {"type": "BPE", "vocab": {}, "merges": []}
        try:
            plain = tokenizers.Tokenizer.from_str(json.dumps(shell))
            plain.model = tokenizers.models.BPE(
                vocab=model["vocab"],
                merges=[tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]],
                ignore_merges=bool(model.get("ignore_merges")),
            )
            base_size = max(model["vocab"].values()) + 1
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path} can't be used: {error!r}", hint="download the file again") from error
        eos = settings.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
        return cls(plain, base_size, controls, eos if isinstance(eos, str) else None)

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; the spelling of a control token is text like any other. UsageError if the text
        has half a surrogate pair, which is how undecodable bytes arrive."""
        try:
            return self._plain.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            if not isinstance(text, str):
                raise
            raise UsageError("the text is not Unicode: it has lone surrogates", hint="save it as UTF-8") from error

    def encode_with_controls(self, text: str) -> list[int]:
        """Ids of text in which spelled control tokens are meant: a prompt that was rendered elsewhere."""
        return self.encode_parts(
            Part(piece, piece in self._ids) for piece in self._control_pattern.split(text) if piece
        )

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else r"(?!)")

    def encode_parts(self, parts: Iterable[Part]) -> list[int]:
        """Ids of a rendered conversation. Text between two control tokens is encoded as one piece."""
        ids: list[int] = []
        text: list[str] = []
        for part in [*parts, Part("", control=True)]:
            if not part.control:
                text.append(part.text)
                continue
            if text:
                ids += self.encode("".join(text))
                text.clear()
            if part.text:
                ids.append(self.control_id(part.text))
        return ids

    def control_id(self, spelling: str) -> int:
        """The id of a control token; ModelError if this model has none of that spelling."""
        if spelling not in self._ids:
            raise ModelError(f"the model's tokenizer has no control token {spelling}")
        return self._ids[spelling]

    def control(self, token: int) -> str | None:
        """The spelling of a control token, None for an ordinary one."""
        return self._controls.get(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes an ordinary token stands for, or a control token's spelling; b"" for an id without one."""
        if token in self._controls:
            return self._controls[token].encode()
        piece = self._plain.id_to_token(token) if 0 <= token < self.vocab_size else None
        return bytes(_BYTE_OF[c] for c in piece) if piece is not None else b""

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. skip_special leaves `hidden` tokens out."""
        shown = (self.token_bytes(i) for i in ids if not (skip_special and i in self._hidden))
        return b"".join(shown).decode("utf-8", "replace")

    def hidden(self, token: int) -> bool:
        """True for control tokens that are never shown, such as `<|im_end|>` (`<think>` is not one of them)."""
        return token in self._hidden


class Detokenizer:
    """Text of one token after another: a character appears when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """What became printable with `token`. Hidden control tokens print nothing, others their spelling."""
        if self._tokenizer.hidden(token):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left: U+FFFD if the text ends inside a character."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _read_object(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ModelError(f"{path}: {size:,} bytes is too large for a tokenizer")
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing", hint="copy the tokenizer's files of the model there") from error
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}", hint="download the file again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} is not a JSON object", hint="download the file again")
    return data


def _listed(decoder: Any) -> Any:
    """`added_tokens_decoder`, {"id": token without id}, as a list of tokens."""
    if not isinstance(decoder, dict):
        return decoder
    return [
        {**token, "id": int(number)} if isinstance(token, dict) and re.fullmatch("[0-9]{1,9}", number) else token
        for number, token in decoder.items()
    ]


def _controls(path: Path, added: Any) -> dict[str, tuple[int, bool]]:
    """{spelling: (id, is it hidden in text)} of a list of added tokens."""
    controls = {}
    for token in added if isinstance(added, list) else [added]:
        fields = token if isinstance(token, dict) else {}
        content, number = fields.get("content"), fields.get("id")
        if not isinstance(content, str) or not content or type(number) is not int or not 0 <= number < 1 << 24:
            raise ModelError(f"{path}: {str(token)[:200]!r} is not an added token", hint="download the file again")
        controls[content] = (number, bool(fields.get("special")))
    return controls


def _is_byte_level(data: dict[str, Any], model: dict[str, Any]) -> bool:
    """Whether the file is BPE over all 256 bytes and nothing else, so that every text has ids and comes back."""
    vocab = model.get("vocab")
    return (
        model.get("type") == "BPE"
        and isinstance(vocab, dict)
        and isinstance(model.get("merges"), list)
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and "ByteLevel" in json.dumps([data.get("pre_tokenizer"), data.get("decoder")])
        and vocab.keys() >= _BYTE_OF.keys() >= set("".join(vocab))
    )


def _byte_alphabet() -> dict[str, int]:
    """The printable characters that byte-level BPE vocabularies write bytes as: printable Latin-1 as itself, the
    others from U+0100 on, in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
