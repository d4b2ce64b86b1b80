"""
The demo several times, each with other seeds of everything: the reviews, the T5, the prompts and
the draws. What one making shows may be its luck; this says what of it holds.

    python offline/makings.py        # five makings, in makings/1 to makings/5
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import script  # first: it sets how PyTorch takes its memory

import numpy as np
from scipy import stats

from demo import TASK_DOMAINS, at_once, demo
from finetune import method_name, print_table, read_results

METHODS = ["PT", "PPT", "MetaPT", "MetaPT, no inner step", "MetaPT, first-order", "FT"]


def compare(scores, against):
    """Rows of a table: each method's mean and deviation over all runs of a task, in points, and how
    far it is ahead of the method `against`, with a 95 % t interval over the makings. scores:
    {(task, method): accuracies in points, [makings, draws]}."""
    table = [["method", *TASK_DOMAINS, *(f"{task}, ahead of {against}" for task in TASK_DOMAINS)]]
    for method in METHODS:
        accuracies, gains = [], []
        for task in TASK_DOMAINS:
            own = scores[task, method]
            accuracies.append(f"{own.mean():.2f} ± {own.std(ddof=1):.2f}")
            if method == against:
                gains.append("")
                continue
            gain = (own - scores[task, against]).mean(1)
            mean = gain.mean()
            half = stats.t.ppf(0.975, len(gain) - 1) * stats.sem(gain)
            gains.append(f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]")
        table.append([method, *accuracies, *gains])
    return table


def make_all(out, makings):
    """Makes the demo, its prompts and two more of MetaPT's kin, and all runs, `makings` times in
    folders in `out`. Returns the scores that compare() takes."""
    scores = {}
    for making in range(1, makings + 1):
        folder = demo(out / str(making), making=making)
        maml = ["train_meta.py", "--config", folder / "maml.json"]
        at_once(maml, ["train_meta.py", "--config", folder / "ppt.json"])
        plain = [*maml, "--alpha", 0, "--out", folder / "plain"]
        at_once(plain, [*maml, "--method", "fomaml", "--out", folder / "fomaml"])

        prompts = ["random", *(folder / name for name in ("ppt", "maml", "plain", "fomaml"))]
        tune = ["finetune.py", "--config", folder / "pt.json", "--prompt", *prompts]
        for command in (tune, ["finetune.py", "--config", folder / "ft.json"]):
            at_once(*([*command, "--task", folder / task] for task in TASK_DOMAINS))

        for row in read_results(folder / "results.jsonl").values():
            rows = scores.setdefault((row["task"], method_name(row)), {})
            rows.setdefault(making, []).append(100 * row["accuracy"])

    return {name: np.array(list(rows.values())) for name, rows in scores.items()}


def main(argv=None):
    """Makes the demo and its runs, and prints the tables."""
    parser = script.Parser(__doc__)
    add = parser.add_argument
    add("--out", default="makings", metavar="FOLDER", help="the folder to write")
    add("--makings", type=script.number(2), default=5, help="times to make it")
    args = parser.parse(argv)
    scores = make_all(Path(args.out), args.makings)
    title = f"{args.makings} makings: accuracy in points, mean ± sample standard deviation"
    for against in ("PT", "MetaPT"):
        print_table(f"{title}; 95 % t intervals over the makings", compare(scores, against))


if __name__ == "__main__":
    script.run(main)
