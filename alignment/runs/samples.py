"""Every sample of a step in one parquet file: for reading, and for training on it again.

Columns, one row per completion, in the order of the rollout, those dropped from it at the end:

    step, prompt_index, sample_index   int64
    group                              int64     position // group_size
    kept                               bool      False: sampled, but not trained on
    prompt, completion                 string    as rendered; as decoded without special tokens
    prompt_ids, completion_ids         list<int32>
    sampling_logprobs                  list<float32>
    reward, advantage                  double    null: no score; none was computed
    outcome, stop_reason               string
    reward_parts                       string    JSON {name: {"value", "outcome", "detail"}}
    policy_version                     int64
    prompt_row                         string    JSON, the data row of the prompt

and those the caller adds. `group_size` and `step` also stand in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alignment.runs.files import readable_errors, remove_leftovers, write_atomic
from alignment.runs.jsonl import json_safe
from alignment.types import (
    AlignmentError,
    Completion,
    Outcome,
    Prompt,
    RewardedCompletion,
    Rollout,
    Score,
    StopReason,
)

_METADATA_KEY = b"alignment"

_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt_index", pa.int64()),
        ("sample_index", pa.int64()),
        ("group", pa.int64()),
        ("kept", pa.bool_()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("sampling_logprobs", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("outcome", pa.string()),
        ("reward_parts", pa.string()),
        ("advantage", pa.float64()),
        ("stop_reason", pa.string()),
        ("policy_version", pa.int64()),
        ("prompt_row", pa.string()),
    ]
)


class SampleRecorder:
    """Writes `rollouts/step-000001.parquet` and its successors."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)

    def write(
        self,
        rollout: Rollout,
        *,
        advantages: Sequence[float | None] | None = None,
        extra: Mapping[str, Sequence[Any]] | None = None,
    ) -> Path:
        """Write one step's samples; a file of the same step is replaced in one go.

        Args:
            advantages: one per item of the rollout; None where the item was left out.
            extra: further columns, each with one value per item. Like advantages, they are null
                for what was dropped from the rollout.

        Raises:
            AlignmentError: lengths do not match, a column exists already, or the file cannot be
                written.
        """
        table = _table(rollout, advantages, extra or {})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        with readable_errors("create the folder", self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        path = rollout_path(self.directory, rollout.step)
        write_atomic(path, sink.getvalue().to_pybytes())
        return path

    def truncate_after(self, step: int) -> list[Path]:
        """Remove the files of later steps (for a resume from `step`) and of killed writes."""
        if not self.directory.is_dir():
            return []
        remove_leftovers(self.directory)
        later = [path for at, path in rollout_files(self.directory) if at > step]
        for path in later:
            with readable_errors("remove", path):
                path.unlink()
        return later


def rollout_path(directory: Path, step: int) -> Path:
    """Where the samples of `step` are."""
    return directory / f"step-{step:06d}.parquet"


def rollout_files(directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every recorded step, in order."""
    found = [(path.stem.removeprefix("step-"), path) for path in directory.glob("step-*.parquet")]
    return sorted((int(number), path) for number, path in found if number.isdecimal())


def read_rollout(path: Path | str) -> Rollout:
    """The rollout a file was written from.

    Equal to it in everything but this: `sampling_logprobs` are rounded to float32, a prompt's
    row is what JSON can hold of it, and lone surrogates in texts are question marks. In a file of
    an earlier version everything counts as kept: those did not hold what was dropped.

    Raises:
        AlignmentError: the file is missing, damaged, or no rollout.
    """
    path = Path(path)
    with readable_errors("read", path):
        content = path.read_bytes()
    try:
        table = pq.read_table(pa.BufferReader(content))
        about = json.loads((table.schema.metadata or {})[_METADATA_KEY])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise AlignmentError(
            f"{path} is damaged or holds no rollout ({error}); rollouts are the step-*.parquet "
            "files that training wrote"
        ) from error
    kept: list[RewardedCompletion] = []
    dropped: list[RewardedCompletion] = []
    for row in table.to_pylist():
        (kept if row.get("kept", True) else dropped).append(_item(row))
    return Rollout(tuple(kept), about["group_size"], about["step"], tuple(dropped))


def _table(
    rollout: Rollout,
    advantages: Sequence[float | None] | None,
    extra: Mapping[str, Sequence[Any]],
) -> pa.Table:
    n_kept, absent = len(rollout.items), [None] * len(rollout.dropped)
    rows = [
        _row(item, rollout.step, index // rollout.group_size, kept=index < n_kept)
        for index, item in enumerate([*rollout.items, *rollout.dropped])
    ]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    if advantages is not None:
        place = _SCHEMA.get_field_index("advantage")
        _check_length("advantage", advantages, n_kept)
        column = pa.array([*advantages, *absent], pa.float64())
        table = table.set_column(place, "advantage", column)
    for name, values in extra.items():
        _check_length(name, values, n_kept)
        if name in table.column_names:
            raise AlignmentError(f"rollouts have a column {name!r} already; name yours otherwise")
        table = table.append_column(name, pa.array([*values, *absent]))
    about = {"step": rollout.step, "group_size": rollout.group_size}
    return table.replace_schema_metadata({_METADATA_KEY: json.dumps(about).encode()})


def _check_length(name: str, values: Sequence[Any], n_items: int) -> None:
    if len(values) != n_items:
        raise AlignmentError(
            f"column {name!r} has {len(values)} values for {n_items} completions; give one each"
        )


def _row(item: RewardedCompletion, step: int, group: int, *, kept: bool) -> dict[str, Any]:
    prompt, completion = item.prompt, item.completion
    return {
        "step": step,
        "prompt_index": prompt.index,
        "sample_index": completion.sample_index,
        "group": group,
        "kept": kept,
        "prompt": _storable(prompt.text),
        "completion": _storable(completion.text),
        "prompt_ids": prompt.token_ids,
        "completion_ids": completion.token_ids,
        "sampling_logprobs": completion.sampling_logprobs,
        "reward": item.reward,
        "outcome": item.outcome.value,
        "reward_parts": json.dumps({name: _part(score) for name, score in item.parts.items()}),
        "advantage": None,
        "stop_reason": completion.stop_reason.value,
        "policy_version": completion.policy_version,
        "prompt_row": json.dumps(dict(prompt.row), default=_listed),
    }


def _part(score: Score) -> dict[str, Any]:
    value = None if score.value is None else json_safe(score.value)
    return {"value": value, "outcome": score.outcome.value, "detail": score.detail}


def _item(row: Mapping[str, Any]) -> RewardedCompletion:
    prompt = Prompt(
        token_ids=tuple(row["prompt_ids"]),
        text=row["prompt"],
        index=row["prompt_index"],
        row=json.loads(row["prompt_row"]),
    )
    completion = Completion(
        prompt_index=row["prompt_index"],
        sample_index=row["sample_index"],
        token_ids=tuple(row["completion_ids"]),
        sampling_logprobs=tuple(row["sampling_logprobs"]),
        stop_reason=StopReason(row["stop_reason"]),
        policy_version=row["policy_version"],
        text=row["completion"],
    )
    parts = {name: _score(part) for name, part in json.loads(row["reward_parts"]).items()}
    return RewardedCompletion(prompt, completion, row["reward"], Outcome(row["outcome"]), parts)


def _score(part: Mapping[str, Any]) -> Score:
    value = part["value"]
    return Score(None if value is None else float(value), Outcome(part["outcome"]), part["detail"])


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _listed(value: Any) -> Any:
    """What JSON keeps of a value it does not know: the list of an array, else the repr."""
    return value.tolist() if hasattr(value, "tolist") else repr(value)
