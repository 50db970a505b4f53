"""Expectations: the grammar, by hand and against Python's own arithmetic; verifying a run."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.runs.expect import parse_expectation, verify_run
from alignment.runs.metrics import MetricsWriter
from alignment.types import UserInputError

# reward/mean: 0, 1, 4, 9, 16, 25; kl only at odd steps: 0.1, 0.3, 0.5
METRICS = [
    {"step": step, "reward/mean": float((step - 1) ** 2), "eval/held-out/pass@1": step / 10}
    | ({"kl": step / 10} if step % 2 else {})
    for step in range(1, 7)
]


def holds(text, metrics=METRICS):
    return parse_expectation(text).evaluate(metrics).passed


@pytest.mark.parametrize(
    "text",
    [
        "reward/mean == 25",  # a bare name is its last value
        "reward/mean[-1] == 25",
        "reward/mean[0] == 0",
        "reward/mean[2] == 4",
        "reward/mean[-2] == 16",
        "reward/mean[:2] == 0.5",  # a bare slice is its mean
        "reward/mean[-2:] == 20.5",
        "reward/mean[1:4] == 14 / 3",
        "reward/mean[-3:-1] == 12.5",
        "reward/mean[:] == 55 / 6",
        "mean(reward/mean) == 55 / 6",
        "median(reward/mean) == 6.5",
        "median(reward/mean[:3]) == 1",
        "min(reward/mean) == 0",
        "max(reward/mean[:3]) == 4",
        "first(reward/mean[2:]) == 4",
        "last(reward/mean[:3]) == 4",
        "max(reward/mean[3]) == 9",
        "kl[1] == 0.3",  # the series of the records that have it
        "kl == 0.5",
        "eval/held-out/pass@1 == 0.6",
        '"reward/mean" == 25',
        "step == 6",
        "reward/mean[-1]-reward/mean[0]==25",  # after a bracket a sign needs no spaces
        "reward/mean[-1]/5 == 5",
        "reward/mean - 1 == 24",
        "reward/mean / 5 == 5",
        "-reward/mean == -25",
        "- -1 == 1",
        "2 - -1 == 3",
        "2 - 3 - 4 == -5",  # from the left
        "8 / 4 / 2 == 1",
        "2 + 3 * 4 == 14",
        "(2 + 3) * 4 == 20",
        "-2 * 3 == -6",
        "1e-3 == .001",
        "1E+2 == 100.",
        "2-1 == 1",
        "1 < 2",
        "1 <= 1",
        "2 > 1",
        "2 >= 2",
        "1 != 2",
    ],
)
def test_true_expectations_hold(text):
    result = parse_expectation(text).evaluate(METRICS)
    assert result.passed, result
    assert result.text == text


@pytest.mark.parametrize("text", ["1 < 1", "2 <= 1", "1 > 1", "1 >= 2", "1 == 2", "1 != 1"])
def test_false_expectations_do_not(text):
    assert not holds(text)


def test_the_detail_shows_both_numbers():
    result = parse_expectation("reward/mean[-2:] > reward/mean[:2] + 100").evaluate(METRICS)
    assert not result.passed
    assert result.detail == "20.5 > 100.5 does not hold"
    assert parse_expectation("kl < 1").evaluate(METRICS).detail == "0.5 < 1 holds"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("reward/maen > 0", ["no metric 'reward/maen'", "reward/mean"]),
        ("zzz > 0", ["no metric 'zzz'", "reward/mean", "kl"]),
        ("reward/mean/2 > 0", ["'reward/mean' is one", "spaces around '/'"]),
        ("kl-0.1 > 0", ["'kl' is one", "spaces around '-'"]),
        ("kl[10] > 0", ["'kl' has 3 values"]),
        ("kl[-4] > 0", ["'kl' has 3 values"]),
        ("kl[5:] > 0", ["'kl' has 3 values"]),
        ("max(kl[2:1]) > 0", ["'kl' has 3 values"]),
        ("1 / (kl - kl) > 0", ["divided by zero"]),
    ],
)
def test_what_cannot_be_measured_fails_and_says_why(text, words):
    result = parse_expectation(text).evaluate(METRICS)
    assert not result.passed
    assert all(word in result.detail for word in words), result.detail


@pytest.mark.parametrize("comparison", ["<", "<=", ">", ">=", "==", "!="])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_side_that_is_not_finite_fails_every_comparison(comparison, value):
    for name in ("x", "mean(x)", "min(x)", "max(x)", "median(x)", "x[:]"):
        metrics = [{"x": value}] if name == "x" else [{"x": value}, {"x": value}]
        assert not holds(f"{name} {comparison} 1", metrics)


def test_one_nan_in_a_window_is_not_hidden_by_min_or_max():
    for values in ([1.0, math.nan], [math.nan, 1.0]):
        metrics = [{"x": value} for value in values]
        assert not holds("min(x) == 1", metrics)
        assert not holds("max(x) == 1", metrics)


def test_infinities_of_both_signs_have_no_mean():
    assert not holds("x[:] == 0", [{"x": math.inf}, {"x": -math.inf}])


def test_nothing_recorded_fails():
    assert not holds("kl < 1", [])
    assert not holds("kl < 1", [{"step": 1, "kl": None}])


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 1, "expected a number"),
        ("kl", 3, "expected a comparison"),
        ("kl <", 5, "expected a number"),
        ("kl < < 1", 6, "expected a number"),
        ("kl = 1", 4, "no meaning"),
        ("kl < 1 < 2", 8, "second comparison"),
        ("kl < 1 2", 8, "expected the end"),
        ("kl < 1 and kl > 0", 8, "expected the end"),
        ("(kl < 1", 5, "expected ')'"),
        ("(kl + 1 < 1", 9, "expected ')'"),
        ("kl[1 < 1", 6, "expected ']'"),
        ("kl[] < 1", 4, "expected an index"),
        ("kl[1.5] < 1", 4, "whole number"),
        ("kl[-x] < 1", 5, "whole number"),
        ("kl[1:2:3] < 1", 7, "expected ']'"),
        ("maen(kl) < 1", 1, "did you mean mean?"),
        ("__import__(kl) < 1", 1, "unknown function"),
        ("mean(kl + 1) < 1", 9, "expected ')'"),
        ("mean(1) < 1", 6, "expected a metric in mean"),
        ("kl < 1; 2", 7, "no meaning"),
        ("'kl' < 1", 1, "no meaning"),
        ("kl ** 2 < 1", 5, "expected a number"),
    ],
)
def test_errors_name_the_column_and_what_was_expected(text, column, words):
    with pytest.raises(UserInputError) as caught:
        parse_expectation(text)
    assert f"column {column}," in str(caught.value)
    assert words in str(caught.value)


def test_deep_nesting_is_refused_and_not_a_crash():
    for text in ("(" * 10_000, "(" * 100 + "1" + ")" * 100 + " < 2"):
        with pytest.raises(UserInputError, match="too deep"):
            parse_expectation(text)
    assert holds("-" * 10_000 + "1 == 1")
    assert holds("(" * 40 + "1" + ")" * 40 + " == 1")


@given(st.text(alphabet="ak/-+*()[]:<>=!.0123 \"'_@\n\u00e9", max_size=20))
def test_any_text_is_parsed_or_refused_with_a_user_error(text):
    try:
        expectation = parse_expectation(text)
    except UserInputError as error:
        assert "column" in str(error)
    else:
        expectation.evaluate(METRICS)


numbers = st.one_of(
    st.integers(0, 99).map(str), st.floats(0.01, 99, allow_nan=False).map(lambda x: f"{x:.3f}")
)
arithmetic = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", " + ", " - "]), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        inner.map(lambda text: f"-{text}"),
    ),
    max_leaves=10,
)


@given(arithmetic, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), arithmetic)
def test_arithmetic_agrees_with_python(left, comparison, right):
    """Python's own precedence is the second implementation."""
    text = f"{left} {comparison} {right}"
    try:
        expected = eval(text, {"__builtins__": {}})
    except ZeroDivisionError:
        expected = False
    assert holds(text) == expected


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=8),
    st.one_of(st.none(), st.integers(-9, 9)),
    st.one_of(st.none(), st.integers(-9, 9)),
)
def test_slices_are_those_of_python(values, start, stop):
    metrics = [{"x": value} for value in values]
    window = values[start:stop]
    text = f"x[{'' if start is None else start}:{'' if stop is None else stop}]"
    for function, expected in (("min", min), ("max", max), ("first", lambda v: v[0])):
        result = parse_expectation(f"{function}({text}) == 1000").evaluate(metrics)
        if window:
            assert result.detail == f"{expected(window):.6g} == 1000 does not hold"
        else:
            assert "none in the part asked for" in result.detail


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.integers(-9, 9))
def test_indices_are_those_of_python(values, index):
    metrics = [{"x": value} for value in values]
    result = parse_expectation(f"x[{index}] == 1000").evaluate(metrics)
    if -len(values) <= index < len(values):
        assert result.detail == f"{values[index]:.6g} == 1000 does not hold"
    else:
        assert "none in the part asked for" in result.detail


