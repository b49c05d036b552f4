"""Trains the demo's byte-level BPE: the construction of the real Qwen3.5 tokenizer with 1,500 base tokens.

Same normaliser (NFC), same split pattern (digits apart, combining marks joined to letters), same 33 added
tokens with the same spellings and order behind the base vocabulary. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qwenrun.demo import dataset

BASE_TOKENS = 1500
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    *("<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>"),
    *("</tool_response>", "<think>", "</think>", "<|audio_start|>", "<|audio_end|>", "<tts_pad>"),
    *("<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>"),
)
# Plain added tokens: kept when special tokens are skipped in decoding.
NOT_SPECIAL = frozenset(
    text
    for text in ADDED_TOKENS
    if text.startswith(("<|fim_", "<|repo_", "<|file_", "<tool_", "</tool_", "<think", "</think"))
)


def corpus(conversations: int = 30_000) -> Iterable[str]:
    """What the merges are learned on: message texts of a training stream (no chat markup)."""
    for messages in islice(dataset.Sampler(seed=7), conversations):
        for message in messages:
            yield message.content
            if message.thinking:
                yield message.thinking
    yield "system\nuser\nassistant\n" * 2000


def train_tokenizer() -> Tokenizer:
    """The demo's tokenizer, made anew; deterministic."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    if tokenizer.get_vocab_size() != BASE_TOKENS:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} base tokens, {BASE_TOKENS} were asked for")
    tokenizer.add_tokens([AddedToken(text, special=text not in NOT_SPECIAL, normalized=False) for text in ADDED_TOKENS])
    return tokenizer
