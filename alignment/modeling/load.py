"""Load tokenizers and causal language models, with or without LoRA, and hash them."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from alignment.modeling.cast import cast_parameters
from alignment.modeling.catalog import catalog, resolve
from alignment.modeling.hashes import tensors_hash
from alignment.modeling.linear_cpu import replace_linears
from alignment.modeling.rms_norm import replace_rms_norms
from alignment.modeling.rotary_cpu import replace_rotary
from alignment.modeling.template_file import BUILT_IN, template_file
from alignment.modeling.tiny import CHATML
from alignment.types import UserInputError

logger = logging.getLogger(__name__)

# A progress bar of transformers' for each file loaded or saved says nothing here.
_hide_progress_bars: Any = disable_progress_bar
_hide_progress_bars()

Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """Low-rank adaptation (Hu et al., 2021): W + (alpha / rank) B A, with A and B trained.

    rank:    of the update.
    alpha:   its scale; twice the rank if left out.
    dropout: on the adapter's input, in training.
    targets: names of the linear layers to adapt, or "all-linear": all but the output head.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserInputError(f"lora.rank is {self.rank}; give 1 or more")
        if not 0.0 <= self.dropout < 1.0:
            raise UserInputError(f"lora.dropout is {self.dropout}; give 0 to below 1")
        if not self.targets:
            raise UserInputError("lora.targets is empty; name layers, or use all-linear")


def load_tokenizer(
    path: str | Path,
    *,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> Any:
    """The tokenizer of a model, with a padding token.

    Args:
        path: catalogue name, directory or hub id.
        chat_template: replaces the model's: a Jinja file, the text of a template, or "chatml".
        trust_remote_code: run code that comes with the model.
        revision: of a hub id.

    Raises:
        UserInputError: it cannot be loaded, or has no EOS token.
    """
    source = resolve(str(path))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, revision=revision
        )
    except Exception as error:
        raise UserInputError(cannot_load("tokenizer", path, error)) from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    if tokenizer.eos_token_id is None:
        raise UserInputError(
            f"the tokenizer of {str(path)!r} has no EOS token, so completions could never end; set "
            "eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        # Any id would do: masks come from lengths, never from ids.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    path: str | Path,
    *,
    dtype: str = "float32",
    attention: Attention = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    lora: LoraOptions | None = None,
    seed: int = 0,
) -> nn.Module:
    """A causal language model in eval mode, ready to be trained.

    A directory that holds a peft adapter gives its base model with that adapter on it, trainable:
    training goes on with the adapter. `lora` may then be given only if it describes that adapter.
    A fresh adapter would need a merged base, which a saved adapter could not refer to.

    Args:
        path: catalogue name, directory or hub id.
        dtype: float32, bfloat16 or float16, of weights and adapters alike.
        attention: implementation; `auto` is the best one that is installed.
        trust_remote_code: run code that comes with the model.
        revision: of a hub id.
        lora: train a low-rank adapter, and nothing else.
        seed: of the adapter's initial weights.

    Raises:
        UserInputError: the model cannot be found or loaded, weights are missing from its files,
            or the adapter fits no layer.
    """
    if dtype not in DTYPES:
        raise UserInputError(f"model dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")
    source = resolve(str(path))
    adapter = Path(source) if is_adapter(source) else None
    base_path = source if adapter is None else base_of(adapter)
    model = _load_base(base_path, DTYPES[dtype], attention, trust_remote_code, revision)
    if adapter is not None:
        model = _with_adapter(model, adapter)
        if lora is not None:
            _refuse_other_adapter(model, lora, str(path))
    elif lora is not None:
        model = add_lora(model, lora, seed=seed, base_name=portable_name(path, source))
    return model


