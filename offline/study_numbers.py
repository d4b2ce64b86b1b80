"""
Every number of the study of held-out domains, from what study.py has written to the current folder,
of as many trainings as are there:

    python offline/study_numbers.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import script  # first: it sets how PyTorch takes its memory

import json

import numpy as np
from scipy import stats

from finetune import method_name, print_table, read_results
from inner_step import UPDATES

NAMES = {
    "kmeans": "MetaPT, K-means",
    "random": "MetaPT, random clusters",
    "plain": "no inner step",
    "fomaml": "first-order",
    "ppt": "PPT",
}
PRIMARY = [("kmeans", "plain"), ("kmeans", "random")]
SECONDARY = [("kmeans", "fomaml"), ("kmeans", "ppt")]


def paired(differences, margin=1.0):
    """What differences between two arms say, paired by training and blocked by T5: their mean, its
    95 % interval, the p-value of no difference, and that of a difference of `margin` or more (TOST).
    differences: {T5: [of each seed]}; None where no T5 has two trainings.

    The T5s are fixed blocks: the variance is that within a T5, and says nothing of further T5s.
    """
    blocks = [np.array(values) for values in differences.values()]
    freedom = sum(len(values) - 1 for values in blocks)
    mean = float(np.mean([values.mean() for values in blocks]))
    if freedom == 0:
        return mean, None, None, None

    variance = sum(((values - values.mean()) ** 2).sum() for values in blocks) / freedom
    error = (variance * sum(1 / len(values) for values in blocks)) ** 0.5 / len(blocks)
    error = max(error, 1e-12)
    half = stats.t.ppf(0.975, freedom) * error
    p = 2 * stats.t.sf(abs(mean) / error, freedom)
    equivalent = stats.t.sf((margin - abs(mean)) / error, freedom)
    return mean, (mean - half, mean + half), p, equivalent


def holm(values):
    """Holm's adjusted p-values."""
    order = np.argsort(values)
    adjusted = np.empty(len(values))
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[i]))
        adjusted[i] = largest
    return adjusted.tolist()


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run


def training_of(prompt):
    """(arm, T5, seed) of a prompt's folder, as study.py names it; None of any other."""
    parts = Path(prompt).name.split("-")
    return (parts[1], parts[0], parts[2]) if len(parts) == 3 and parts[1] in NAMES else None


def read_scores(rows, shots):
    """{(arm, T5, seed): {target: accuracies of its draws, in points}}."""
    scores = {}
    for row in rows:
        training = training_of(row["prompt"])
        if training and row["shots"] == shots:
            by_target = scores.setdefault(training, {})
            by_target.setdefault(row["task"], []).append(100 * row["accuracy"])
    return scores


def whole(scores):
    """The trainings of a T5 and a seed that every arm has, with all targets and draws."""
    size = lambda by_target: sum(map(len, by_target.values()))
    most = max(map(size, scores.values()), default=0)
    pairs = {(t5, seed) for arm, t5, seed in scores}
    complete = lambda pair: all(size(scores.get((arm, *pair), {})) == most for arm in NAMES)
    return sorted(filter(complete, pairs))


def differences(means, pairs, arm, against):
    """{T5: [difference of each seed]} of two arms' means over targets."""
    by_t5 = {}
    for t5, seed in pairs:
        by_t5.setdefault(t5, []).append(means[arm, t5, seed] - means[against, t5, seed])
    return by_t5


def print_arms(scores, untuned, pairs):
    """The table of arms: untuned, tuned, the deviation over draws within a prompt, each target."""
    targets = sorted(scores["kmeans", *pairs[0]])
    table = [["arm", "untuned", "40 examples", "over draws", *targets]]
    for arm, name in NAMES.items():
        tuned = [scores[arm, *pair] for pair in pairs]
        before = [np.mean(list(untuned[arm, *pair].values())) for pair in pairs]
        after = [np.mean([np.mean(row[target]) for target in targets]) for row in tuned]
        deviations = [np.std(row[target], ddof=1) for row in tuned for target in targets]
        of_targets = [np.mean([row[target] for row in tuned]) for target in targets]
        numbers = [np.mean(before), np.mean(after), np.mean(deviations), *of_targets]
        table.append([name, *(f"{number:.2f}" for number in numbers)])
    print_table(f"{len(pairs)} trainings of every arm; accuracy in points", table)


