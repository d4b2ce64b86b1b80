"""The checks of what stands in this folder: python -m pytest -q figures"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import data
import report
import speed

METAPT, PPT = [0.45, 0.46, 0.44, 0.47, 0.43], [0.41, 0.45, 0.42, 0.43, 0.44]


def result(method, accuracy, seed, prompt=None, task="sst5", shots=40, settings=None, **more):
    """A line of results."""
    facts = {"task": task, "method": method, "prompt": prompt or f"prompts/{method}"}
    facts |= {"shots": shots, "seed": seed, "digest": prompt or method, "data": "0"}
    known = {"model": "google-t5/t5-base", "learning_rate": 0.003}
    return {**facts, "settings": {**known, **(settings or {})}, "accuracy": accuracy, **more}


def results(method, accuracies, *rest, **more):
    """The lines of results of one prompt, a seed each."""
    return [result(method, a, seed, *rest, **more) for seed, a in enumerate(accuracies)]


def write(tmp_path, rows):
    data.write_lines(tmp_path / "results.jsonl", rows)
    return str(tmp_path / "results.jsonl")


@pytest.fixture
def printed(tmp_path, capsys):
    """What the report prints of some rows, with single spaces."""

    def run(rows, *flags):
        report.main([write(tmp_path, rows), *flags])
        return " ".join(capsys.readouterr().out.split())

    return run


def test_report_beside_the_papers_tables(printed):
    how = {"source_task": "yelp5"}
    rows = results("maml", METAPT, clustering="kmeans", clusters=10)
    rows.append(result("ppt", 0.99, 0, digest="of an earlier prompt"))
    rows += results("ppt", PPT)
    rows += [
        result("maml", 0.43, 0, "prompts/label", clustering="label"),
        result("maml", 0.1, 0, "prompts/own", clustering=None),  # not cluster.py's clusters
        result("maml", 0.9, 0, task="mine"),
        result("maml", 0.42, 0, "prompts/mixed", clustering="random", **how),
        result("maml", 0.5, 0, "prompts/y", clustering="kmeans", **how),
        result("ft", 0.44, 0, "none"),
        result("ft", 0.3, 0, "none", settings={"learning_rate": 0.1}),
        result("ft", 0.99, 0, "none", shots=80),
        result("ft", 0.2, 0, "none", settings={"model": "other"}),
    ]
    text = printed(rows)
    assert f"results.jsonl: {len(rows) - 1} results left out: 1 results of a prompt" in text
    maml = "45.00 ± 1.58; paper 45.26±0.39, -0.26 | **90.00** (1)"
    for line in [
        "| t5-base | 40 | MetaPT | prompts/own | 10.00 (1); paper 45.26±0.39, -35.26 | - |",
        "| t5-base | 40 | MetaPT, label | prompts/label | 43.00 (1) | - |",
        f"| t5-base | 40 | MetaPT | prompts/maml | {maml} |",
        "| t5-base | 40 | PPT | prompts/ppt | 43.00 ± 1.58; paper 42.90±1.08, +0.10 | - |",
        "| t5-base | 40 | MetaPT(Y) | prompts/y | **50.00** (1); paper 46.24±0.42, +3.76 | - |",
        "| t5-base | 40 | FT | learning_rate 0.003 | 44.00 (1); paper 43.57±2.56, +0.43 | - |",
        "| t5-base | 80 | FT | learning_rate 0.003 | **99.00** (1) | - |",
        "| other | 40 | FT | learning_rate 0.003 | **20.00** (1) | - |",
        "| MetaPT(Y), random | prompts/mixed | 42.00 (1); paper 42.95±1.05, -0.95 | - |",
    ]:
        assert line in text

    paired = stats.ttest_rel(np.multiply(100, PPT), np.multiply(100, METAPT))
    low, high = paired.confidence_interval()
    assert f"| t5-base | 40 | PPT | prompts/ppt | -2.00 [{low:+.2f}, {high:+.2f}] | - |" in text


def test_only_runs_on_the_same_examples_are_compared(printed):
    rows = results("maml", [0.5] * 3)
    rows += results("ppt", [0.3] * 3, settings={"max_test": 200})
    rows += results("maml", [0.6] * 3, task="sst2", settings={"max_test": 100})
    rows += results("ft", [0.7] * 3, "none", task="sst2", settings={"max_test": 100})
    text = printed(rows, "--against", "MetaPT")
    assert "| t5-base | 40, max_test 200 | PPT | prompts/ppt | **30.00 ± 0.00** (3);" in text
    assert "| t5-base | 40, max_test 200 | PPT | prompts/ppt | - | - |" in text
    assert "| FT | - | - | **+10.00 [+10.00, +10.00]** |" in text  # which sst5 has no line of


def test_lines_are_the_newest_and_of_one_prompt_length(printed):
    rows = [result("ppt", 0.1, seed, data="of an earlier test.jsonl") for seed in (1, 2, 3)]
    rows += [result("ppt", 0.4, 1)]
    rows += [result("ppt", 0.5, 1, data="as t5-base's not", settings={"model": "other"})]
    for length, seed in ((20, 1), (20, 2), (100, 1)):
        settings = {"prompt_length": length}
        rows.append(result("random", length / 100, seed, "random", settings=settings))
    text = printed(rows)
    assert "left out: 3 results of a prompt, a task or a T5" in text
    assert "| PPT | prompts/ppt | 40.00 (1)" in text and "| **50.00** (1)" in text
    assert "| random, prompt_length 20 | 20.00 ± 0.00 (2)" in text
    assert "| random, prompt_length 100 | **100.00** (1)" in text


def test_settings_that_only_earlier_results_name_make_no_other_line(printed):
    before = {"weight_decay": 0.0, "max_steps": None, "balanced": False}
    rows = results("ppt", PPT[:3], settings=before)
    rows += results("ppt", PPT)[3:]
    assert "| t5-base | 40 | PPT | prompts/ppt | **43.00 ± 1.58**; paper" in printed(rows)
    rows[0]["settings"]["weight_decay"] = 0.1
    assert "| PPT | prompts/ppt, weight_decay 0.1 | 41.00 (1)" in printed(rows)


def test_runs_of_a_search_share_a_line_whatever_rate_each_chose(printed):
    tried = {"learning_rate": [0.003, 0.0003]}
    rows = [
        result("ft", 0.4, seed, "none", settings=tried, learning_rate=rate)
        for seed, rate in enumerate(tried["learning_rate"])
    ]
    assert "| FT | - | **40.00 ± 0.00** (2)" in printed(rows)


def test_namesakes_are_told_apart_and_one_training_in_two_folders_is_one(printed):
    rows = [result("ft", 0.3, 1, "none", settings={"model": "a/t5"})]
    rows += [result("ft", 0.9, 1, "none", settings={"model": "b/t5"})]
    for name, digest in (("metapt", "one"), ("k10", "one"), ("again", "two")):
        rows += results("maml", METAPT, name, recipe="a", digest=digest)
    text = printed(rows)
    assert "| a/t5 | 40 | FT | - | **30.00** (1) |" in text
    assert "| b/t5 | 40 | FT | - | **90.00** (1) |" in text
    assert "| t5-base | 40 | MetaPT | metapt, k10, again | **45.00 ± 1.49** (2 × 5)" in text
    assert "(7)" in printed(rows[:-3])  # five draws with one training, two with the other


def test_trainings_of_one_prompt_share_a_line_and_widen_its_interval(printed):
    rows = []
    for training, shift in enumerate([-0.03, 0, 0.03]):
        rows += results("maml", np.add(METAPT, shift), f"maml-{training}", recipe="a")
    rows += results("ppt", PPT, "ppt-0", recipe="b")
    assert "Against maml-1" in printed(rows, "--against", "maml-1")  # any prompt names its line
    text = printed(rows, "--against", "ppt-0")
    deviation = np.std(100 * np.add.outer([-0.03, 0, 0.03], METAPT), ddof=1)
    name = "| t5-base | 40 | MetaPT | maml-0, maml-1, maml-2 |"
    assert f"{name} **45.00 ± {deviation:.2f}** (3 × 5)" in text

    over_draws = 100**2 * np.subtract(METAPT, PPT).var(ddof=1) / 5
    over_trainings = 9 / 3
    variance = over_draws + over_trainings
    freedom = variance**2 / (over_draws**2 / 4 + over_trainings**2 / 2)
    half = stats.t.ppf(0.975, freedom) * variance**0.5
    assert f"{name} +2.00 [{2 - half:+.2f}, {2 + half:+.2f}] |" in text


def test_a_training_of_fewer_draws_widens_no_interval(printed):
    rows = results("maml", METAPT, "maml-1", recipe="a") + results("ppt", PPT, "ppt-0")
    half = stats.t.ppf(0.975, 4) * 100 * np.subtract(METAPT, PPT).std(ddof=1) / 5**0.5
    expected = f"+2.00 [{2 - half:+.2f}, {2 + half:+.2f}] |"
    assert expected in printed(rows, "--against", "PPT")
    rows.append(result("maml", METAPT[4], 4, "maml-2", recipe="a"))
    assert expected in printed(rows, "--against", "ppt")


@pytest.mark.parametrize(
    "ours, theirs, shown",
    [
        (METAPT, [0.43, 0.439, 0.418, 0.447, 0.406], "+2.20 [+2.00, +2.40]"),
        ([0.5] * 5, [0.25] * 5, "+25.00 [+25.00, +25.00]"),  # an interval of no width
    ],
)
def test_a_gain_whose_interval_leaves_out_0_is_bold(printed, ours, theirs, shown):
    rows = results("maml", ours) + results("ppt", theirs)
    assert f"**{shown}**" in printed(rows, "--against", "prompts/ppt")


@pytest.mark.parametrize("x", ["shots", "source_size", "clusters"])
def test_figure(tmp_path, x, printed, monkeypatch):
    plotted, plot = [], report.plot
    monkeypatch.setattr(report, "plot", lambda *args: plotted.append(plot(*args)) or plotted[0])
    rows = [result("ft", 0.3, 1, "none", shots=shots) for shots in (10, 20)]
    for at in (30, 10):
        facts = {"shots": 40, "clusters": 10, "source_size": 1000, x: at}
        prompt = None if x == "shots" else f"prompts/{at}"
        for task in ("sst5", "sst2"):
            rows += results("maml", [0.4 + at / 1000, 0.41 + at / 1000], prompt, task, **facts)

    figure = tmp_path / "figures" / "figure.png"
    printed(rows, "--figure", str(figure), "--x", x)
    assert figure.read_bytes().startswith(b"\x89PNG")
    panels = plotted[0].axes
    assert [panel.get_title() for panel in panels] == ["sst5", "sst2"]
    assert panels[0].get_xscale() == ("linear" if x == "clusters" else "log")
    points = panels[1].lines[-1].get_xydata().tolist()
    assert points == [[10, pytest.approx(41.5)], [30, pytest.approx(43.5)]]
    assert len(panels[0].lines) == (2 if x == "shots" else 1)


GOOD = results("maml", METAPT)


@pytest.mark.parametrize(
    "rows, flags, message",
    [
        (None, [], "no such file"),
        ([], [], "no results here; finetune.py --out writes them"),
        ([{**GOOD[0], "accuracy": "high"}], [], "results.jsonl:1: "),
        (GOOD, ["--against", "PTT"], "no PTT to compare with, only MetaPT, prompts/maml"),
        (GOOD, ["--figure", "a.png"], "no method was run with more than one value of shots"),
        (GOOD, ["--figure", "a.txt"], "must end in .png, .pdf or .svg"),
    ],
)
def test_bad_results_and_flags_end_in_one_line(tmp_path, capsys, rows, flags, message):
    path = str(tmp_path / "results.jsonl") if rows is None else write(tmp_path, rows)
    with pytest.raises(SystemExit, match="2"):
        data.run(lambda: report.main([path, *flags]))
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


@pytest.mark.parametrize("count", [1, 200])  # less than a buffer holds, and more
def test_a_reader_that_has_enough_ends_a_report_quietly(tmp_path, monkeypatch, capfd, count):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    rows = [result("maml", 0.5, seed, f"prompts/{200 * 'x'}{seed}") for seed in range(count)]
    with pytest.raises(SystemExit, match="1"):
        data.run(lambda: report.main([write(tmp_path, rows)]))
    sys.stdout.close()  # as a process does at its end, and may not fail either
    assert not capfd.readouterr().err


@pytest.mark.parametrize("only", ["step precision", "downstream"])
def test_speed(capsys, only):
    if only == "downstream":
        pytest.importorskip("peft")
    flags = f"--tasks 1 --m 2 --rounds 1 --prompt-length 2 --compare loop vmap --only {only}"
    speed.main(flags.split())
    text = capsys.readouterr().out
    errors = [float(line.split()[-1]) for line in text.splitlines() if " by " in line]
    assert len(errors) == (1 if only == "downstream" else 6) and max(errors) < 1e-5
    assert "\npeft" in text if only == "downstream" else "\nbfloat16 weights" in text


def test_the_texts_that_are_timed_have_as_many_tokens_as_said():
    model, said = speed.make_model("tiny", "cpu"), {False: [40, 40, 40], True: [25, 22, 38]}
    for sst, lengths in said.items():
        batch = model.encode(speed.make_examples(3, 40, sst))
        assert batch["attention_mask"].sum(1).tolist() == lengths


def test_every_command_of_the_gpu_script_is_one(tmp_path, monkeypatch, capsys):
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/sh\necho "$@" >> "$OUT/ran"\n')
    recorder.chmod(0o755)
    (tmp_path / "inputs").mkdir()
    places = {"OUT": str(tmp_path), "INPUTS": str(tmp_path / "inputs")}
    env = {**os.environ, **places, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", Path(speed.__file__).with_name("gpu.sh")], env=env, check=True)
    commands = (tmp_path / "ran").read_text().splitlines()
    assert len(commands) == 6 + 1 + 9 + 3 + 30 + 1
    for script in {command.split()[0] for command in commands}:
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(script, run_name="__main__")
        known = set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out))
        for command in commands:
            if command.startswith(script):
                assert set(re.findall(r"--[a-z][\w-]+", command)) <= known, command
