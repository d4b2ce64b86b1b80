"""The checks of what stands in this folder: python -m pytest -q figures"""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path[:0] = map(str, Path(__file__).parents[:2])
import data
import finetune
import report
import script
import speed
from metapt import digest

METAPT = [0.45, 0.46, 0.44, 0.47, 0.43]  # 45.00 ± 1.58
PPT = [0.41, 0.45, 0.42, 0.43, 0.44]  # 43.00 ± 1.58
PAIRED = stats.ttest_rel(np.multiply(100, METAPT), np.multiply(100, PPT)).confidence_interval()
BEST = "**45.00 ± 1.58**"
AHEAD = f"+2.00 [{PAIRED.low:+.2f}, {PAIRED.high:+.2f}]"
USUAL = {"prompt_length": 100, "balanced": False, "matmul": "high"}  # high in all: not named
MADE_OF = {"task.json": "a", "train.jsonl": "b", "test.jsonl": "c", "--model": "d", "start": None}


def result(method, accuracy, seed, prompt=None, settings={}, made_of={}, **more):
    """A line of results, as finetune.py writes it; `more` of its keys."""
    tuning = "ft" if method == "ft" else "pt"
    row = {"task": "sst5", "tuning": tuning, "method": method, "prompt": prompt or method}
    row |= {"shots": 40, "seed": seed, "model": "google-t5/t5-base", "accuracy": accuracy}
    row["settings"] = {**USUAL, **finetune.SETTINGS[tuning], **settings}
    row["made_of"] = {**MADE_OF, **made_of}
    if method in ("maml", "ppt"):
        row |= {"recipe": method, "prompt_seed": 1}
    row |= more
    return {**row, "identity": digest(row)}


def results(method, accuracies, *rest, **more):
    """The lines of results of one prompt, a seed each."""
    return [result(method, a, seed, *rest, **more) for seed, a in enumerate(accuracies)]


@pytest.fixture
def printed(tmp_path, capsys):
    """What the report prints of rows, with single spaces."""

    def run(rows, *flags):
        data.write_lines(tmp_path / "results.jsonl", rows)
        report.main([str(tmp_path / "results.jsonl"), *flags])
        return " ".join(capsys.readouterr().out.split())

    return run


def test_beside_the_papers_tables(printed):
    rows = [
        *results("maml", METAPT, clustering="kmeans"),
        *results("ppt", PPT),
        result("maml", 0.9, 0, task="mine", clustering="kmeans"),
        result("maml", 0.42, 0, "mixed", recipe="d", clustering="random", source_task="yelp5"),
        result("maml", 0.5, 0, "y", recipe="e", clustering="kmeans", source_task="yelp5"),
        result("ft", 0.44, 0),
        result("ft", 0.99, 0, shots=80),
    ]
    text = printed(rows, "--against", "ppt")
    lines = [
        f"| t5-base | 40 | MetaPT | maml | {AHEAD} | - | - |",
        "| MetaPT | maml | 45.00 ± 1.58; paper 45.26±0.39, -0.26 | 90.00 (1) | 67.50 (1) |",
        "| t5-base | 40 | PPT | ppt | 43.00 ± 1.58; paper 42.90±1.08, +0.10 | - | - |",
        "| MetaPT(Y), random | mixed | 42.00 (1); paper 42.95±1.05, -0.95 | - | - |",
        "| MetaPT(Y) | y | **50.00** (1); paper 46.24±0.42, +3.76 | - | - |",
        "| t5-base | 40 | FT | - | 44.00 (1); paper 43.57±2.56, +0.43 | - | - |",
        "| t5-base | 80 | FT | - | 99.00 (1) | - | - |",  # no other to be the best of
    ]
    assert not [line for line in lines if line not in text], text


GOOD = results("maml", METAPT)
OTHERS = ("ppt, learning_rate 1e-05", "ppt, prompt_length 20", "balanced")
CASES = {  # rows, beside those of MetaPT with PPT's accuracies; lines of the tables
    "other settings are named, and not compared": (
        results("ppt", METAPT, settings={"learning_rate": 1e-5})
        + results("ppt", METAPT, settings={"prompt_length": 20})
        + results("ft", METAPT, settings={"balanced": True}),
        [f"| {named} | 45.00" for named in OTHERS] + [f"| {named} | - |" for named in OTHERS],
    ),
    "full tuning at any rate of its own": (
        results("ft", METAPT, settings={"learning_rate": 0.1}),
        [f"| FT | learning_rate 0.1 | {BEST};", f"| FT | learning_rate 0.1 | {AHEAD} |"],
    ),
    "a prompt that is its start": (
        results("maml", METAPT, "b", prompt_seed=2, is_start=True),
        ["| MetaPT | maml | 43.00 ± 1.58;", f"| MetaPT, which is its start | b | {BEST} |"],
    ),
    "one training in two folders, its newest run": (
        results("maml", METAPT, "b") + results("maml", METAPT, "c", prompt_seed=2),
        ["| MetaPT | maml, b, c | 45.00 ± 1.49 (2 × 5);"],
    ),
    "runs without a draw, and no spread: no interval; bold: one that leaves out 0": (
        [result("maml", 0.5, None, shots=0), result("ppt", 0.4, None, shots=0)]
        + results("random", METAPT, shots=0),
        ["| maml | **50.00** (1) |", "| ppt | -10.00 |", "| random | **-5.00 [-6.96, -3.04]** |"],
    ),
    "data or a T5 that changed under its name": (
        results("ppt", [0.2] * 5, made_of={"test.jsonl": "new"})
        + results("ppt", METAPT)
        + results("ppt", METAPT, made_of={"--model": "new"}),
        [f"| sst5 ({digest(['a', 'b', file])[:6]}) |" for file in ("c", "new")]
        + [f"| PPT | ppt | {BEST} | 20.00 ± 0.00 |", f"| PPT | ppt | {AHEAD} | - |"]
        + [f"| t5-base ({digest('new')[:6]}) | 40 | PPT | ppt | {end}" for end in ("45.00", "-")],
    ),
    "a prompt made anew by another recipe; PEFT's, each its own": (
        results("maml", METAPT, recipe="new")
        + [result("PEFT", 0.2, 1, made_of={"start": start}) for start in "ab"],
        [f"| maml ({digest('new')[:6]}) | {BEST};", f"| {AHEAD} |"]
        + [f"| PEFT | PEFT ({digest(start)[:6]}) | 20.00 (1) |" for start in "ab"],
    ),
}


