"""
The paper's Tables 1 and 2 and Figures 2, 3a and 3b, from the results of finetune.py.

    python figures/report.py results.jsonl --against PPT                     # Tables 1 and 2
    python figures/report.py results.jsonl --figure shots.png --x shots      # Figure 2
    python figures/report.py size.jsonl --figure size.png --x source_size    # Figure 3a
    python figures/report.py k.jsonl --figure k.png --x clusters             # Figure 3b

A table has a line for each model, number of shots, method and prompt. Behind our score stands the
paper's, where it has one. A second table has every line's gain over one of them: is it real?
"""

import itertools
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from finetune import LEGEND, in_points, method_name, print_table, read_results, spread
from metapt import InputError, blame

# The paper's own results, of 40 shots and five seeds: Tables 1 and 2, whose K-means is MetaPT(Y).
PAPER_TASKS = "sst5 sst2 amazon5 amazon2 sentihood semeval_restaurant semeval_laptop".split()
PAPER = """
t5-base  FT        43.57±2.56 88.27±1.03 48.40±1.48 92.35±0.68 82.11±1.30 71.01±1.16 62.48±3.23
t5-base  PPT       42.90±1.08 87.42±1.15 51.15±1.56 93.28±0.21 80.06±3.31 62.04±3.34 56.37±4.11
t5-base  MetaPT    45.26±0.39 89.47±0.12 55.47±0.34 94.43±0.08 80.38±0.46 76.93±1.19 70.86±1.95
t5-base  MetaPT(Y) 46.24±0.42 87.26±0.73 58.73±0.13 95.39±0.03 78.27±1.17 80.72±0.60 72.32±0.66
t5-large MetaPT    47.31±0.21 89.61±0.09 55.76±0.15 95.23±0.03 85.78±0.10 85.96±0.08 77.49±0.11
t5-base  MetaPT(Y),lda    44.10±0.83
t5-base  MetaPT(Y),random 42.95±1.05
t5-base  MetaPT(Y),label  42.84±0.76
"""
DRAWS = ("validation_shots", "balanced", "max_test")  # runs with others are of other examples


# ------------------------------------------------------------------- The lines of a table or figure

# What a line is called. Lines of one model, x and draws were tuned and tested on the same examples.
# x is the number of shots, or what a figure's horizontal axis shows.
Name = namedtuple("Name", "model x draws method details")


def newest(results):
    """The rows without those of a prompt, a task or a T5 that was made anew under its old name
    since."""
    prompts = {row["prompt"]: row["digest"] for row in results if row["prompt"] != "random"}
    tasks = {(row["task"], row["settings"]["model"]): row["data"] for row in results}

    def is_current(row):
        same_prompt = prompts.get(row["prompt"], row["digest"]) == row["digest"]
        return same_prompt and tasks[row["task"], row["settings"]["model"]] == row["data"]

    return [row for row in results if is_current(row)]


def table_lines(results, x="shots", others=()):
    """The lines of a table: {Name: {task: {(start, seed): row}}}.

    A line's details are its prompt, or all trainings of one prompt, and what the rows of a method
    differ in, of the settings and `others`. Where x is not the shots, a line is of all prompts of
    one x. The start is a learned prompt's digest: the same one in two folders is one training.
    """
    # A search's line has all rates as its setting, and beside them the one that was chosen.
    rows = [{**row, **row["settings"]} for row in results]
    models = {row["model"] for row in rows}
    namesakes = Counter(Path(model).name for model in models)
    short = {m: Path(m).name if namesakes[Path(m).name] == 1 else m for m in models}

    trainings = {}  # the folders of each recipe, in their order
    for row in rows:
        row["recipe"] = str(row.get("recipe") or row["prompt"])
        trainings.setdefault(row["recipe"], {})[row["prompt"]] = None

    keys = dict.fromkeys(key for row in results for key in row["settings"])
    settings = [key for key in keys if key not in ("model", *DRAWS)]
    draws = differing(rows, DRAWS, "task")
    details = differing(rows, [*others, *settings], "method")

    lines = {}
    for row, drawn, detail in zip(rows, draws, details):
        if x == "shots" and row["method"] != "ft":
            detail = [*trainings[row["recipe"]], *detail]
        parts = ", ".join(drawn), method_name(row), ", ".join(detail)
        start = row["method"] if row["method"] in ("random", "ft") else row["digest"]
        line = lines.setdefault(Name(short[row["model"]], row[x], *parts), {})
        line.setdefault(row["task"], {})[start, row["seed"]] = row

    return dict(sorted(lines.items(), key=lambda line: line[0][:3]))


def differing(rows, keys, group):
    """For each row those of `keys`, as text, in which the rows of one `group` differ."""
    values = {}
    for row in rows:
        for key in keys:
            values.setdefault((row[group], key), set()).add(str(row.get(key)))

    details = []
    for row in rows:
        shown = [key for key in keys if len(values[row[group], key]) > 1]
        details.append([f"{key} {row[key]}" for key in shown if row.get(key)])

    return details


