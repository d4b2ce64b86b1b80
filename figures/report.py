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
DATA = ("task.json", "train.jsonl", "test.jsonl")  # what the name of a task stands for
# What a figure's horizontal axis can show, and what beside it tells its lines apart.
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
    models = tell_apart([Path(row["model"]).name for row in rows], [m["--model"] for m in made_of])
    tasks = tell_apart([row["task"] for row in rows], [[m[file] for file in DATA] for m in made_of])

    # A prompt without a recipe, PEFT's, is its own.
    recipes = [row.get("recipe") or row["made_of"]["start"] or row["prompt"] for row in rows]
    methods = [method_name(row) for row in rows]
    folders = {}
    for row, method, recipe in zip(rows, methods, recipes):
        folders.setdefault((method, recipe), {})[row["prompt"]] = None
    prompts = tell_apart([", ".join(folders[key]) for key in zip(methods, recipes)], recipes)

    lines = {}
    for i, (row, details) in enumerate(zip(rows, unusual_settings(rows, AXES[x]))):
        if x == "shots" and row["tuning"] == "pt":
            details = [prompts[i], *details]
        name = (models[i], row[x], methods[i], ", ".join(details))
        line = lines.setdefault(name, Line(*name, row, {}))
        training = recipes[i], row.get("prompt_seed")
        line.runs.setdefault(tasks[i], {})[training, row["seed"]] = row

    return sorted(lines.values(), key=lambda line: line[:2])


def tell_apart(names, values):
    """The names of the values, behind a name that has several the beginning of each one's digest."""
    digests = list(map(digest, values))
    several = Counter(name for name, _ in set(zip(names, digests)))
    both = zip(names, digests)
    return [name if several[name] == 1 else f"{name} ({value[:6]})" for name, value in both]


def unusual_settings(rows, facts):
    """For each row, as texts, the settings that are not the published ones of its tuning, and these
    facts; those that all rows share are left out."""
    defaults = vars(finetune.make_parser().parse_args([]))
    defaults |= {"max_length": script.MAX_LENGTH, "prompt_length": 100}
    texts, values = [], {}
    for row in rows:
        usual = {**defaults, **finetune.SETTINGS[row["tuning"]]}
        texts.append({})
        for name, value in {**row["settings"], **{f: row.get(f) for f in facts}}.items():
            text = name if value is True else f"{name} {value}"
            text = "search" if value == finetune.RATES else text
            texts[-1][name] = None if value == usual.get(name) else text
            values.setdefault(name, set()).add(texts[-1][name])

    return [[t for name, t in text.items() if t and len(values[name]) > 1] for text in texts]


def comparable(line, lines, task):
    """The lines that differ from a line by their method alone, itself among them: they share model,
    x and every setting; those of the tuning's own (A.1, A.4) only where the tuning is the same."""
    alike = []
    for other in lines:
        names = finetune.SHARED
        if other.row["tuning"] == line.row["tuning"]:
            names = (*names, *finetune.OWN[line.row["tuning"]], "prompt_length")
        ours, theirs = ([one.row["settings"].get(n) for n in names] for one in (line, other))
        if task in other.runs and (line[:2], ours) == (other[:2], theirs):
            alike.append(other)
    return alike


def add_means(lines):
    """Gives each line that has every task the mean over them as one more, run by run."""
    tasks = {task for line in lines for task in line.runs}
    for line in lines:
        if 1 < len(tasks) == len(line.runs):
            several = list(line.runs.values())
            for run in [run for run in several[0] if all(run in runs for runs in several)]:
                mean = np.mean([runs[run]["accuracy"] for runs in several])
                line.runs.setdefault(f"mean of {len(tasks)}", {})[run] = {"accuracy": mean}


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
        means = [spread(one.runs[task].values())[0] for one in comparable(line, lines, task)]
        text = in_points(runs.values())
        if len(means) > 1 and mean == max(means):
            text = f"**{text}**"

        trainings, seeds = (len(set(part)) for part in zip(*runs))
        complete = min(trainings, seeds) > 1 and count == trainings * seeds
        if trainings > 1 or count != 5:
            text += f" ({trainings} × {seeds})" if complete else f" ({count})"

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
    """How far we are ahead of them on average, and half of the 95 % t interval of that; None where
    nothing varies.

    ours, theirs: scores [trainings of a prompt, draws of examples], nan where there is none; one
    column where no draw enters. Both are tuned on the same draws, so these are compared in pairs.
    Where there are several trainings, the variance over them is added to that over draws: the
    interval is then about the next training and the next draw.
    """
    gains = np.nanmean(ours, axis=0) - np.nanmean(theirs, axis=0)
    vectors = [gains]
    for scores in (ours, theirs):
        complete = scores[:, ~np.isnan(scores).any(axis=0)]  # the draws that every training has
        vectors += [complete.mean(axis=1)] if complete.size else []

    variances = [(v.var(ddof=1) / len(v), len(v) - 1) for v in vectors if len(v) > 1]
    variance = sum(one for one, _ in variances)
    if variance < 1e-12:  # squared points: rounding, for no test split is so large
        return gains.mean(), None
    # Welch and Satterthwaite's degrees of freedom, of a sum of variances.
    freedom = variance**2 / sum(one**2 / degrees for one, degrees in variances)
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
        called = [one for one in comparable(line, lines, task) if against in names_of(one)]
        if not called or called[0] is line:
            return "-"

        both = line.runs[task], called[0].runs[task]
        drawn = [{seed for _, seed in runs if seed is not None} for runs in both]
        seeds = list(drawn[0] & drawn[1] if all(drawn) else drawn[0] | drawn[1])
        if any(drawn) and len(seeds) < 2:
            return "-"

        mean, half = gain(*(scores_of(runs, seeds or [None]) for runs in both))
        if half is None:
            return f"{mean:+.2f}"
        text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        return f"**{text}**" if half < abs(mean) else text

    return fill_table(lines, cell)