def print_baselines(rows):
    """What the T5s do without source data: the largest class, untuned, tuned from a random prompt,
    full tuning; each the mean of the runs of all targets."""
    cells = {}
    for row in rows:
        if training_of(row["prompt"]) is None:
            t5 = Path(row["model"]).name
            method = f"{method_name(row)}, {row['shots']} examples"
            cells.setdefault((t5, method), []).append(row["accuracy"])
        if row["method"] == "ft" and row["shots"] == 0:
            sizes = np.sum(row["confusion"], axis=1)
            cells.setdefault((t5, "largest class"), []).append(sizes.max() / sizes.sum())

    table = [["T5", "", "accuracy", "runs"]]
    for (t5, method), shares in sorted(cells.items()):
        table.append([t5, method, f"{100 * np.mean(shares):.2f}", str(len(shares))])
    print_table("Without source data", table)


def print_comparisons(means, pairs):
    """The primary comparisons with Holm's correction, and the secondary ones."""
    table = [["", "difference", "95 % interval", "p", "Holm", "p of 1 point or more"]]
    lines = []
    for arm, against in PRIMARY + SECONDARY:
        result = paired(differences(means, pairs, arm, against))
        lines.append((f"{NAMES[arm]} - {NAMES[against]}", *result))
    corrected = [None] * len(lines)
    if lines[0][3] is not None:
        corrected[: len(PRIMARY)] = holm([line[3] for line in lines[: len(PRIMARY)]])

    number = lambda value: "-" if value is None else f"{value:.3f}"
    for (name, mean, interval, p, equivalent), adjusted in zip(lines, corrected):
        span = f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else "-"
        cells = [f"{mean:+.2f}", span, number(p), number(adjusted), number(equivalent)]
        table.append([name, *cells])
    print_table("Paired by training, blocked by T5; the first two are primary", table)


def print_inner_step(file, pairs):
    """The inner step's table on held-out queries, and the accuracies after updates."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    by_training = {training_of(row["prompt"]): row for row in rows}
    inner = [["arm", "α|∇L|/|P|", "query loss", "after Eq. 1", "cosine"]]
    updates = [["arm", *(f"{count} updates" for count in UPDATES)]]
    for arm, name in NAMES.items():
        present = [by_training[arm, *pair] for pair in pairs if (arm, *pair) in by_training]
        if present:
            columns = ("moved", "before", "after", "cosine")
            means = [np.mean([row[column] for row in present]) for column in columns]
            inner.append([name, f"{means[0]:.2%}", *(f"{mean:.3f}" for mean in means[1:])])
            curves = [np.mean(list(row["updates"].values()), axis=0) for row in present]
            curve = 100 * np.mean(curves, axis=0)
            updates.append([name, *(f"{accuracy:.2f}" for accuracy in curve)])
    print_table("The inner step on held-out queries of the source", inner)
    print_table("Accuracy on the targets after updates at a constant rate", updates)


def main(argv=None):
    """Prints the tables."""
    parser = script.Parser(__doc__)
    parser.add_argument("--results", default="results.jsonl", metavar="FILE", help="of study.py")
    args = parser.parse(argv)
    rows = list(read_results(Path(args.results)).values())
    scores, untuned = read_scores(rows, 40), read_scores(rows, 0)
    pairs = whole(scores)
    print_baselines(rows)
    if not pairs:
        print("no T5 and seed of which every arm is whole yet")
        return

    by_t5 = {}
    for t5, seed in pairs:
        by_t5.setdefault(t5, []).append(seed)
    print(f"whole: {'; '.join(f'T5 {t5}, seeds {seeds}' for t5, seeds in by_t5.items())}")
    means = {
        training: np.mean([np.mean(draws) for draws in by_target.values()])
        for training, by_target in scores.items()
    }
    print_arms(scores, untuned, pairs)
    print_comparisons(means, pairs)
    inner = Path("inner_step.jsonl")
    if inner.exists():
        print_inner_step(inner, pairs)


if __name__ == "__main__":
    script.run(main)