def fill_table(lines, cell):
    """Rows of a table: one for each line of results, with a column for each task. `cell` gives the
    text from the line's name and the task."""
    tasks = list(dict.fromkeys(task for tasks in lines.values() for task in tasks))
    rows = [["model", "shots", "method", "prompt", *tasks]]
    for name, line in lines.items():
        cells = [cell(name, task) if task in line else "-" for task in tasks]
        shots = f"{name.x}, {name.draws}" if name.draws else str(name.x)
        rows.append([name.model, shots, name.method, name.details or "-", *cells])
    return rows


# -------------------------------------------------------------------------------- Tables 1 and 2


def score_table(lines):
    """Table 1's form: the best of each model and number of shots in bold; behind it what the paper
    has for the same."""
    best = {}
    for name, tasks in lines.items():
        for task, line in tasks.items():
            best.setdefault((*name[:3], task), []).append(spread(line.values())[0])

    def cell(name, task):
        line = lines[name][task]
        mean, _, count = spread(line.values())
        text = in_points(line.values())
        if mean == max(best[*name[:3], task]):
            text = f"**{text}**"

        trainings, seeds = len({start for start, _ in line}), len({seed for _, seed in line})
        if trainings > 1 and count == trainings * seeds:
            text += f" ({trainings} × {seeds})"
        elif trainings > 1 or count != 5:
            text += f" ({count})"

        theirs = paper_value(name, task)
        if theirs:
            text += f"; paper {theirs}, {mean - float(theirs.split('±')[0]):+.2f}"
        return text

    return fill_table(lines, cell)


def paper_value(name, task):
    """What the paper has for a line's model and method, at 40 shots; else None."""
    for line in PAPER.strip().splitlines():
        model, method, *values = line.split()
        if name.x == 40 and (name.model, name.method.replace(" ", "")) == (model, method):
            return dict(zip(PAPER_TASKS, values)).get(task)
    return None


# ------------------------------------------------------------------------------ Is a gain real?


def gain(ours, theirs):
    """How far we are ahead of them on average, and half of the 95 % t interval of that.

    ours, theirs: scores [trainings of a prompt, draws of examples], at least two draws; nan where
    there is none. Both are tuned on the same draws, so these are compared in pairs. Where there are
    several trainings, the variance over them is added to that over draws: the interval is then
    about the next training and the next draw.
    """
    gains = np.nanmean(ours, axis=0) - np.nanmean(theirs, axis=0)
    variances = [(gains.var(ddof=1) / len(gains), len(gains) - 1)]
    for scores in (ours, theirs):
        complete = scores[:, ~np.isnan(scores).any(axis=0)]  # the draws that every training has
        trainings = len(complete)
        if trainings > 1 and complete.size:
            variances.append((complete.mean(axis=1).var(ddof=1) / trainings, trainings - 1))

    variance = sum(one for one, _ in variances)
    if variance == 0:
        return gains.mean(), 0.0
    # Welch and Satterthwaite's degrees of freedom, of a sum of variances.
    freedom = variance**2 / sum(one**2 / degrees for one, degrees in variances)
    return gains.mean(), stats.t.ppf(0.975, freedom) * variance**0.5


def scores_of(line, seeds):
    """The accuracies of a line {(start, seed): row}, in points: [starts, seeds]."""
    starts = list(dict.fromkeys(start for start, _ in line))
    scores = np.full((len(starts), len(seeds)), np.nan)
    for (start, seed), row in line.items():
        if seed in seeds:
            scores[starts.index(start), seeds.index(seed)] = 100 * row["accuracy"]
    return scores


def gain_table(lines, against):
    """Table 1: every line's gain over the one that is called `against`, of the same model, shots
    and draws, and that gain's interval."""

    def cell(name, task):
        alike = [other for other in lines if other[:3] == name[:3] and task in lines[other]]
        called = [other for other in alike if against in names_of(other)]
        if not called or called[0] == name:
            return "-"

        ours, theirs = lines[name][task], lines[called[0]][task]
        seeds = sorted({seed for _, seed in ours} & {seed for _, seed in theirs})
        if len(seeds) < 2:
            return "-"

        mean, half = gain(scores_of(ours, seeds), scores_of(theirs, seeds))
        text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        return f"**{text}**" if half < abs(mean) else text

    return fill_table(lines, cell)


def names_of(name):
    """What a line may be called: by its method, by its details, or by one of these."""
    return [part for part in (name.method, name.details, *name.details.split(", ")) if part]


