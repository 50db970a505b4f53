"""The pages in docs/ that come from the code, and the links between all of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from documented import undocumented

from alignment.runs.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)(?:#[^)]*)?\)")


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "docs" / name
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_recipe_reference_is_current() -> None:
    """If this fails, run `make docs` and commit docs/recipes.md."""
    done = run_script("build_reference.py", "--check")
    assert done.returncode == 0, done.stderr


def test_the_recipe_reference_has_every_section_and_the_limits_of_a_key() -> None:
    text = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert "| `group_size` | whole number ≥ 2 | **required** |" in text
    for heading in ("`model.lora`", "`algorithm.kl`", "`eval.tasks[]`", "`math`", "`verifiable`"):
        assert re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE), heading


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_between_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in LINK.findall(text):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_figure_script_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    done = run_script("build_figures.py", str(tmp_path))
    assert done.returncode == 2
    assert "recorded reward/mean" in done.stderr


def test_every_metric_of_a_run_is_documented(tmp_path: Path) -> None:
    tiny_runs.run("sft", tmp_path, "eval.tasks=[{type: held_out_loss}]")
    tiny_runs.run(
        "grpo",
        tmp_path,
        "data.held_out=4",
        "eval.tasks=[{type: verifiable, samples: 2, ks: [1, 2]}]",
        "algorithm.kl={coef: 0.1, controller: adaptive, target: 0.1, horizon: 100}",
        "algorithm.loss.dual_clip=3.0",
        "rewards=[{type: 'tiny_runs:even_tokens'}, {type: number, weight: 0.5}]",
    )
    recorded = {
        name
        for run in ("sft", "grpo")
        for record in read_metrics(tmp_path / run / "metrics.jsonl")
        for name in record
    } - {"step"}
    assert len(recorded) > 50
    assert not undocumented(recorded)
