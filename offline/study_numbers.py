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
from collections import Counter

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
    scaled = np.sort(values) * np.arange(len(values), 0, -1)  # the least by their number, and so on
    adjusted = np.empty(len(values))
    adjusted[np.argsort(values)] = np.minimum(1, np.maximum.accumulate(scaled))
    return adjusted.tolist()


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the run


def training_of(prompt):
    """(arm, T5, seed) of a prompt's folder, as study.py names it; None of any other."""
    parts = Path(prompt).name.split("-")
    if len(parts) == 3 and parts[1] in NAMES:
        return parts[1], parts[0], parts[2]


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
    """The (T5, seed) pairs whose training every arm has, with all targets and draws."""
    counts = {training: sum(map(len, targets.values())) for training, targets in scores.items()}
    most = max(counts.values(), default=0)
    arms = Counter((t5, seed) for (_, t5, seed), count in counts.items() if count == most)
    return sorted(pair for pair, count in arms.items() if count == len(NAMES))


def differences(means, pairs, arm, against):
    """{T5: [difference of each seed]} of two arms' means over targets."""
    by_t5 = {}
    for t5, seed in pairs:
        by_t5.setdefault(t5, []).append(means[arm, t5, seed] - means[against, t5, seed])
    return by_t5


def mean_of_targets(by_target):
    """The mean over targets of the means over their draws."""
    return np.mean([np.mean(draws) for draws in by_target.values()])


def print_arms(scores, untuned, pairs):
    """The table of arms: untuned, tuned, the deviation over draws within a prompt, each target."""
    targets = sorted(scores["kmeans", *pairs[0]])
    table = [["arm", "untuned", "40 examples", "over draws", *targets]]
    for arm, name in NAMES.items():
        tuned = [scores[arm, *pair] for pair in pairs]
        before = np.mean([mean_of_targets(untuned[arm, *pair]) for pair in pairs])
        after = np.mean([mean_of_targets(by_target) for by_target in tuned])
        deviations = [np.std(by_target[name], ddof=1) for by_target in tuned for name in targets]
        columns = [before, after, np.mean(deviations)]
        for target in targets:
            columns.append(np.mean([by_target[target] for by_target in tuned]))
        table.append([name, *(f"{column:.2f}" for column in columns)])
    print_table(f"{len(pairs)} trainings of every arm; accuracy in points", table)


def print_baselines(rows):
    """What the T5s do without source data: the largest class, untuned, tuned from a random prompt,
    full tuning; each the mean of the runs of all targets."""
    cells = {}
    for row in rows:
        t5 = Path(row["model"]).name
        if training_of(row["prompt"]) is None:
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
    results = {}
    for arm, against in PRIMARY + SECONDARY:
        results[arm, against] = paired(differences(means, pairs, arm, against))
    p_values = [results[comparison][2] for comparison in PRIMARY]
    corrected = dict(zip(PRIMARY, p_values if None in p_values else holm(p_values)))

    text = lambda value: "-" if value is None else f"{value:.3f}"
    table = [["", "difference", "95 % interval", "p", "Holm", "p of 1 point or more"]]
    for (arm, against), (mean, interval, p, equivalent) in results.items():
        span = f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else "-"
        name = f"{NAMES[arm]} - {NAMES[against]}"
        adjusted = corrected.get((arm, against))
        table.append([name, f"{mean:+.2f}", span, text(p), text(adjusted), text(equivalent)])
    print_table("Paired by training, blocked by T5; the first two are primary", table)


def print_inner_step(file, pairs):
    """The inner step's table on held-out queries, and the accuracies after updates."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    by_training = {training_of(row["prompt"]): row for row in rows}
    inner = [["arm", "α|∇L|/|P|", "query loss", "after Eq. 1", "cosine"]]
    updates = [["arm", *(f"{count} updates" for count in UPDATES)]]
    for arm, name in NAMES.items():
        present = [by_training[arm, *pair] for pair in pairs if (arm, *pair) in by_training]
        if not present:
            continue
        measures = [[row["moved"], row["before"], row["after"], row["cosine"]] for row in present]
        means = np.mean(measures, axis=0)
        inner.append([name, f"{means[0]:.2%}", *(f"{mean:.3f}" for mean in means[1:])])
        curves = [np.mean(list(row["updates"].values()), axis=0) for row in present]
        updates.append([name, *(f"{100 * share:.2f}" for share in np.mean(curves, axis=0))])
    print_table("The inner step on held-out queries of the source", inner)
    print_table("Accuracy on the targets after updates at a constant rate", updates)


def main(argv=None):
    """Prints the tables."""
    script.Parser(__doc__).parse(argv)
    rows = list(read_results(Path("results.jsonl")).values())
    print_baselines(rows)
    scores = read_scores(rows, shots=40)
    pairs = whole(scores)
    if not pairs:
        print("no T5 and seed of which every arm is whole yet")
        return

    by_t5 = {}
    for t5, seed in pairs:
        by_t5.setdefault(t5, []).append(seed)
    blocks = [f"T5 {t5}, seeds {seeds}" for t5, seeds in by_t5.items()]
    print(f"whole: {'; '.join(blocks)}")
    means = {training: mean_of_targets(by_target) for training, by_target in scores.items()}
    print_arms(scores, read_scores(rows, shots=0), pairs)
    print_comparisons(means, pairs)
    inner = Path("inner_step.jsonl")
    if inner.exists():
        print_inner_step(inner, pairs)


if __name__ == "__main__":
    script.run(main)
