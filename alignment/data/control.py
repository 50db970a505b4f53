"""Text stays text: user content is tokenized so that it can never become control tokens.

A chat template mixes structure (`<|im_start|>`, ...) with what users wrote. Once rendered, both
are one string, and a tokenizer reads every `<|im_end|>` in it as the end of a turn, whoever wrote
it. Here the two are kept apart:

1. before rendering, each control token spelled out in a message's content is replaced by a word
   that occurs nowhere in the conversation (`protect`);
2. a conversation without such words, which is nearly every one, is tokenized as it is;
3. for the others, the rendered text goes through a private copy of the tokenizer in which control
   tokens have names that occur nowhere in the conversation. The template's are renamed, the
   user's are put back as they were, and the copy reads them as plain text.

The copy is the same tokenizer in every other respect, so what comes out is exactly what the
template asks for, with the user's spelling split into ordinary tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from alignment.data.formats import Message
from alignment.types import AlignmentError, UserInputError


class Tokenizer(Protocol):
    """What the data layer asks of a `transformers` tokenizer."""

    chat_template: Any
    bos_token_id: Any
    eos_token_id: Any

    @property
    def all_special_tokens(self) -> list[str]: ...

    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def convert_tokens_to_ids(self, tokens: str) -> Any: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Protected:
    """Messages whose contents hold no control token, and the nonce of the words that stand in.

    `nonce` is None where nothing had to be replaced.
    """

    messages: list[Message]
    nonce: str | None


class ControlTokens:
    """The control tokens of one tokenizer, and the means to keep them out of content.

    A control token is a special token, or another added token spelled in brackets or used by the
    chat template, such as `<tool_call>`. In an assistant's content the latter are left alone: a
    model writes `<think>` itself, and must be trained on that very token.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        special = {text for text, token in added.items() if token.special}
        special |= set(tokenizer.all_special_tokens)
        template = str(tokenizer.chat_template or "")
        control = special | {text for text in added if _is_structural(text, template)}
        self._ids = {text: int(tokenizer.convert_tokens_to_ids(text)) for text in sorted(control)}
        self._names = list(self._ids)
        self._any = _alternatives(control)
        self._special = _alternatives(special)
        self._copies: dict[str, _PrivateCopy] = {}

    @property
    def ids(self) -> Mapping[str, int]:
        """Every control token and its id."""
        return self._ids

    def protect(self, messages: Sequence[Message]) -> Protected:
        """Replace control tokens in the contents of `messages` by words that occur in none."""
        found = [
            text
            for message in messages
            for text in _strings({k: v for k, v in message.items() if k != "role"})
        ]
        if not any(self._any.search(text) for text in found):
            return Protected(list(messages), None)
        nonce = _unused_nonce("\n".join(found))
        return Protected([self._protect_message(m, nonce) for m in messages], nonce)

    def protect_text(self, text: str) -> tuple[str, str | None]:
        """`protect` for one string that is all content."""
        if not self._any.search(text):
            return text, None
        nonce = _unused_nonce(text)
        return self._replace(text, self._any, nonce), nonce

    def restore(self, text: str, nonce: str | None) -> str:
        """Put the users' spelling back into rendered text."""
        if nonce is None:
            return text
        return _word_pattern(nonce).sub(lambda m: self._names[int(m.group(1))], text)

    def last_special(self, text: str) -> re.Match[str] | None:
        """The last special token in rendered text whose contents are protected."""
        matches = list(self._special.finditer(text))
        return matches[-1] if matches else None

    def encode(self, text: str, nonce: str | None, cuts: Sequence[int] = ()) -> list[list[int]]:
        """Ids of rendered text, in pieces.

        Args:
            text: rendered text whose contents are protected under `nonce`.
            nonce: as `protect` gave it.
            cuts: increasing offsets into `text`, each of which becomes a token boundary.

        Returns:
            One list of ids per piece; `len(cuts) + 1` of them. Where no token straddles a cut,
            they are together the ids of the whole text.
        """
        if nonce is None:
            pieces = _split_whole(self._encode_plain, text, cuts)
            if pieces is not None:
                return pieces
        copy = self._copy(nonce or _unused_nonce(text))
        bounds = [0, *cuts, len(text)]
        parts = [
            self.restore(self._any.sub(lambda m: copy.names[m.group()], text[start:stop]), nonce)
            for start, stop in pairwise(bounds)
        ]
        offsets = [sum(map(len, parts[: i + 1])) for i in range(len(cuts))]
        pieces = _split_whole(copy.encode, "".join(parts), offsets)
        return copy.encode_pieces(parts) if pieces is None else pieces

    def _encode_plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _protect_message(self, message: Message, nonce: str) -> Message:
        pattern = self._special if message.get("role") == "assistant" else self._any
        return {
            key: value if key == "role" else _map_strings(value, pattern, self, nonce)
            for key, value in message.items()
        }

    def _replace(self, text: str, pattern: re.Pattern[str], nonce: str) -> str:
        return pattern.sub(lambda m: f"zq{nonce}t{self._names.index(m.group())}zq", text)

    def _copy(self, nonce: str) -> _PrivateCopy:
        if nonce not in self._copies:
            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise UserInputError(
                    "a text spells out a control token, or a token straddles the border of prompt "
                    "and completion; tokenizing that safely needs the fast version of this "
                    "tokenizer (tokenizer.json). Use it, or remove the row"
                )
            self._copies[nonce] = _PrivateCopy(backend, self._ids, nonce)
        return self._copies[nonce]


