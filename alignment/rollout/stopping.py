"""When a completion ends: end tokens, stop strings, and the room there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.types import Prompt, SamplingParams, UserInputError

# Tokens decoded before a possible match, so that decoders which treat the first token of a text
# differently, or a character spread over several tokens, cannot touch the match itself.
_MARGIN_TOKENS = 8


@dataclass(frozen=True, slots=True)
class StopRule:
    """Says whether the tokens so far are complete; the token that completes them is kept.

    token_ids: ids that end a completion (several are common: end of turn and end of text).
    strings:   texts that end it, looked for in the decoded text, special tokens included.
    """

    token_ids: frozenset[int]
    strings: tuple[str, ...]
    tokenizer: Any

    def is_complete(self, tokens: Sequence[int]) -> bool:
        """True if the last token is an end token or completes a stop string.

        Called after every token, so a match can only end inside the last token's text: decoding
        as many tokens as the longest stop string has bytes is enough, whatever the length so far.
        """
        if tokens[-1] in self.token_ids:
            return True
        if not self.strings:
            return False
        longest = max(len(string.encode()) for string in self.strings)
        tail = list(tokens[-(longest + _MARGIN_TOKENS) :])
        text = self.tokenizer.decode(tail, skip_special_tokens=False)
        return any(string in text for string in self.strings)


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a completion unless the user names others: those of the model's generation
    config, and the tokenizer's end token."""
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for owner in (generation, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if isinstance(ids, int):
            found.add(ids)
        elif isinstance(ids, Iterable):
            found.update(int(i) for i in ids)
    return frozenset(found)


def completion_limit(prompt: Prompt, params: SamplingParams, context: int | None) -> int:
    """How many tokens may follow this prompt: `max_new_tokens`, or what the context leaves.

    Raises:
        UserInputError: an empty prompt, or one that leaves no room for a single token.
    """
    length = len(prompt.token_ids)
    if length == 0:
        raise UserInputError(f"prompt {prompt.index} has no tokens; give it at least one")
    room = params.max_new_tokens if context is None else context - length
    if room < 1:
        raise UserInputError(
            f"prompt {prompt.index} has {length} tokens, which leaves no room in the model's "
            f"context of {context}; shorten or drop it"
        )
    return min(room, params.max_new_tokens)
