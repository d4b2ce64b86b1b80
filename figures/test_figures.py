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
BEST, AHEAD = "**45.00 ± 1.58**", "+2.00 [{:+.2f}, {:+.2f}]".format(*PAIRED)
USUAL = {"max_length": 256, "max_epochs": 200, "validation_shots": None, "balanced": False}
USUAL |= {"max_test": None, "dtype": "float32", "matmul": "high"}  # high in all: not named


def result(method, accuracy, seed, prompt=None, shots=40, settings=None, **more):
    """A line of results, as finetune.py writes it."""
    tuning = "ft" if method == "ft" else "pt"
    own = {**finetune.SETTINGS[tuning], **({"prompt_length": 100} if tuning == "pt" else {})}
    made_of = {"task.json": "a", "train.jsonl": "b", "test.jsonl": "c", "--model": "d"}
    made_of |= {"start": None, **more.pop("made_of", {})}
    row = {"task": "sst5", "tuning": tuning, "method": method, "shots": shots, "seed": seed}
    row |= {"model": "google-t5/t5-base", "prompt": prompt or method, "accuracy": accuracy}
    row |= {"settings": {**USUAL, **own, **(settings or {})}, "made_of": made_of}
    row |= {"recipe": method, "prompt_seed": 1} if method in ("maml", "ppt") else {}
    return {**row, **more, "identity": digest([row, more])}


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
    rows = results("maml", METAPT, clustering="kmeans") + results("ppt", PPT)
    rows += [
        result("maml", 0.9, 0, task="mine", clustering="kmeans"),
        result("maml", 0.42, 0, "mixed", recipe="d", clustering="random", source_task="yelp5"),
        result("maml", 0.5, 0, "y", recipe="e", clustering="kmeans", source_task="yelp5"),
        result("ft", 0.44, 0, "none"),
        result("ft", 0.99, 0, "none", shots=80),
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


OTHERS = {"learning_rate": 1e-5, "max_epochs": 2, "max_length": 16, "dtype": "bfloat16"}
OTHERS |= {"prompt_length": 20, "balanced": True}


@pytest.mark.parametrize("name, value", OTHERS.items())
def test_a_line_of_other_settings_is_named_and_not_compared(printed, name, value):
    rows = results("maml", PPT, task="b") + results("ppt", METAPT, task="b")
    text = printed(rows + results("ppt", METAPT, settings={name: value}) + results("maml", PPT))
    details = "ppt, balanced" if name == "balanced" else f"ppt, {name} {value}"
    assert f"| PPT | ppt | {BEST} | - |" in text and f"| {details} | - | 45.00 ± 1.58;" in text
    assert f"| PPT | ppt | {AHEAD} | - |" in text and f"| {details} | - | - |" in text


GOOD = results("maml", METAPT)
CASES = {  # rows, beside MetaPT's; lines of the tables
    "full tuning at any rate of its own": (
        results("ft", METAPT, "none", settings={"learning_rate": 0.1})
        + results("ft", PPT, "none", settings={"learning_rate": finetune.RATES}),  # A.1's search
        [f"| FT | learning_rate 0.1 | {BEST};", f"| FT | learning_rate 0.1 | {AHEAD} |"]
        + ["| FT | search | **43.00 ± 1.58**;", "| FT | search | +0.00 |"],
    ),
    "a gain whose interval leaves out 0": (
        results("ppt", np.add([0.02, 0.021, 0.022, 0.023, 0.024], PPT)),
        ["| PPT | ppt | **+2.20 [+2.00, +2.40]** |"],
    ),
    "no spread, no interval": (results("ppt", np.add(PPT, 0.1)), ["| PPT | ppt | +10.00 |"]),
    "a prompt that is its start": (
        results("maml", METAPT, "b", prompt_seed=2, is_start=True),
        ["| MetaPT | maml | 43.00 ± 1.58;", f"| MetaPT, which is its start | b | {BEST} |"],
    ),
    "one training in two folders, its newest run": (
        results("maml", METAPT, "b") + results("maml", METAPT, "c", prompt_seed=2),
        ["| MetaPT | maml, b, c | 45.00 ± 1.49 (2 × 5);"],
    ),
    "a run without a draw": (
        [result(method, a, None, shots=0) for method, a in (("maml", 0.5), ("ppt", 0.4))]
        + results("random", METAPT, "random", shots=0),
        ["| maml | **50.00** (1) |", "| ppt | -10.00 |", "| random | **-5.00 [-6.96, -3.04]** |"],
    ),
    "data that changed under its name": (
        results("ppt", [0.2] * 5, made_of={"test.jsonl": "new"}) + results("ppt", METAPT),
        [f"| sst5 ({digest(['a', 'b', file])[:6]}) |" for file in ("c", "new")]
        + [f"| PPT | ppt | {BEST} | 20.00 ± 0.00 |", f"| PPT | ppt | {AHEAD} | - |"],
    ),
    "two T5s of one name": (
        results("ppt", METAPT, made_of={"--model": "new"}),
        [f"| t5-base ({digest('new')[:6]}) | 40 | PPT | ppt | 45.00 ± 1.58", "| ppt | - |"],
    ),
    "a prompt made anew by another recipe": (
        results("maml", METAPT, recipe="new"),
        [f"| maml ({digest('new')[:6]}) | {BEST};", f"| {AHEAD} |"],
    ),
    "PEFT's, each its own": (
        [result("PEFT", 0.2, 1, made_of={"start": a}) for a in "ab"],
        [f"| PEFT | PEFT ({digest(a)[:6]}) | 20.00 (1) |" for a in "ab"],
    ),
}


@pytest.mark.parametrize("rows, lines", CASES.values(), ids=CASES)
def test_lines_of_the_tables(printed, rows, lines):
    text = printed(results("maml", PPT) + rows, "--against", "metapt")
    assert not [line for line in lines if line not in text], text


def test_trainings_of_one_prompt_share_a_line_and_widen_its_interval(printed):
    interval = lambda half: f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}]"
    rows = results("ppt", PPT)
    for seed, shift in enumerate([-0.03, 0, 0.03]):
        rows += results("maml", np.add(METAPT, shift), f"maml-{seed}", prompt_seed=seed)
    assert "Against maml-1" in printed(rows, "--against", "maml-1")  # any prompt names its line
    deviation = np.std(100 * np.add.outer([-0.03, 0, 0.03], METAPT), ddof=1)
    text = printed(rows, "--against", "ppt")
    assert f"| maml-0, maml-1, maml-2 | **45.00 ± {deviation:.2f}** (3 × 5)" in text

    over_draws, over_trainings = 100**2 * np.subtract(METAPT, PPT).var(ddof=1) / 5, 9 / 3
    variance = over_draws + over_trainings
    freedom = variance**2 / (over_draws**2 / 4 + over_trainings**2 / 2)
    half = stats.t.ppf(0.975, freedom) * variance**0.5
    assert f"| maml-0, maml-1, maml-2 | {interval(half)} |" in text

    # A training of fewer draws than another widens no interval.
    rows = results("maml", METAPT) + results("ppt", PPT)
    rows.append(result("maml", METAPT[4], 4, "b", prompt_seed=2))
    half = stats.t.ppf(0.975, 4) * over_draws**0.5
    assert f"| maml, b | {interval(half)} |" in printed(rows, "--against", "ppt")