@pytest.fixture
def run(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        writer.write(step, {"reward/mean": step / 10, "loss": math.nan})
    (tmp_path / "recipe.yaml").write_text(
        "run: {name: r}\nexpect:\n  - reward/mean[-1:] > reward/mean[:1] + 0.1\n  - loss < 1e3\n"
    )
    return tmp_path


def test_verify_run_reads_recipe_and_metrics(run):
    first, second = verify_run(run)
    assert (first.text, first.passed) == ("reward/mean[-1:] > reward/mean[:1] + 0.1", True)
    assert first.detail == "0.3 > 0.2 holds"
    assert (second.passed, second.detail) == (False, "nan < 1000 is not finite")


@pytest.mark.parametrize("recipe", ["run: {name: r}\n", "expect: []\n", "expect:\n", ""])
def test_a_recipe_without_expectations_has_no_results(run, recipe):
    (run / "recipe.yaml").write_text(recipe)
    assert verify_run(run) == []


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("expect: reward > 1\n", "must be a list"),
        ("expect: [1]\n", "must be a list"),
        ("expect: [a\n", "not valid YAML"),
        ("expect: [a >]\n", "column 4"),
    ],
)
def test_recipes_that_cannot_be_checked_are_named(run, recipe, words):
    (run / "recipe.yaml").write_text(recipe)
    with pytest.raises(UserInputError, match=words):
        verify_run(run)


def test_a_folder_without_recipe_or_metrics_is_named(run, tmp_path):
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserInputError, match="no metrics yet"):
        verify_run(run)
    with pytest.raises(UserInputError, match=r"no recipe\.yaml"):
        verify_run(tmp_path / "none")


def test_expect_and_the_run_directory_import_no_torch():
    code = (
        "import sys, alignment.runs.expect, alignment.runs.directory, alignment.runs.events\n"
        "import alignment.runs.lineage, alignment.runs.progress\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