class _PrivateCopy:
    """A copy of a tokenizers backend whose control tokens are named after a nonce."""

    def __init__(self, backend: Any, ids: Mapping[str, int], nonce: str) -> None:
        self.names = {text: f"<@{nonce}:{token_id}@>" for text, token_id in ids.items()}
        spec = json.loads(backend.to_str())
        spec |= {"post_processor": None, "truncation": None, "padding": None}
        for token in spec["added_tokens"]:
            token["content"] = self.names.get(token["content"], token["content"])
        _rename_vocabulary(spec["model"], self.names)
        self._backend = type(backend).from_str(json.dumps(spec))
        self._cut_name = f"<@{nonce}:cut@>"
        self._backend.add_special_tokens([self._cut_name])
        self._cut = self._backend.token_to_id(self._cut_name)
        wrong = [t for t, i in ids.items() if self._backend.token_to_id(self.names[t]) != i]
        if wrong:
            raise AlignmentError(f"the tokenizer's copy lost its control tokens {wrong}")

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_pieces(self, parts: Sequence[str]) -> list[list[int]]:
        """Ids of each part, with a forced token boundary between parts."""
        pieces: list[list[int]] = [[]]
        for token_id in self.encode(self._cut_name.join(parts)):
            if token_id == self._cut:
                pieces.append([])
            else:
                pieces[-1].append(token_id)
        return pieces


def _split_whole(
    encode: Callable[[str], list[int]], text: str, cuts: Sequence[int]
) -> list[list[int]] | None:
    """The ids of `text` split at `cuts`; None where a token straddles one of them."""
    whole = encode(text)
    bounds = [0]
    for cut in cuts:
        prefix = encode(text[:cut])
        if whole[: len(prefix)] != prefix:
            return None
        bounds.append(len(prefix))
    bounds.append(len(whole))
    return [whole[start:stop] for start, stop in pairwise(bounds)]


def _is_structural(text: str, template: str) -> bool:
    bracketed = len(text) > 2 and text[0] + text[-1] in ("<>", "[]")
    return bool(text.strip()) and (bracketed or text in template)


def _alternatives(texts: set[str]) -> re.Pattern[str]:
    """Leftmost-longest match of any of `texts`, which is how added tokens are found."""
    longest_first = sorted((t for t in texts if t), key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _unused_nonce(text: str) -> str:
    number = 0
    while f"zq{number}t" in text or f"<@{number}:" in text:
        number += 1
    return str(number)


def _word_pattern(nonce: str) -> re.Pattern[str]:
    return re.compile(rf"zq{nonce}t(\d+)zq")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for pair in value.items() for part in pair for text in _strings(part)]
    if isinstance(value, (list, tuple)):
        return [text for part in value for text in _strings(part)]
    return []


def _map_strings(value: Any, pattern: re.Pattern[str], control: ControlTokens, nonce: str) -> Any:
    if isinstance(value, str):
        return control._replace(value, pattern, nonce)
    if isinstance(value, Mapping):
        return {
            _map_strings(k, pattern, control, nonce): _map_strings(v, pattern, control, nonce)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_map_strings(part, pattern, control, nonce) for part in value]
    return value


def _rename_vocabulary(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename pieces of a tokenizers model (BPE, WordPiece, WordLevel or Unigram), in place."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