@pytest.mark.parametrize("x", ["shots", "source_size", "clusters"])
def test_figure(printed, tmp_path, x):
    rows = [result("ft", 0.3, 1, "none", shots=shots) for shots in (10, 20)]
    for at in (10, 30):
        facts = {"shots": 40, "clusters": 10, "source_size": 1000, x: at}
        facts |= {} if x == "shots" else {"recipe": str(at)}
        for task in ("sst5", "sst2"):
            rows += results("maml", [0.4 + at / 1000, 0.41 + at / 1000], task=task, **facts)

    printed(rows, "--figure", str(tmp_path / "folder" / "a.png"), "--x", x)
    assert (tmp_path / "folder" / "a.png").read_bytes().startswith(b"\x89PNG")
    panels = report.plot(report.curves(rows, x), x).axes
    assert [panel.get_title() for panel in panels] == ["sst5", "sst2"]
    assert panels[0].get_xscale() == ("linear" if x == "clusters" else "log")
    points = panels[1].lines[-1].get_xydata().tolist()
    assert points == [[10, pytest.approx(41.5)], [30, pytest.approx(43.5)]]
    assert len(panels[0].lines) == (2 if x == "shots" else 1)


def test_0_shots_have_a_place_and_names_are_text(tmp_path):
    rows = []
    for prompt in ("_a", r"$\frac$"):
        facts = {"task": "$x_$", "made_of": {"start": prompt}}
        rows += [result("$^$", 0.5, None, prompt, shots, **facts) for shots in (0, 10, 40)]

    figure = report.plot(report.curves(rows, "shots"), "shots")
    script.save_figure(tmp_path / "a.png", figure)
    at = figure.axes[0].transData.transform([(shots, 50) for shots in (0, 10, 40)])[:, 0]
    assert min(np.diff(at)) > 30  # pixels
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert figure.axes[0].get_title() == "$x_$" and names == ["$^$, _a", r"$^$, $\frac$"]


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        ([], [], "no results here; finetune.py --out writes them"),
        ([{**GOOD[0], "accuracy": "high"}], [], "results.jsonl:1: "),
        ([{"accuracy": 0.5, "settings": {}, "identity": "a"}], [], "'made_of' is missing"),
        (GOOD, ["--against", "PTT"], "no PTT to compare with, only MetaPT, maml"),
        (GOOD, ["--figure", "a.png"], "no method was run with more than one value of shots"),
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


def test_the_texts_that_are_timed_have_as_many_tokens_as_said():
    model = speed.make_model("tiny", "cpu")
    for sst, lengths in ((False, [40, 40, 40]), (True, [25, 22, 38])):
        batch = model.encode(speed.make_examples(3, 40, sst))
        assert batch["attention_mask"].sum(1).tolist() == lengths
