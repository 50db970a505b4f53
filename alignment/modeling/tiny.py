"""A tiny random causal LM with a byte-level chat tokenizer, for runs that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from alignment.types import UserInputError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What a family's configuration class calls width, depth and context where it differs from llama.
_FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}


def build_tiny(
    directory: str | Path,
    *,
    seed: int = 0,
    family: str = "llama",
    hidden_size: int = 64,
    layers: int = 2,
    context: int = 1024,
) -> Path:
    """Save a random model with its tokenizer, chat template and generation config.

    The vocabulary is the 256 bytes (ids 0 to 255) and four special tokens, with ChatML turns that
    end in `<|im_end|>`. Equal arguments give equal weights. The global random state is left as it
    was.

    Args:
        directory: made if it does not exist.
        seed: of the weights.
        family: a `transformers` model type: llama, qwen2, qwen3, mistral or gemma3_text.
        hidden_size: a multiple of 16; heads are 16 wide.
        layers: number of decoder layers.
        context: longest sequence in tokens.

    Raises:
        UserInputError: an unknown family, or a hidden size that 16 does not divide.
    """
    if family not in _FAMILY_OPTIONS:
        raise UserInputError(f"unknown family {family!r}; known: {', '.join(_FAMILY_OPTIONS)}")
    if hidden_size < 16 or hidden_size % 16:
        raise UserInputError(f"hidden_size {hidden_size} is not a positive multiple of 16")
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(context=context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _random_model(tokenizer, family, hidden_size, layers, context)
    config_class: Any = GenerationConfig
    model.generation_config = config_class(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def byte_tokenizer(*, context: int = 1024, chat_template: str = CHATML) -> Any:
    """A tokenizer whose token i below 256 is byte i, with `SPECIAL_TOKENS` after them."""
    letters = _byte_letters()
    vocabulary = {letter: byte for byte, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
    )
    tokenizer_class: Any = PreTrainedTokenizerFast
    return tokenizer_class(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
        chat_template=chat_template,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _random_model(tokenizer: Any, family: str, hidden_size: int, layers: int, context: int) -> Any:
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden_size // 16,
            "num_key_value_heads": max(1, hidden_size // 32),
            "max_position_embeddings": context,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | _FAMILY_OPTIONS[family],
    )
    auto: Any = AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.float32)


def _byte_letters() -> list[str]:
    """The printable character that byte-level BPE writes for each of the 256 bytes, in order.

    Printable Latin-1 bytes stand for themselves; the others get the characters from 256 on, in
    order (Radford et al., 2019, GPT-2).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
