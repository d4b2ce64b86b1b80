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
from metapt import read_json
from study import ARMS, DOMAINS, prompt_folder

NAMES = {
    "kmeans": "MetaPT, K-means",
    "random": "MetaPT, random clusters",
    "plain": "no inner step",
    "fomaml": "first-order",
    "ppt": "PPT",
    "matched": "no inner step, else as MetaPT",
}
PRIMARY = [("kmeans", "plain"), ("kmeans", "random")]
OTHERS = [("kmeans", "fomaml"), ("kmeans", "ppt"), ("kmeans", "matched")]
EXPECTED = dict.fromkeys(DOMAINS.split(), 5)  # draws of every target


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
    scaled = np.sort(values) * np.arange(len(values), 0, -1)  # the least by their number, and so on
    adjusted = np.empty(len(values))
    adjusted[np.argsort(values)] = np.minimum(1, np.maximum.accumulate(scaled))
    return adjusted.tolist()


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run


def training_of(row):
    """(arm, T5, seed) of a row's prompt, as study.py names its folder; None of any other."""
    parts = Path(row["prompt"]).name.split("-")
    if len(parts) == 3 and parts[1] in NAMES:
        return parts[1], parts[0], parts[2]


def baseline_of(row):
    """(T5, method and shots) of a row without source data; None of any other."""
    if training_of(row) is None:
        return Path(row["model"]).name, f"{method_name(row)}, {row['shots']} examples"


def read_scores(rows, name_of):
    """{name: {target: accuracies of its draws, in points}} of the rows that have a name; of a run
    that was made twice the later."""
    runs = {}
    for row in rows:
        runs[name_of(row), row["task"], row["seed"]] = 100 * row["accuracy"]

    scores = {}
    for (name, target, _), accuracy in runs.items():
        if name is not None:
            scores.setdefault(name, {}).setdefault(target, []).append(accuracy)
    return scores


def scores_of_trainings(rows, shots):
    """read_scores of the trained prompts with a number of shots, by (arm, T5, seed)."""
    return read_scores(rows, lambda row: training_of(row) if row["shots"] == shots else None)


def whole(scores, arms):
    """The (T5, seed) pairs whose training all these arms have, with every target and draw."""
    pairs = []
    for t5, seed in sorted({training[1:] for training in scores}):
        trainings = [scores.get((arm, t5, seed), {}) for arm in arms]
        counts = [{name: len(draws) for name, draws in targets.items()} for targets in trainings]
        if all(count == EXPECTED for count in counts):
            pairs.append((t5, seed))
    return pairs


def by_t5(values):
    """{T5: [of each seed]} of {(T5, seed): value}."""
    grouped = {}
    for (t5, _), value in values.items():
        grouped.setdefault(t5, []).append(value)
    return grouped


def mean_over_t5s(values):
    """The mean of {(T5, seed): value}, in which every T5 counts as much."""
    return np.mean([np.mean(of_t5, axis=0) for of_t5 in by_t5(values).values()], axis=0)


def mean_of_targets(targets):
    """The mean over targets of the means over their draws."""
    return np.mean([np.mean(draws) for draws in targets.values()])


def print_baselines(rows):
    """What the T5s do without source data: the largest class, untuned, tuned from a random prompt,
    full tuning."""
    scores = read_scores(rows, baseline_of)
    for row in rows:
        if row["method"] == "ft" and row["shots"] == 0:
            sizes = np.sum(row["confusion"], axis=1)
            targets = scores.setdefault((Path(row["model"]).name, "largest class"), {})
            targets[row["task"]] = [100 * sizes.max() / sizes.sum()]

    table = [["T5", "", "mean", *EXPECTED]]
    for (t5, method), targets in sorted(scores.items()):
        if set(targets) == set(EXPECTED):
            columns = [mean_of_targets(targets), *(np.mean(targets[name]) for name in EXPECTED)]
            table.append([t5, method, *(f"{column:.2f}" for column in columns)])
    print_table("Without source data; accuracy in points", table)


