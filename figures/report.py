"""
The paper's Tables 1 and 2 and Figures 2, 3a and 3b, from the results of finetune.py.

    python figures/report.py results.jsonl --against PPT                     # Tables 1 and 2
    python figures/report.py results.jsonl --figure shots.png --x shots      # Figure 2
    python figures/report.py size.jsonl --figure size.png --x source_size    # Figure 3a
    python figures/report.py k.jsonl --figure k.png --x clusters             # Figure 3b

A table has a line for all runs that share model, shots, method, prompt and settings; behind our
score stands the paper's. A second table has every line's gain over one of them: is it real?
"""

import itertools
import sys
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, str(Path(__file__).parents[1]))
import finetune
import script
from finetune import in_points, method_name, print_table, read_results, spread
from metapt import InputError, digest, input_errors

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
rcParams["text.parse_math"] = False  # a name is text, whatever it holds
# What a figure's horizontal axis can show, and what beside it tells its curves apart.
AXES = {"shots": [], "source_size": ["shots", "clusters"], "clusters": ["shots", "source_size"]}


# ------------------------------------------------------------------- The lines of a table or figure


# The runs that share all but the task and the seeds: a line of a table, or a point of a curve. x is
# the number of shots, or what a figure's horizontal axis shows; prompt its folders, and behind them
# unusual settings; row any of the results; runs {task: {(training, seed): row}}, a training being
# a prompt's recipe and seed.
Line = namedtuple("Line", "model x method prompt row runs")


def table_lines(rows, x="shots"):
    """The Lines of results, by model and x. Where x is not the shots, a line is of all prompts of
    one x. A training counts once, in whatever folder it lies: its newest run does."""
    made_of = [row["made_of"] for row in rows]
    t5s = [made["--model"] for made in made_of]
    models = tell_apart([Path(row["model"]).name for row in rows], t5s)
    data = [[made["task.json"], made["train.jsonl"], made["test.jsonl"]] for made in made_of]
    tasks = tell_apart([row["task"] for row in rows], data)

    # A prompt without a recipe, PEFT's, is its own.
    recipes = [row.get("recipe") or row["made_of"]["start"] or row["prompt"] for row in rows]
    methods = [method_name(row) for row in rows]
    folders = {}
    for row, method, recipe in zip(rows, methods, recipes):
        folders.setdefault((method, recipe), {})[row["prompt"]] = None
    names = [", ".join(folders[method, recipe]) for method, recipe in zip(methods, recipes)]
    prompts = tell_apart(names, recipes)

    lines = {}
    unusual = unusual_settings(rows, AXES[x])
    for i, row in enumerate(rows):
        details = list(unusual[i])
        if x == "shots" and row["tuning"] == "pt":
            details.insert(0, prompts[i])
        key = (models[i], row[x], methods[i], ", ".join(details))
        line = lines.setdefault(key, Line(*key, row, {}))
        training = (recipes[i], row.get("prompt_seed"))
        line.runs.setdefault(tasks[i], {})[training, row["seed"]] = row

    return sorted(lines.values(), key=lambda line: (line.model, line.x))


def tell_apart(names, values):
    """The names of the values, behind a name that has several the beginning of each one's digest."""
    pairs = list(zip(names, map(digest, values)))
    count = Counter(name for name, _ in set(pairs))
    return [name if count[name] == 1 else f"{name} ({value[:6]})" for name, value in pairs]


def unusual_settings(rows, facts):
    """For each row, as texts, the settings that are not the published ones of its tuning, and these
    facts; those that all rows share are left out."""
    defaults = vars(finetune.make_parser().parse_args([]))
    defaults |= {"max_length": script.MAX_LENGTH, "prompt_length": 100}
    unusual = []
    values = {}
    for row in rows:
        usual = {**defaults, **finetune.SETTINGS[row["tuning"]]}
        texts = {}
        for name, value in {**row["settings"], **{fact: row.get(fact) for fact in facts}}.items():
            text = name if value is True else f"{name} {value}"
            texts[name] = "" if value == usual.get(name) else text
            values.setdefault(name, set()).add(texts[name])
        unusual.append(texts)

    shared = {name for name, of_rows in values.items() if len(of_rows) == 1}
    for i, texts in enumerate(unusual):
        unusual[i] = [text for name, text in texts.items() if text and name not in shared]
    return unusual


def comparable(line, lines, task):
    """The lines that differ from a line by their method alone, itself among them: they share model,
    x and every setting; those of the tuning's own (A.1, A.4) only where the tuning is the same."""
    alike = []
    for other in lines:
        names = finetune.SHARED
        if other.row["tuning"] == line.row["tuning"]:
            names = (*names, *finetune.OWN[line.row["tuning"]], "prompt_length")
        ours = [line.row["settings"].get(name) for name in names]
        theirs = [other.row["settings"].get(name) for name in names]
        if task in other.runs and (line.model, line.x, ours) == (other.model, other.x, theirs):
            alike.append(other)
    return alike


