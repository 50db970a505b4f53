"""A padding token that is nothing else, for whoever finds a row's end by looking for padding."""

from __future__ import annotations

import copy
import logging
from typing import Any

logger = logging.getLogger(__name__)


def give_own_padding(tokenizer: Any, n_embeddings: int) -> Any:
    """A copy of `tokenizer` whose padding token ends no text.

    Where padding is EOS, or a token that the chat template writes, a search for the last token that
    is not padding stops before the one that ends the text. Another of the tokenizer's special
    tokens takes its place: one that is neither of them nor BOS, by preference one called padding,
    or the unknown token. The vocabulary stays as it is; where it has no such token there is a
    warning, and padding stays what it was.

    Args:
        n_embeddings: the model's tokens; those beyond have no embedding.
    """
    own = copy.deepcopy(tokenizer)
    written = str(own.chat_template or "")
    padding = own.pad_token
    if padding is not None and own.pad_token_id != own.eos_token_id and padding not in written:
        return own
    spare = _spare_tokens(own, n_embeddings)
    if not spare:
        logger.warning(
            "the tokenizer pads with %s, which also ends texts, and has no other token for it: in "
            "padded batches, AutoModelForSequenceClassification would read the token before the "
            "last. Score one row at a time there, or add a padding token to the base model",
            padding,
        )
        return own
    own.pad_token = spare[0]
    return own


def _spare_tokens(tokenizer: Any, n_embeddings: int) -> list[str]:
    """Special tokens that no text contains, the likeliest padding first."""
    written = str(tokenizer.chat_template or "")
    special = {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token_id < n_embeddings and token.content not in written
    }
    for taken in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        special.pop(taken, None)
    unknown = tokenizer.unk_token

    def rank(token_id: int) -> tuple[bool, bool, int]:
        return "pad" not in special[token_id].lower(), special[token_id] != unknown, token_id

    return [special[token_id] for token_id in sorted(special, key=rank)]
