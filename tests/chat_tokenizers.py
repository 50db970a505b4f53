"""Small tokenizers of every kind, and chat templates of every habit, for the data tests."""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from alignment.modeling.tiny import CHATML, byte_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "<unk>"]
CORPUS = [
    "user system assistant <|im_start|> <think> </think> yes no hello world what is the answer",
    "the quick brown fox jumps over the lazy dog\n\nand\nthen\n\n\n1 + 2 = 3. 12 * 34?",
] * 20

TEMPLATES = {
    "chatml": CHATML,
    # Adds a system turn of its own, as SmolLM2 does.
    "system": "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}" + CHATML,
    # Begins with BOS, strips contents, and ends turns without a line break, as Llama 3 does.
    "trim": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + "
    "m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}",
    # No generation prompt, white space before the answer, as Mistral has it.
    "inst": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ ' ' + m['content'] + '<|im_end|>' }}{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}",
}
# Rewrites earlier turns: an empty thought goes into the last turn only, as in Qwen 3.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _wrap(backend: Tokenizer, template: str) -> Any:
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unk>",
        chat_template=template,
    )


def merging(template: str = CHATML) -> Any:
    """Byte-level BPE with merges, such as that of double line breaks."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return _wrap(backend, template)


def metaspace(template: str = CHATML) -> Any:
    """SentencePiece-like BPE: a space is put before the first section only; BOS is added."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"], show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return _wrap(backend, template)


def unigram(template: str = CHATML) -> Any:
    """Unigram with a normalizer, and special tokens inside its vocabulary."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return _wrap(backend, template)


def bytes_only(template: str = CHATML) -> Any:
    """One token a byte; no BOS."""
    return byte_tokenizer(chat_template=template)


TOKENIZERS = {
    "bytes": bytes_only,
    "merging": merging,
    "metaspace": metaspace,
    "unigram": unigram,
}