def add_lora(
    model: nn.Module,
    lora: LoraOptions,
    *,
    seed: int,
    base_name: str | None = None,
    task_type: str = "CAUSAL_LM",
) -> nn.Module:
    """`model` with a fresh adapter, in the model's dtype; everything else is frozen.

    The adapter starts as the zero function. The global random state is left as it was. A saved
    adapter names `base_name` as the model it belongs to; where that is None, the model's own name.

    Raises:
        UserInputError: no layer has a target's name, the target is a tied embedding, or nothing
            would be trainable.
    """
    _refuse_tied_targets(model, lora)
    config_class: Any = LoraConfig
    config = config_class(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        task_type=task_type,
    )
    untyped: Any = model
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)  # of peft's own doing
        try:
            adapted = get_peft_model(untyped, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise UserInputError(f"lora: {error}; layers: {_linear_names(model)}") from error
    n_trainable = sum(p.requires_grad for p in adapted.parameters())
    if n_trainable == 0:
        raise UserInputError("lora: no tensor would be trained; choose other targets")
    if base_name is not None:
        adapted.peft_config["default"].base_model_name_or_path = base_name
    ready: nn.Module = adapted.eval()
    return ready


def is_adapter(path: str | Path) -> bool:
    """Whether it is the folder of a peft adapter."""
    return (Path(path) / ADAPTER_FILE).is_file()


def saved_config(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model as it was saved; of an adapter, that of its base.

    Raises:
        UserInputError: it cannot be found or read.
    """
    source = resolve(str(path))
    base = base_of(Path(source)) if is_adapter(source) else source
    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserInputError(cannot_load("model", path, error)) from error


def model_hash(model: nn.Module | str | Path) -> str:
    """sha256 of a model's weights.

    Of a module: names, dtypes, shapes and bytes of its parameters, tied ones once, sorted by name.
    Of a directory: names and contents of its weight files. The two are not comparable.
    """
    if isinstance(model, nn.Module):
        return tensors_hash(dict(model.named_parameters()))
    digest = hashlib.sha256()
    for file in _weight_files(Path(model)):
        with file.open("rb") as stream:
            digest.update(
                f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode()
            )
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what a tokenizer does to text: vocabulary, merges, normalizer, special tokens.

    Truncation and padding, which a call may leave behind in a tokenizer, do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spec = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    if backend is not None:
        spec |= {"truncation": None, "padding": None}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    special.pop("pad_token", None)  # masks come from lengths, so it may be any
    return _sha256({"spec": spec, "special": special})


def template_hash(tokenizer: Any) -> str:
    """sha256 of the chat template (or templates by name); of JSON null without one."""
    return _sha256(tokenizer.chat_template)


def load_pretrained(
    auto: Any,
    source: Path | str,
    dtype: torch.dtype,
    attention: Attention,
    trust_remote_code: bool,
    revision: str | None,
) -> tuple[Any, list[str]]:
    """A model of a transformers `Auto` class in eval mode, and the names of further weights that
    its files hold.

    Raises:
        UserInputError: it cannot be loaded, or its files lack weights, which would be random.
    """
    try:
        model, info = auto.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=trust_remote_code,
            revision=revision,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserInputError(cannot_load("model", source, error)) from error
    absent = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if absent:
        raise UserInputError(
            f"model {str(source)!r}: files lack {len(absent)} weights ({', '.join(absent[:4])}), "
            "which would be random; give a complete model"
        )
    model.config.use_cache = False
    replace_rms_norms(model)
    replace_linears(model)
    replace_rotary(model)
    return model.eval(), sorted(info["unexpected_keys"])


def _load_base(source: Path | str, *settings: Any) -> nn.Module:
    loaded, unused = load_pretrained(AutoModelForCausalLM, source, *settings)
    if unused:
        logger.warning("model %s: unused weights %s", source, unused[:4])
    model: nn.Module = loaded
    return model


def portable_name(path: str | Path, source: Path | str) -> str:
    """How a saved adapter names its base: a catalogue model by name, valid on every machine."""
    is_catalogued = str(path) in {entry.name for entry in catalog()}
    return str(path) if is_catalogued else str(source)


def base_of(adapter: Path) -> Path | str:
    """The model that an adapter is for.

    Raises:
        UserInputError: it does not say, or there is no such model.
    """
    name = base_name(adapter)
    try:
        return resolve(name)
    except UserInputError as error:
        raise UserInputError(f"adapter {str(adapter)!r}, its base model: {error}") from error


def base_name(adapter: Path) -> str:
    """What an adapter calls the model that it is for.

    Raises:
        UserInputError: it does not say.
    """
    config = json.loads((adapter / ADAPTER_FILE).read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if not name:
        raise UserInputError(
            f"adapter {str(adapter)!r} does not say what model it is for; set "
            f"base_model_name_or_path in its {ADAPTER_FILE}"
        )
    return str(name)


def _with_adapter(model: nn.Module, adapter: Path) -> nn.Module:
    untyped: Any = model
    try:
        adapted = PeftModel.from_pretrained(
            untyped, str(adapter), is_trainable=True, autocast_adapter_dtype=False
        )
    except Exception as error:
        raise UserInputError(cannot_load("adapter", adapter, error)) from error
    return cast_parameters(adapted, next(model.parameters()).dtype).eval()


def _refuse_other_adapter(model: Any, lora: LoraOptions, path: str) -> None:
    """An adapter that is being continued keeps its shape; a recipe that asks for another one would
    be silently ignored otherwise."""
    config = model.peft_config["default"]
    alpha = 2 * lora.rank if lora.alpha is None else lora.alpha
    if (config.r, config.lora_alpha) != (lora.rank, alpha):
        raise UserInputError(
            f"model {path!r} holds an adapter of rank {config.r} and alpha {config.lora_alpha:g}, "
            f"and the recipe asks for rank {lora.rank} and alpha {alpha:g}; leave model.lora out "
            "to go on with the adapter, or merge it first (align export)"
        )


def _refuse_tied_targets(model: nn.Module, lora: LoraOptions) -> None:
    """An update of a tied embedding cannot be merged: input and output would need other weights."""
    causal_lm: Any = model
    if isinstance(lora.targets, str) or not causal_lm.config.get_text_config().tie_word_embeddings:
        return
    tied = {causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()}
    names = [name for name, module in model.named_modules() if module in tied]
    hit = [t for t in lora.targets if any(n == t or n.endswith(f".{t}") for n in names)]
    if hit:
        raise UserInputError(
            f"lora.targets names {', '.join(hit)}, whose weights the model's input and output "
            "embeddings share, so that the adapter could not be merged; leave it out"
        )


def _linear_names(model: nn.Module) -> str:
    found = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return ", ".join(sorted(found))


def _read_template(chat_template: str) -> str:
    path = template_file(chat_template)
    if path is not None:
        return path.read_text(encoding="utf-8")
    return CHATML if chat_template == BUILT_IN else chat_template


def _weight_files(directory: Path) -> Iterator[Path]:
    patterns = ("*.safetensors", "*.bin", "*.gguf")
    files = sorted({file for pattern in patterns for file in directory.glob(pattern)})
    if not files:
        raise UserInputError(f"{str(directory)!r} holds no weight files; give a model directory")
    yield from files


def cannot_load(what: str, path: object, error: Exception) -> str:
    first_lines = " ".join(str(error).split("\n")[:3])
    return (
        f"{what} {str(path)!r} cannot be loaded: {type(error).__name__}: {first_lines}\nGive a "
        "catalogue name (align models list), a directory in Hugging Face format, or a hub id that "
        "can be reached from here"
    )


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