def print_arms(untuned, tuned, pairs):
    """The table of arms: the accuracy on held-out source, by which a prompt was chosen, that on the
    targets untuned and tuned, the deviation over draws within a prompt, each target."""
    table = [["arm", "source", "untuned", "40 examples", "over draws", *EXPECTED]]
    for arm, name in NAMES.items():
        columns = {}
        for pair in whole(tuned, [*ARMS, arm]):
            targets = tuned[arm, *pair]
            facts = read_json(f"{prompt_folder(arm, *pair)}/metapt.json")
            deviation = np.mean([np.std(draws, ddof=1) for draws in targets.values()])
            means = [mean_of_targets(untuned[arm, *pair]), mean_of_targets(targets), deviation]
            each = [np.mean(targets[name]) for name in EXPECTED]
            columns[pair] = [100 * facts["accuracy"], *means, *each]

        if len(columns) == len(pairs):
            table.append([name, *(f"{column:.2f}" for column in mean_over_t5s(columns))])
    print_table(f"{len(pairs)} trainings of every arm; accuracy in points", table)


def print_comparisons(scores):
    """The primary comparisons with Holm's correction, and the others."""
    table = [["", "each training", "mean", "95 % interval", "p", "p of 1 point or more"]]
    p_values = []
    for arm, against in PRIMARY + OTHERS:
        differences = {}
        for pair in whole(scores, [*ARMS, against]):
            means = [mean_of_targets(scores[name, *pair]) for name in (arm, against)]
            differences[pair] = means[0] - means[1]
        if not differences:
            continue

        mean, interval, p, equivalent = paired(by_t5(differences))
        p_values.append(p)
        each = [" ".join(f"{d:+.2f}" for d in of_t5) for of_t5 in by_t5(differences).values()]
        cells = ["; ".join(each), f"{mean:+.2f}"]
        if interval:
            cells += [f"{interval[0]:+.2f} to {interval[1]:+.2f}", f"{p:.3f}", f"{equivalent:.3f}"]
        table.append([f"{NAMES[arm]} - {NAMES[against]}", *cells, *["-"] * (5 - len(cells))])

    print_table("Paired by training, blocked by T5; the first two are primary", table)
    if None not in p_values:
        print("p of the first two by Holm:", *(f"{p:.3f}" for p in holm(p_values[:2])))


def print_inner_step(file, pairs):
    """The inner step's table on held-out queries, and the accuracies after updates, of those pairs
    of which every arm is there."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    by_training = {training_of(row): row for row in rows}
    pairs = [pair for pair in pairs if all((arm, *pair) in by_training for arm in ARMS)]
    inner = [["arm", "α|∇L|/|P|", "query loss", "after Eq. 1", "cosine"]]
    updates = [["arm", *(f"{count} updates" for count in UPDATES)]]
    for arm, name in NAMES.items():
        measures = {}
        curves = {}
        for pair in pairs:
            row = by_training.get((arm, *pair))
            if row:
                measures[pair] = [row["moved"], row["before"], row["after"], row["cosine"]]
                curves[pair] = 100 * np.mean(list(row["updates"].values()), axis=0)

        if pairs and len(measures) == len(pairs):
            moved, *others = mean_over_t5s(measures)
            inner.append([name, f"{moved:.2%}", *(f"{value:.3f}" for value in others)])
            updates.append([name, *(f"{share:.2f}" for share in mean_over_t5s(curves))])
    print_table(f"The inner step on held-out queries, {len(pairs)} trainings", inner)
    print_table("Accuracy on the targets after updates at a constant rate", updates)


def main(argv=None):
    """Prints the tables."""
    script.Parser(__doc__).parse(argv)
    rows = list(read_results(Path("results.jsonl")).values())
    print_baselines(rows)
    tuned = scores_of_trainings(rows, 40)
    pairs = whole(tuned, ARMS)
    if not pairs:
        print("no T5 and seed of which every arm is whole yet")
        return

    print("whole:", *(f"T5 {t5}, seed {seed};" for t5, seed in pairs))
    print_arms(scores_of_trainings(rows, 0), tuned, pairs)
    print_comparisons(tuned)
    inner = Path("inner_step.jsonl")
    if inner.exists():
        print_inner_step(inner, pairs)


if __name__ == "__main__":
    script.run(main)