def add_means(lines):
    """Gives each line that has every task the mean over them as one more, run by run."""
    tasks = {task for line in lines for task in line.runs}
    for line in lines:
        of_tasks = list(line.runs.values())
        for run in of_tasks[0]:
            accuracies = [runs[run]["accuracy"] for runs in of_tasks if run in runs]
            if 1 < len(accuracies) == len(tasks):
                means = line.runs.setdefault(f"mean of {len(tasks)}", {})
                means[run] = {"accuracy": np.mean(accuracies)}


def fill_table(lines, cell):
    """Rows of a table: one for each line, with cell(line, task) in the column of each task."""
    tasks = list(dict.fromkeys(task for line in lines for task in line.runs))
    rows = [["model", "shots", "method", "prompt", *tasks]]
    for line in lines:
        cells = [cell(line, task) if task in line.runs else "-" for task in tasks]
        rows.append([line.model, str(line.x), line.method, line.prompt or "-", *cells])
    return rows


# ----------------------------------------------------------------- Tables 1 and 2: is a gain real?


def score_table(lines):
    """Table 1's form: the best of several comparable lines in bold; behind it the paper's own."""

    def cell(line, task):
        runs = line.runs[task]
        mean, _, count = spread(runs.values())
        rivals = comparable(line, lines, task)
        best = max(spread(rival.runs[task].values())[0] for rival in rivals)
        text = in_points(runs.values())
        if len(rivals) > 1 and mean == best:
            text = f"**{text}**"

        trainings = len({training for training, _ in runs})
        seeds = len({seed for _, seed in runs})
        if min(trainings, seeds) > 1 and count == trainings * seeds:
            text += f" ({trainings} × {seeds})"
        elif trainings > 1 or count != 5:
            text += f" ({count})"

        theirs = paper_value(line, task)
        if theirs:
            text += f"; paper {theirs}, {mean - float(theirs.split('±')[0]):+.2f}"
        return text

    return fill_table(lines, cell)


def paper_value(line, task):
    """What the paper has for a line's model and method, at 40 shots; else None."""
    for words in PAPER.strip().splitlines():
        model, method, *values = words.split()
        if line.x == 40 and (line.model, line.method.replace(" ", "")) == (model, method):
            return dict(zip(PAPER_TASKS, values)).get(task)


def gain(ours, theirs):
    """The mean gain of ours over theirs, and half its 95 % t interval; None where nothing varies.

    ours, theirs: scores [trainings of a prompt, draws of examples], nan where there is none; one
    column where no draw enters. Both are tuned on the same draws, so these are compared in pairs.
    Where there are several trainings, the variance over them is added to that over draws: the
    interval is then about the next training and the next draw.
    """
    gains = np.nanmean(ours, axis=0) - np.nanmean(theirs, axis=0)
    samples = [gains]
    for scores in (ours, theirs):
        complete = scores[:, ~np.isnan(scores).any(axis=0)]  # the draws that every training has
        if complete.size:
            samples.append(complete.mean(axis=1))

    samples = [sample for sample in samples if len(sample) > 1]
    variances = np.array([sample.var(ddof=1) / len(sample) for sample in samples])
    variance = variances.sum()
    if variance < 1e-12:  # squared points: rounding, for no test split is so large
        return gains.mean(), None
    # Welch and Satterthwaite's degrees of freedom, of a sum of variances.
    degrees = np.array([len(sample) - 1 for sample in samples])
    freedom = variance**2 / (variances**2 / degrees).sum()
    return gains.mean(), stats.t.ppf(0.975, freedom) * variance**0.5


def scores_of(runs, seeds):
    """The accuracies of runs {(training, seed): row}, in points: [trainings, seeds]. A run that no
    draw enters, of seed None, is the same at every seed."""
    trainings = list(dict.fromkeys(training for training, _ in runs))
    scores = np.full((len(trainings), len(seeds)), np.nan)
    for (training, seed), row in runs.items():
        columns = [seed in (one, None) for one in seeds]
        scores[trainings.index(training), columns] = 100 * row["accuracy"]
    return scores


def gain_table(lines, against):
    """Table 1: every line's gain over the first comparable line called `against`, its interval."""

    def cell(line, task):
        called = [other for other in comparable(line, lines, task) if against in names_of(other)]
        if not called or called[0] is line:
            return "-"

        runs = [*line.runs[task], *called[0].runs[task]]
        seeds = sorted({seed for _, seed in runs} - {None}) or [None]
        ours = scores_of(line.runs[task], seeds)
        theirs = scores_of(called[0].runs[task], seeds)
        shared = ~np.isnan(ours).all(axis=0) & ~np.isnan(theirs).all(axis=0)
        if shared.sum() < 2 and seeds != [None]:
            return "-"

        mean, half = gain(ours[:, shared], theirs[:, shared])
        if half is None:
            return f"{mean:+.2f}"
        text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        return f"**{text}**" if half < abs(mean) else text

    return fill_table(lines, cell)