def find_reference(lines, wanted=None):
    """The name in `lines` to compare with: `wanted`, where ppt may stand for PPT, or else the first
    MetaPT. Raises ValueError where no line is called so."""
    names = list(dict.fromkeys(part for name in lines for part in names_of(name)))
    wanted = wanted or next((name.details for name in lines if name.method == "MetaPT"), names[0])
    alike = [name for name in names if name.lower() == wanted.lower()]
    if not alike:
        raise ValueError(f"no {wanted} to compare with, only {', '.join(names)}")
    return wanted if wanted in alike else alike[0]


# --------------------------------------------------------------------------- Figures 2, 3a and 3b


def curves(results, x):
    """{name: {x: {task: {(start, seed): row}}}}: the lines of Figure 2 (x is shots), 3a
    (source_size) or 3b (clusters), each of at least two points. A point of Figure 3 is of all
    prompts of its size or number. Raises ValueError where there is none."""
    others = ["model"]
    if x != "shots":
        others = [key for key in ("shots", "source_size", "clusters", "model") if key != x]

    found = {}
    rows = [row for row in results if isinstance(row.get(x), int)]
    for name, tasks in table_lines(rows, x, others).items():
        found.setdefault((name.method, name.draws, name.details), {})[name.x] = tasks

    found = {name: curve for name, curve in found.items() if len(curve) > 1}
    if not found:
        raise ValueError(f"no method was run with more than one value of {x}: nothing to plot")

    labelled, methods = {}, Counter(method for method, _, _ in found)
    for name, curve in found.items():
        # The details only where another line is of the same method.
        parts = name if methods[name[0]] > 1 else name[:1]
        labelled[", ".join(filter(None, parts))] = curve

    return labelled


def plot(curves, x):
    """Figure 2 or 3: a panel for each task, a line for each method, the mean over the seeds in a
    band of one standard deviation. Returns matplotlib's figure."""
    ticks = {}  # of each task's panel
    for curve in curves.values():
        for at, tasks in curve.items():
            for task in tasks:
                ticks.setdefault(task, set()).add(at)

    labels = {"shots": "training examples", "source_size": "source examples"}
    figure = Figure(figsize=(1 + 4 * len(ticks), 4.5), layout="constrained")
    panels = figure.subplots(1, len(ticks), squeeze=False)[0]
    for panel, task in zip(panels, ticks):
        styles = itertools.cycle(["o-", "s--", "^:", "D-.", "v-", "P--"])
        for (name, curve), style in zip(curves.items(), styles):
            xs = [at for at in curve if task in curve[at]]
            points = [spread(curve[at][task].values())[:2] for at in xs]
            means, deviations = np.array(points).reshape(-1, 2).T
            panel.plot(xs, means, style, label=name)
            panel.fill_between(xs, means - deviations, means + deviations, alpha=0.15, linewidth=0)

        if x != "clusters":
            panel.set_xscale("log", base=2 if x == "shots" else 10)
        marks = sorted(ticks[task])
        rotation = 30 if x == "source_size" else 0
        panel.set_xticks(marks, [f"{at:,}" for at in marks], rotation=rotation)
        panel.minorticks_off()
        panel.set(title=task, xlabel=labels.get(x, x))

    panels[0].set_ylabel("accuracy in points")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(4, 2 * len(ticks)), frameon=False)
    return figure


# ---------------------------------------------------------------------------------------- The run

SCORES = (
    "Tables 1 and 2: accuracy in points, mean ± sample standard deviation over five seeds, over "
    "(so many), or over (trainings of the prompt × seeds)."
)
GAINS = (
    "mean difference in points, paired over the seeds, with its 95 % t interval over seeds, two at "
    "least, and over trainings where there are several; bold where it leaves out 0."
)


def main(argv=None):
    """Prints the tables of a results file, and plots one figure of it."""
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("results", type=data.existing("file"), help="what finetune.py --out wrote")
    add("--against", metavar="NAME", help="compares with this method or prompt (default: MetaPT)")
    add("--figure", type=data.picture, metavar="FILE", help="plots it here, .png, .pdf or .svg")
    add("--x", choices=["shots", "source_size", "clusters"], default="shots", help="the x axis")
    args = parser.parse(argv)

    known = read_results(Path(args.results)).values()
    if not known:
        raise InputError(f"{args.results}: no results here; finetune.py --out writes them")

    results = newest(known)
    print(f"{args.results}: {len(results)} results")
    if len(known) > len(results):
        older = len(known) - len(results)
        print(f"left out: {older} results of a prompt, a task or a T5 that was made anew since")

    lines = table_lines(results)
    with blame(args.results, "give --against one of these"):
        against = find_reference(lines, args.against)

    print_table(SCORES, score_table(lines))
    print(LEGEND)
    print_table(f"Against {against}: {GAINS}", gain_table(lines, against))
    if args.figure:
        with blame(args.results, "run one with several"):
            found = curves(results, args.x)
        data.save_figure(args.figure, plot(found, args.x))


if __name__ == "__main__":
    data.run(main)
