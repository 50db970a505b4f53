"""What `model.chat_template` of a recipe stands for; needs neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from alignment.types import UserInputError

BUILT_IN = "chatml"


def template_file(chat_template: str) -> Path | None:
    """The Jinja file that it names; None where it is the text of a template, or the built-in one.

    Raises:
        UserInputError: it is neither, and there is no such file.
    """
    if chat_template == BUILT_IN or "{{" in chat_template or "{%" in chat_template:
        return None
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise UserInputError(
            f"chat template {chat_template!r} is neither a file ({path.absolute()}), nor the text "
            f"of a Jinja template, nor {BUILT_IN!r}"
        )
    return path