def names_of(line):
    """What a line may be called: by its method, or by a part of its prompt."""
    return [name for name in (line.method, *line.prompt.split(", ")) if name]


# --------------------------------------------------------------------------- Figures 2, 3a and 3b


def curves(rows, x):
    """{name: {task: {x: runs}}}: the curves of Figure 2 (x is shots), 3a (source_size) or 3b
    (clusters), of two points or more each. Raises InputError where there is none."""
    by_key = {}
    for line in table_lines([row for row in rows if row.get(x)], x):  # a log axis has no 0
        curve = by_key.setdefault((line.method, line.prompt, line.model), {})
        for task, runs in line.runs.items():
            curve.setdefault(task, {})[line.x] = runs
    by_key = {key: curve for key, curve in by_key.items() if max(map(len, curve.values())) > 1}
    if not by_key:
        raise InputError(f"no method was run with two values of {x} above 0: run one with several")

    methods = Counter(method for method, _, _ in by_key)
    named = {}
    for key, curve in by_key.items():
        parts = key if methods[key[0]] > 1 else key[:1]
        named[", ".join(filter(None, parts))] = curve
    return named


def plot(named_curves, x):
    """Figure 2 or 3: a panel for each task, a line for each method, the mean over the seeds in a
    band of one standard deviation. Returns matplotlib's figure."""
    tasks = list(dict.fromkeys(task for curve in named_curves.values() for task in curve))
    figure = Figure(figsize=(1 + 4 * len(tasks), 4.5), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks):
        styles = itertools.cycle(["o-", "s--", "^:", "D-.", "v-", "P--"])
        for curve, style in zip(named_curves.values(), styles):
            at = list(curve.get(task, {}))
            points = [spread(curve[task][place].values())[:2] for place in at]
            means, deviations = np.array(points).reshape(-1, 2).T
            panel.plot(at, means, style)
            panel.fill_between(at, means - deviations, means + deviations, alpha=0.15, linewidth=0)

        marks = sorted({at for curve in named_curves.values() for at in curve.get(task, {})})
        if x != "clusters":
            panel.set_xscale("log")
        panel.set_xticks(marks, [f"{at:,}" for at in marks], rotation=30 * (x == "source_size"))
        panel.minorticks_off()
        panel.set_xlabel({"shots": "training examples", "source_size": "source examples"}.get(x, x))
        panel.set_title(task)

    panels[0].set_ylabel("accuracy in points")
    place = {"loc": "outside lower center", "ncols": min(4, 2 * len(tasks)), "frameon": False}
    figure.legend(panels[0].get_lines(), list(named_curves), **place)
    return figure


# ---------------------------------------------------------------------------------------- The run

SCORES = """Tables 1 and 2: accuracy in points, mean ± sample standard deviation over five seeds, over
(so many) or over (trainings × seeds); bold: the best of several lines of one model, shots, settings"""
GAINS = """mean difference between lines of one model, shots and settings, with its 95 % t interval over
paired seeds, and over trainings where there are several; bold where that leaves out 0"""


def main(argv=None):
    """Prints the tables of a results file, and plots one figure of it."""
    parser = script.Parser(__doc__)
    add = parser.add_argument
    add("results", type=Path, help="what finetune.py --out wrote")
    add("--against", metavar="NAME", help="compares with this method or prompt (default: MetaPT)")
    add("--figure", metavar="FILE", help="plots it here, as .png, .pdf or .svg")
    add("--x", choices=list(AXES), default="shots", help="the x axis")
    args = parser.parse(argv)

    rows = list(read_results(args.results).values())
    if not rows:
        raise InputError(f"{args.results}: no results here; finetune.py --out writes them")

    print(f"{args.results}: {len(rows)} results")
    with input_errors(args.results, "give what finetune.py wrote"):
        lines = table_lines(rows)
        add_means(lines)
        names = list(dict.fromkeys(name for line in lines for name in names_of(line)))
    against = args.against or ("MetaPT" if "MetaPT" in names else names[0])
    if against not in names:
        raise InputError(f"--against: no {against} to compare with, only {', '.join(names)}")

    print_table(SCORES, score_table(lines))
    print(finetune.LEGEND)
    print_table(f"Against {against}: {GAINS}", gain_table(lines, against))
    if args.figure:
        script.save_figure(args.figure, plot(curves(rows, args.x), args.x))


if __name__ == "__main__":
    script.run(main)
