"""Turn a GGUF file into a plain model directory that loads in a second."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from alignment.types import AlignmentError

logger = logging.getLogger(__name__)

# The tokens the converted model is compared on: any ids that every vocabulary has.
_PROBE = tuple(range(5, 37))
_TOLERANCE = 1e-4


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Write the weights, tokenizer, chat template and generation config of `gguf` to `directory`.

    The dequantized weights are kept in float32: 4-bit blocks with float16 scales are not
    representable in bfloat16, so the converted model gives the logits of the GGUF file (atol
    1e-4, checked here on the files as written), at 4 bytes per parameter.

    Raises:
        AlignmentError: the directory, loaded again, does not give the logits of the GGUF file.
    """
    logger.info("converting %s; this takes about 20 seconds, once", gguf.name)
    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    _restore_pre_tokenizer(tokenizer, gguf)
    tokenizer.model_max_length = model.config.max_position_embeddings
    expected = _logits(model)
    _forget_quantization(model)
    config_class: Any = GenerationConfig
    model.generation_config = config_class(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    found = _logits(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32))
    error = (found - expected).abs().max().item()
    if not error <= _TOLERANCE:
        raise AlignmentError(
            f"{gguf.name}, converted, gives logits that differ from the file's by {error:.2g}"
        )


def _forget_quantization(model: Any) -> None:
    """The weights are dequantized in memory; without this `save_pretrained` refuses them."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.quantization_method = None
    model.is_quantized = False


def _restore_pre_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Split digits one by one where the file asks for it, which transformers' reader overlooks.

    GGUF names the pre-tokenizer in `tokenizer.ggml.pre`; "smollm" means that every digit stands
    alone before the GPT-2 split applies. Without it "\\n\\n1" loses its double-newline token, and
    the model sees token sequences it was not trained on.
    """
    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=torch.tensor([_PROBE]), use_cache=False).logits
    return logits.float()
