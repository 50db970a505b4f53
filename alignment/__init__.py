"""Post-training alignment: pluggable methods over one scorer, one rollout engine and one loop.

What most programs need can be had from here:

    from alignment import load_recipe, train

    run = train(load_recipe("tiny/sft", ["run.name=mine"]))
    print(run.path)

The names are imported when they are first used, so `import alignment` loads no torch. Everything
else is public in the module that defines it: losses in `alignment.losses`, advantages in
`alignment.advantages`, the types that the parts exchange in `alignment.types`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AlignmentError": "alignment.types",
    "Completion": "alignment.types",
    "Outcome": "alignment.types",
    "PipelineRecipe": "alignment.config",
    "Prompt": "alignment.types",
    "Recipe": "alignment.config",
    "RunDirectory": "alignment.runs.directory",
    "Sample": "alignment.types",
    "Score": "alignment.types",
    "UserInputError": "alignment.types",
    "chat": "alignment.trainers.chat",
    "load_recipe": "alignment.config",
    "register": "alignment.registry",
    "run_pipeline": "alignment.trainers.pipeline",
    "train": "alignment.trainers.run",
}

__all__ = ["__version__", *_PUBLIC]  # plain strings, all of them


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