@pytest.mark.parametrize("rows, lines", CASES.values(), ids=CASES)
def test_lines_of_the_tables(printed, rows, lines):
    text = printed(results("maml", PPT) + rows, "--against", "MetaPT")
    assert not [line for line in lines if line not in text], text


def test_trainings_of_one_prompt_share_a_line_and_widen_its_interval(printed):
    rows = results("ppt", PPT)
    for seed, shift in enumerate([-0.03, 0, 0.03]):
        rows += results("maml", np.add(METAPT, shift), f"maml-{seed}", prompt_seed=seed)
    assert "Against maml-1" in printed(rows, "--against", "maml-1")  # any prompt names its line
    deviation = np.std(100 * np.add.outer([-0.03, 0, 0.03], METAPT), ddof=1)
    text = printed(rows, "--against", "ppt")
    assert f"| maml-0, maml-1, maml-2 | **45.00 ± {deviation:.2f}** (3 × 5)" in text

    over_draws = 100**2 * np.subtract(METAPT, PPT).var(ddof=1) / 5
    over_trainings = 9 / 3
    variance = over_draws + over_trainings
    freedom = variance**2 / (over_draws**2 / 4 + over_trainings**2 / 2)
    half = stats.t.ppf(0.975, freedom) * variance**0.5
    assert f"| maml-0, maml-1, maml-2 | +2.00 [{2 - half:+.2f}, {2 + half:+.2f}] |" in text

    # A training of fewer draws than another widens no interval.
    rows = [*GOOD, *results("ppt", PPT), result("maml", METAPT[4], 4, "b", prompt_seed=2)]
    assert f"| maml, b | {AHEAD} |" in printed(rows, "--against", "ppt")


@pytest.mark.parametrize("x", ["shots", "source_size", "clusters"])
def test_figure(printed, tmp_path, x):
    rows = [result("ft", 0.3, 1, shots=shots) for shots in (0, 10, 20)]
    for at in (10, 30):
        facts = {"shots": 40, "clusters": 10, "source_size": 1000, x: at}
        facts["recipe"] = "one" if x == "shots" else str(at)
        for task in ("sst5", "sst2"):
            rows += results("maml", [0.4 + at / 1000, 0.41 + at / 1000], task=task, **facts)

    printed(rows, "--figure", str(tmp_path / "folder" / "a.png"), "--x", x)
    assert (tmp_path / "folder" / "a.png").read_bytes().startswith(b"\x89PNG")
    panels = report.plot(report.curves(rows, x), x).axes
    assert [panel.get_title() for panel in panels] == ["sst5", "sst2"]
    assert not panels[0].title.get_parse_math()  # a task may be called "$x$"
    assert panels[0].get_xscale() == ("linear" if x == "clusters" else "log")
    points = panels[1].lines[-1].get_xydata().tolist()
    assert points == [[10, pytest.approx(41.5)], [30, pytest.approx(43.5)]]
    first = [10, 20] if x == "shots" else [10, 30]  # full tuning's, without its 0 examples
    assert panels[0].lines[0].get_xdata().tolist() == first


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([], [], "no results here; finetune.py --out writes them"),
        ([{"accuracy": 0.5, "settings": {}, "identity": "a"}], [], "'made_of' is missing"),
        (GOOD, ["--against", "PTT"], "no PTT to compare with, only MetaPT, maml"),
        (GOOD, ["--figure", "a.png"], "no method was run with two values of shots above 0"),
    ],
)
def test_bad_results_and_flags_end_in_one_line(tmp_path, capsys, rows, flags, message):
    data.write_lines(tmp_path / "results.jsonl", rows)
    with pytest.raises(SystemExit, match="2"):
        script.run(lambda: report.main([str(tmp_path / "results.jsonl"), *flags]))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("part, count", [("step", 3), ("downstream", 2)])
def test_speed(capsys, part, count):
    if part == "downstream":
        pytest.importorskip("peft")
    speed.main(f"--tasks 1 --rounds 1 --prompt-length 2 --exact --only {part}".split())
    lines = [line for line in capsys.readouterr().out.splitlines() if "e-" in line or "e+" in line]
    assert len(lines) == count and max(float(line.split()[-2]) for line in lines) < 1e-5


def test_the_texts_that_are_timed_are_as_long_as_ssts_sentences():
    batch = speed.make_model("tiny", "cpu").encode(speed.make_examples(3, 40, sst=True))
    assert batch["attention_mask"].sum(1).tolist() == [25, 22, 38]
