"""Draw the reward curve of a finished run, or of a pipeline's last stage that has rewards.

    python docs/build_figures.py runs/quickstart     writes docs/images/quickstart.svg

The picture is named after the run's folder, and shows what its metrics.jsonl holds. Where a
pipeline has compared rewards against divergence, its two figures are written in place of the curve.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from alignment import registry
from alignment.runs.metrics import read_metrics
from evals.svg import HEIGHT, WIDTH, Series, line_chart

IMAGES = Path(__file__).parent / "images"
METRIC = "reward/mean"
WINDOW = 5  # steps of the running mean

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #57606a; }
  .label { fill: #1c2128; }
  .grid { stroke: #d9dde3; stroke-width: 1; }
  .axis { stroke: #57606a; stroke-width: 1; fill: none; }
  .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
  .line.c0 { stroke: #9ec5f0; } .dot.c0 { fill: #9ec5f0; }
  .line.c1 { stroke: #0b62c4; stroke-width: 2.5; } .dot.c1 { fill: none; }
"""


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write(__doc__ or "")
        return 2
    folder = Path(arguments[0])
    figures = frontiers(folder)
    if figures:
        sys.stdout.write("".join(f"{figure}\n" for figure in figures))
        return 0
    run = run_with_rewards(folder)
    if run is None:
        sys.stderr.write(f"{folder}: neither it nor a stage of it has recorded {METRIC}\n")
        return 2
    IMAGES.mkdir(parents=True, exist_ok=True)
    target = IMAGES / f"{folder.resolve().name}.svg"
    target.write_text(picture(*rewards(run), name=run.name), encoding="utf-8")
    sys.stdout.write(f"{target}\n")
    return 0


def frontiers(folder: Path) -> list[Path]:
    """Copies of the figures of reward against divergence; none where nothing was compared so."""
    if "reward_kl" not in (folder / "metrics.jsonl").read_text(encoding="utf-8"):
        return []
    registry.get("report", "frontier")(folder)
    IMAGES.mkdir(parents=True, exist_ok=True)
    return [
        Path(shutil.copy(figure, IMAGES / f"{folder.resolve().name}-{figure.name}"))
        for figure in sorted(folder.glob("frontier-*.svg"))
    ]


def run_with_rewards(folder: Path) -> Path | None:
    """The run itself, or the stage of a pipeline that began last."""
    stages = (folder / "stages").glob("*/metrics.jsonl")
    latest_first = sorted(stages, key=lambda path: path.stat().st_mtime, reverse=True)
    candidates = [folder, *(path.parent for path in latest_first)]
    return next((run for run in candidates if rewards(run)[0]), None)


def rewards(run: Path) -> tuple[list[int], list[float]]:
    """Steps, and the mean reward of each."""
    records = [one for one in read_metrics(run / "metrics.jsonl") if METRIC in one]
    return [one["step"] for one in records], [one[METRIC] for one in records]


def picture(steps: list[int], values: list[float], *, name: str) -> str:
    """An SVG file: the reward of each step, and its running mean."""
    smooth = [fmean(values[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(values))]
    chart = line_chart(
        [Series("each step", steps, values), Series(f"mean of {WINDOW} steps", steps, smooth)],
        title=f"Mean reward of {name}",
        x_label="step",
        y_label="mean reward",
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    opening, _, rest = chart.removeprefix("<svg").partition(">")
    return f"{head}{opening}><style>{STYLE}</style>{ground}{rest}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
