"""Nothing that is read from a file is unpickled: a pickle may run any code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for name in ("alignment", "reward_models", "evals") for path in (ROOT / name).rglob("*.py")
)
PICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CALLS = {"torch.load", "torch.save", "torch.package"}
PIPE = {"reward_models/pool.py", "reward_models/worker.py"}
"""A request that a process pickles for the worker it has started, over a pipe; replies are JSON."""


def pickling(source: str) -> set[str]:
    """What a module imports or names that pickles."""
    return {name for node in ast.walk(ast.parse(source)) for name in _named(node)}


def _named(node: ast.AST) -> Iterator[str]:
    names: list[str] = []
    match node:
        case ast.Import():
            names = [alias.name for alias in node.names]
        case ast.ImportFrom(module=str(module)):
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        case ast.Attribute():
            names = [ast.unparse(node)]
        case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
            names = ["allow_pickle"]
    for name in names:
        if name.split(".")[0] in PICKLERS or name in {*CALLS, "allow_pickle"}:
            yield name


def test_no_module_pickles() -> None:
    assert len(FILES) > 100
    found = {
        str(path.relative_to(ROOT)): names
        for path in FILES
        if (names := pickling(path.read_text(encoding="utf-8")))
    }
    assert found.keys() == PIPE, found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import save",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_each_way_to_pickle_is_seen(line: str) -> None:
    assert pickling(line)


def test_what_only_looks_like_it_is_not() -> None:
    assert not pickling("from safetensors.torch import load, save\nstate.load()\nnp.load('x')")