def names_of(line):
    """What a line may be called: by its method, by its prompt, or by a part of that."""
    return [name for name in (line.method, line.prompt, *line.prompt.split(", ")) if name]


def find_reference(lines, wanted=None):
    """The name in `lines` to compare with: `wanted`, where ppt may stand for PPT, or else MetaPT if
    there is one. Raises InputError where no line is called so."""
    names = list(dict.fromkeys(name for line in lines for name in names_of(line)))
    wanted = wanted or ("MetaPT" if "MetaPT" in names else names[0])
    alike = [name for name in names if name.lower() == wanted.lower()]
    if not alike:
        raise InputError(f"--against: no {wanted} to compare with, only {', '.join(names)}")
    return wanted if wanted in alike else alike[0]


# --------------------------------------------------------------------------- Figures 2, 3a and 3b


def curves(rows, x):
    """{name: {task: {x: runs}}}: the lines of Figure 2 (x is shots), 3a (source_size) or 3b
    (clusters), of two points or more each; a point of Figure 3 is of all prompts of its size or
    number. Raises InputError where there is none."""
    by_name = {}
    for line in table_lines([row for row in rows if isinstance(row.get(x), int)], x):
        curve = by_name.setdefault((line.method, line.prompt, line.model), {})
        for task, runs in line.runs.items():
            curve.setdefault(task, {})[line.x] = runs
    by_name = {n: curve for n, curve in by_name.items() if max(map(len, curve.values())) > 1}
    if not by_name:
        raise InputError(f"no method was run with more than one value of {x}: run one with several")

    methods = Counter(method for method, _, _ in by_name)
    models = {model for _, _, model in by_name}
    labelled = {}
    for name, curve in by_name.items():
        # What is behind the method only where another line is of the same one.
        parts = name if len(models) > 1 else name[:2]
        labelled[", ".join(filter(None, parts)) if methods[name[0]] > 1 else name[0]] = curve
    return labelled


def plot(curves, x):
    """Figure 2 or 3: a panel for each task, a line for each method, the mean over the seeds in a
    band of one standard deviation. Returns matplotlib's figure."""
    tasks = list(dict.fromkeys(task for curve in curves.values() for task in curve))
    figure = Figure(figsize=(1 + 4 * len(tasks), 4.5), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for panel, task in zip(panels, tasks):
        styles = itertools.cycle(["o-", "s--", "^:", "D-.", "v-", "P--"])
        drawn = []
        for curve, style in zip(curves.values(), styles):
            xs = list(curve.get(task, {}))
            points = [spread(curve[task][at].values())[:2] for at in xs]
            means, deviations = np.array(points).reshape(-1, 2).T
            drawn += panel.plot(xs, means, style)
            panel.fill_between(xs, means - deviations, means + deviations, alpha=0.15, linewidth=0)

        marks = sorted({at for curve in curves.values() for at in curve.get(task, {})})
        base = 2 if x == "shots" else 10
        if marks[0] == 0:  # which has its place left of the least other number
            panel.set_xscale("symlog", base=base, linthresh=next(filter(None, marks), 1))
        elif x != "clusters":
            panel.set_xscale("log", base=base)
        panel.set_xticks(marks, [f"{at:,}" for at in marks], rotation=30 * (x == "source_size"))
        panel.minorticks_off()
        panel.set_xlabel({"shots": "training examples", "source_size": "source examples"}.get(x, x))
        panel.set_title(task, parse_math=False)  # a name is text, whatever it holds

    panels[0].set_ylabel("accuracy in points")
    place = {"loc": "outside lower center", "ncols": min(4, 2 * len(tasks)), "frameon": False}
    for text in figure.legend(drawn, list(curves), **place).get_texts():
        text.set_parse_math(False)
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
        against = find_reference(lines, args.against)

    print_table(SCORES, score_table(lines))
    print(finetune.LEGEND)
    print_table(f"Against {against}: {GAINS}", gain_table(lines, against))
    if args.figure:
        script.save_figure(args.figure, plot(curves(rows, args.x), args.x))


if __name__ == "__main__":
    script.run(main)
