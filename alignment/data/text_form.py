"""How the texts of a reward model's training became tokens: a file beside the model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from alignment.data.control import Tokenizer
from alignment.data.formats import wants_chat
from alignment.data.prompts import Style
from alignment.types import UserInputError

TEXT_FORM = "text_form.json"
"""Name of the file, in the folder of the model."""

FixedStyle = Literal["chat", "plain"]


@dataclass(frozen=True, slots=True)
class TextForm:
    """What a model learned to read, beyond its tokenizer and chat template.

    style:     whether texts were rendered with the chat template.
    system:    the message that conversations began with which had none of their own.
    separator: what stood between two steps; None for a model of whole answers.
    """

    style: FixedStyle
    system: str | None = None
    separator: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self)) + "\n"


def read_text_form(folder: Path) -> TextForm | None:
    """What is recorded beside a model; None where nothing is, as beside a model of other make.

    Raises:
        UserInputError: the file is damaged.
    """
    file = folder / TEXT_FORM
    if not file.is_file():
        return None
    try:
        form = TextForm(**json.loads(file.read_text(encoding="utf-8")))
        if not _is_sound(form):
            raise ValueError(form)
    except (ValueError, TypeError) as error:
        raise UserInputError(
            f"{file} is damaged ({error!r}); delete it, and say by the reward's options (style, "
            "system, separator) what the model was trained on"
        ) from error
    return form


def require_text_form(folder: Path, style: FixedStyle, separator: str) -> None:
    """Refuse data in another form than the one that a model learned to read.

    Args:
        folder: of the model; where no form is recorded in it, nothing is compared.
        style: that the data is to be rendered in.
        separator: that its steps are to be joined by, where it has some.

    Raises:
        UserInputError: style or separator are not the model's.
    """
    form = read_text_form(folder)
    if form is None:
        return
    if form.style != style:
        raise UserInputError(
            f"{folder} was trained on data.style: {form.style}, and the recipe gives {style}; set "
            f"data.style: {form.style}"
        )
    if form.separator not in (None, separator):
        raise UserInputError(
            f"{folder} was trained on steps with {form.separator!r} between them, and the recipe "
            f"joins them by {separator!r}; set algorithm.separator in a recipe of type "
            "process_reward_model"
        )


def fixed_style(style: Style, tokenizer: Tokenizer) -> FixedStyle:
    """What `style` comes to with a tokenizer.

    Raises:
        UserInputError: `chat` without a chat template.
    """
    chat = wants_chat(style, has_template=bool(tokenizer.chat_template))
    return "chat" if chat else "plain"


def _is_sound(form: TextForm) -> bool:
    texts = (form.system, form.separator)
    return (
        form.style in ("chat", "plain")
        and all(text is None or isinstance(text, str) for text in texts)
        and form.separator != ""
    )
