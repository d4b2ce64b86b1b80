"""
Few-shot runs on downstream tasks (Section 5): prompt tuning from any prompt (Appendix A.4), or full tuning (A.1).

    python finetune.py                                                                    # the offline demo
    python finetune.py --task tasks/sst5 tasks/sst2 --method ft pt --prompt random prompts/ppt prompts/metapt
    python finetune.py --report results.jsonl --figure shots.png                          # Tables 1 and 2, Figure 2
    python finetune.py --task tasks/sst5 --prompt prompts/metapt --seeds 1 --save tuned   # keeps tuned/sst5-metapt-40-1
    python finetune.py --predict reviews.txt --prompt tuned/sst5-metapt-40-1              # labels new text with it

Every run, of one task, method, prompt, number of shots and seed, becomes one line of --out; a run that stands there
already is not run again. Under torchrun the runs are spread over the processes.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from metapt import (InputError, PromptedT5, Task, load_prompt, load_t5, parse_json, save_prompt, select, summed_loss,
                    write_beside)

# What Appendix A sets for each method; flags override it. A.4's batches of 4, accumulated 8 times, are batches of 32.
SETTINGS = {
    "pt": {"learning_rate": 3e-3, "batch_size": 32, "patience": 6},  # A.4
    "ft": {"learning_rate": 3e-5, "batch_size": 4, "patience": 5},  # A.1
}
GRID = [3e-3, 3e-4, 8e-5, 3e-5, 3e-6]  # A.1's search; the paper prints its third as 8e5
NAMES = {"maml": "MetaPT", "fomaml": "MetaPT, first-order", "reptile": "MetaPT, Reptile", "ppt": "PPT", "ft": "FT",
         "random": "PT"}
# The arguments that a result depends on: a run with others is another run.
RESULT_ARGUMENTS = ("model", "learning_rate", "batch_size", "patience", "max_epochs", "max_steps", "weight_decay",
                    "max_length", "validation_shots", "balanced", "max_test", "dtype")
KINDS = {"task": str, "method": str, "prompt": str, "shots": int, "seed": int, "digest": str, "data": str,
         "settings": dict, "accuracy": float}  # what a line of results must hold
SOURCE_FACTS = ("clustering", "clusters", "source_size", "source_task")  # of a prompt, for Table 2 and Figure 3
# The paper's own results: 40 shots, five seeds.
PAPER_TASKS = ("sst5", "sst2", "amazon5", "amazon2", "sentihood", "semeval_restaurant", "semeval_laptop")
TABLE_1 = {
    ("t5-base", "FT"): "43.57±2.56 88.27±1.03 48.40±1.48 92.35±0.68 82.11±1.30 71.01±1.16 62.48±3.23",
    ("t5-base", "PPT"): "42.90±1.08 87.42±1.15 51.15±1.56 93.28±0.21 80.06±3.31 62.04±3.34 56.37±4.11",
    ("t5-base", "MetaPT"): "45.26±0.39 89.47±0.12 55.47±0.34 94.43±0.08 80.38±0.46 76.93±1.19 70.86±1.95",
    ("t5-base", "MetaPT(Y)"): "46.24±0.42 87.26±0.73 58.73±0.13 95.39±0.03 78.27±1.17 80.72±0.60 72.32±0.66",
    ("t5-large", "MetaPT"): "47.31±0.21 89.61±0.09 55.76±0.15 95.23±0.03 85.78±0.10 85.96±0.08 77.49±0.11",
}
TABLE_2 = {  # on SST-5 alone
    ("t5-base", "kmeans clusters"): "46.24±0.42", ("t5-base", "lda clusters"): "44.10±0.83",
    ("t5-base", "random clusters"): "42.95±1.05", ("t5-base", "label clusters"): "42.84±0.76",
    ("t5-base", "PPT"): "42.89±1.08",
}


def run_all(args):
    """Every run that the arguments name and the file args.out does not hold yet, then the table of that file."""
    out, (rank, world) = Path(args.out), data.rank_and_world()
    t5, tokenizer = load_t5(args.model, args.device, args.dtype)
    weights = {name: weight.clone() for name, weight in t5.state_dict().items()} if "ft" in args.method else {}
    if args.save and len({Path(prompt).name for prompt in args.prompt}) < len(args.prompt):
        raise InputError("--save: two of the prompts have one name, and so would their tuned ones; rename a folder")
    for prompt in args.prompt if "pt" in args.method else ():  # a broken one ends the sweep before it begins
        base = prompt != "random" and load_prompt(prompt, t5.config.d_model)[1]["base_model"]
        if base and base != args.model and rank == 0:
            print(f"{prompt} was learned with {base}, and is used with {args.model}")
    tasks = [load_task(folder, t5, tokenizer, args) for folder in args.task]
    runs = []
    for name in args.method:
        method = argparse.Namespace(**{**vars(data.fill(args, SETTINGS[name])), "method": name})
        prompts = ["none"] if name == "ft" else args.prompt
        runs += itertools.product([method], tasks, prompts, args.shots, args.seeds)
    for _, training, *_ in tasks:  # what cannot be drawn ends the sweep before it begins
        data.few_shot(training, max(args.shots), 1, args.validation_shots)
    names = [identity(describe(*run)[0]) for run in runs]
    finished = set() if args.restart else set(map(identity, read_results(out)))
    mine = [run for run, name in list(zip(runs, names))[rank::world] if name not in finished or args.save
            and run[0].method == "pt" and not saved_folder(args, run[1][0].task.name, *run[2:]).exists()]

    for run in tqdm(mine, "runs", disable=True if rank else None):
        add_result(out, run_one(*run, weights))
    results = read_results(out)
    if set(names) <= set(map(identity, results)):  # under torchrun, the process that ends last
        print_scores("Accuracy", results)
        print(f"wrote {out}: {len(mine)} new runs{' of this process' if world > 1 else ''}, "
              f"{len(names) - len(mine)} stood there already"
              + (f"; the tuned prompts are in {args.save}" if args.save else ""))


def load_task(folder, t5, tokenizer, args):
    """A task's model, its training examples, its encoded test batches, with --max-test of only so many examples, always
    the same, and what they can be traced by. Prints how the test split is made up, which accuracy alone hides."""
    folder = Path(folder)
    model = PromptedT5(t5, tokenizer, Task.load(folder), args.max_length)
    training, test = (list(data.read_examples(folder / f"{split}.jsonl", model.task)) for split in ("train", "test"))
    if not test:
        raise InputError(f"{folder / 'test.jsonl'}: no examples to test on")
    if args.max_test and args.max_test < len(test):
        test = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:args.max_test]]
    if data.rank_and_world()[0] == 0:
        counts = Counter(example["label"] for example in test)
        most = max(counts.values())
        print(f"{model.task.name}: {len(test):,} test examples, "
              + ", ".join(f"{counts[label]:,} {word}" for label, word in enumerate(model.task.words)) + "; "
              f"the most frequent class alone gives {100 * most / len(test):.1f} %", flush=True)
    test.sort(key=lambda example: sum(len(example[field]) for field in model.task.fields))  # to pad less
    made = data.provenance(args.device, *(folder / f"{split}.jsonl" for split in ("train", "test")))
    return model, training, list(batches(model, test)), made


def describe(args, task, prompt, shots, seed):
    """What tells a run from all others; where it starts, a random prompt [n, d], the prompt in a folder, or for full
    tuning none, [0, d]; and that prompt's facts."""
    model, settings = task[0], {name: getattr(args, name) for name in RESULT_ARGUMENTS}
    if prompt == "none":
        start, facts = torch.zeros(0, model.t5.config.d_model, device=model.device), {"method": "ft"}
        settings["learning_rate"] = GRID if args.search else args.learning_rate
    elif prompt == "random":
        start, facts = model.init_prompt(args.prompt_length, seed), {"method": "random"}
    else:
        start, facts = load_prompt(prompt, model.t5.config.d_model)
    digest = hashlib.sha256(start.cpu().numpy().tobytes()).hexdigest()[:12]
    what = json.dumps([model.task.template, model.task.words, *task[3]["digests"].values()])
    return {"task": model.task.name, "method": str(facts.get("method", "PEFT")), "prompt": prompt, "shots": shots,
            "seed": seed, "digest": digest, "data": hashlib.sha256(what.encode()).hexdigest()[:12],
            "settings": settings}, start.to(model.device), facts


def run_one(args, task, prompt, shots, seed, weights):
    """One run, as its line of results. `weights` are the T5's own, which it has again after full tuning."""
    model, training, test, made = task
    run, start, facts = describe(args, task, prompt, shots, seed)
    few, validation = data.few_shot(training, shots, seed, args.validation_shots, args.balanced)
    fit = search if args.search and args.method == "ft" else tune
    tuned, course = fit(model, start, few, validation, args, seed)
    score = model.evaluate(tuned, test)
    score["macro_f1"] = macro_f1(score["confusion"])
    if args.method == "ft":
        model.t5.load_state_dict(weights)
    elif args.save:
        save_prompt(saved_folder(args, run["task"], prompt, shots, seed), tuned, model.t5, **run, **made,
                    accuracy=score["accuracy"], template=model.task.template, words=model.task.words)
    run |= {fact: facts[fact] for fact in SOURCE_FACTS if fact in facts}
    run |= {"words": model.task.words, **score, **course, **made}
    tqdm.write(f"{run['task']}, {method_name(run)} ({prompt}), {shots} shots, seed {seed}: "
               f"{100 * score['accuracy']:.1f} %, macro-F1 {100 * score['macro_f1']:.1f}, "
               f"{100 * score['in_words']:.0f} % answer with a task word; {course['epochs']} epochs, "
               f"{course['seconds']:.1f} s")
    if args.confusion:
        counts = [[word, *map(str, line)] for word, line in zip(model.task.words, score["confusion"])]
        print_markdown("The label down, the prediction across:", [["", *model.task.words], *counts])
    return run


def saved_folder(args, task, prompt, shots, seed):
    return Path(args.save) / f"{task}-{Path(prompt).name}-{shots}-{seed}"


def macro_f1(confusion):
    """The mean F1 over the classes that occur, in truth or in prediction."""
    confusion = np.array(confusion)
    occurs = confusion.sum(0) + confusion.sum(1)
    return float(np.mean((2 * confusion.diagonal())[occurs > 0] / occurs[occurs > 0]))


def batches(model, examples, size=64):
    return (model.encode(examples[i:i + size]) for i in range(0, len(examples), size))


def search(model, start, training, validation, args, seed):
    """Full tuning with every learning rate of A.1's search, each from the same weights. The best on validation, by
    accuracy, then by loss, is left in the T5 to be tested; the test split plays no part in the choice."""
    tried, best = {}, (-1.0, 0.0)
    weights = {name: weight.clone() for name, weight in model.t5.state_dict().items()}
    for rate in GRID:
        model.t5.load_state_dict(weights)
        args = argparse.Namespace(**{**vars(args), "learning_rate": rate})
        _, facts = tune(model, start, training, validation, args, seed)
        tried[rate], score = facts["validation_accuracy"], (facts["validation_accuracy"], -facts["validation_loss"])
        if score > best:
            best, course = score, {**facts, "learning_rate": rate, "tried": tried}
            trained = {name: weight.clone() for name, weight in model.t5.state_dict().items()}
    model.t5.load_state_dict(trained)
    return start, course


def tune(model, prompt, training, validation, args, seed):
    """Trains the prompt [n, d] (Appendix A.4), or for `ft` the whole T5 (A.1), and leaves what was trained as it was
    at the best validation: by accuracy, then by loss, then the earlier. Returns the prompt and the run's facts."""
    full = args.method == "ft"
    prompt = torch.nn.Parameter(prompt.clone())
    parameters = list(model.t5.requires_grad_(full).parameters()) if full else [prompt]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    training, validation = model.encode(training), list(batches(model, validation))
    torch.manual_seed(seed)
    count, began, best = len(training["labels"]), time.time(), None
    per_epoch = -(-count // args.batch_size)
    total = min(args.max_epochs * per_epoch, args.max_steps or sys.maxsize)
    step = 0
    for epoch in range(1, -(-total // per_epoch) + 1):
        model.t5.train(full)  # dropout, in full tuning only
        for rows in torch.randperm(count).split(args.batch_size)[:total - step]:
            optimizer.param_groups[0]["lr"] = args.learning_rate * data.linear_schedule(step, total)
            for part in rows.chunk(args.accumulate):
                loss = summed_loss(model, prompt[None], [select(training, part)])  # the mean over the part
                (loss * len(part) / len(rows)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        model.t5.eval()
        score = model.evaluate(prompt.detach(), validation)
        if best is None or (score["accuracy"], -score["loss"]) > (best["accuracy"], -best["loss"]):
            best = {**score, "epoch": epoch, "values": [parameter.detach().clone() for parameter in parameters]}
        if epoch - best["epoch"] >= args.patience:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, best["values"]):
            parameter.copy_(value)
    model.t5.requires_grad_(False)
    return prompt.detach(), {"epochs": epoch, "best_epoch": best["epoch"], "validation_accuracy": best["accuracy"],
                             "validation_loss": best["loss"], "seconds": round(time.time() - began, 2)}


def predict(args):
    """Labels the texts of a file with a tuned prompt: JSON lines with the label, its word and every word's
    probability, to args.out or to standard output."""
    _, facts = load_prompt(args.prompt[0])
    try:
        task = Task.load(args.task[0]) if args.task else Task(facts["task"], facts["template"], facts["words"])
        max_length = int(facts["settings"]["max_length"]) if "settings" in facts else args.max_length
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{args.prompt[0]}: not a prompt that --save kept, so it does not say its task: {error}; "
                         "name a --task")
    t5, tokenizer = load_t5(args.model or facts["base_model"], args.device, args.dtype)
    model = PromptedT5(t5, tokenizer, task, max_length)
    prompt = load_prompt(args.prompt[0], t5.config.d_model)[0].to(model.device)
    examples = list(data.read_examples(args.predict, task, labelled=False))
    labelled = []
    for batch in batches(model, [{name: text for name, text in e.items() if name != "label"} for e in examples]):
        for p in model.probabilities(prompt, batch).tolist():
            best = int(np.argmax(p))
            labelled.append({**examples[len(labelled)], "label": best, "word": task.words[best],
                             "probabilities": dict(zip(task.words, [round(value, 4) for value in p]))})
    if args.out:
        data.write_examples(args.out, labelled)
        counts = Counter(example["word"] for example in labelled)
        print(f"wrote {args.out}: {len(labelled):,} texts, " + ", ".join(f"{n:,} {word}" for word, n in counts.items()))
    else:
        sys.stdout.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in labelled)


# ----------------------------------------------------------------------------------------------- results and reports


def identity(row):
    """What a line of results is about, as text."""
    return json.dumps([row[key] for key in KINDS if key != "accuracy"])


def read_results(path):
    """The lines of a results file, the newest of each run; none where there is no file. Raises InputError."""
    results = {}
    for number, line in data.numbered_lines(path) if path.exists() else ():
        try:
            row = parse_json(line)
            results[identity(row)] = row
            if wrong := [key for key, kind in KINDS.items() if not isinstance(row[key], kind)]:
                raise ValueError(f"{wrong[0]} {row[wrong[0]]!r}")
            if not 0 <= row["accuracy"] <= 1 or not isinstance(row["settings"]["model"], str):
                raise ValueError("the accuracy is no share or the model no name")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a line of results: {error}; remove that line")
    return list(results.values())


def add_result(path, row):
    """Adds a line to a results file that other processes add to as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:  # freed with the process, however that ends
        fcntl.flock(lock, fcntl.LOCK_EX)
        data.write_examples(path, [*read_results(path), row])


def method_name(row):
    """The paper's name of a run's method. MetaPT is on K-means clusters, MetaPT(Y) where the source is Yelp itself."""
    name = NAMES.get(row["method"], row["method"])
    if row["method"] != "maml":
        return name
    clustering = "" if row.get("clustering", "kmeans") == "kmeans" else f", {row['clustering']}"
    return name + "(Y)" * str(row.get("source_task")).startswith("yelp") + clustering


def grouped(results, x="shots", keys=("prompt", *RESULT_ARGUMENTS[1:])):
    """{(model, x, method, details): {task: {seed: accuracy in points}}}. The details are the prompt and those of `keys`
    in which the rows of a method differ. Of a prompt that was made anew under its old name only the newest counts."""
    newest = {row["prompt"]: row["digest"] for row in results if row["prompt"] != "random"}
    results = [row for row in results if newest.get(row["prompt"], row["digest"]) == row["digest"]]
    values, groups, results = {}, {}, [{**row, **row["settings"]} for row in results]
    for row, key in itertools.product(results, keys):
        values.setdefault((row["method"], key), set()).add(str(row.get(key)))
    for row in results:
        details = [f"{key} {row.get(key)}" for key in keys if key != "prompt" and len(values[row["method"], key]) > 1]
        details = [row["prompt"]] * ("prompt" in keys and row["method"] != "ft") + details
        group = groups.setdefault((Path(row["model"]).name, row[x], method_name(row), ", ".join(details)), {})
        seed = row["seed"] if "prompt" in keys else (row["prompt"], row["seed"])
        group.setdefault(row["task"], {})[seed] = 100 * row["accuracy"]
    return dict(sorted(groups.items(), key=lambda group: group[0][:2]))


def spread(scores):
    """Mean, sample standard deviation and number."""
    scores = list(scores)
    return np.mean(scores), np.std(scores, ddof=1) if len(scores) > 1 else 0.0, len(scores)


def print_markdown(title, rows):
    """Prints rows of cells, the first its header, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    print("", title, "", *("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows), "", sep="\n")


def print_groups(title, results, cell):
    """A table with a line for each group of runs and a column for each task, filled by cell(groups, key, task)."""
    groups, tasks = grouped(results), list(dict.fromkeys(row["task"] for row in results))
    rows = [[*map(str, key), *(cell(groups, key, task) for task in tasks)] for key in groups]
    print_markdown(title, [["model", "shots", "method", "prompt", *tasks], *rows])


def print_scores(title, results, paper={}):
    """Table 1's form: the best of each model and number of shots in bold; behind it what the paper has for the same."""
    def cell(groups, key, task):
        if task not in groups[key]:
            return "-"
        peers = [of[task] for other, of in groups.items() if other[:2] == key[:2] and task in of]
        mean, deviation, count = spread(groups[key][task].values())
        bold = "**" if mean == max(spread(scores.values())[0] for scores in peers) else ""
        theirs = dict(zip(PAPER_TASKS, paper.get((key[0], key[2]), "").split())).get(task) if key[1] == 40 else None
        return (f"{bold}{mean:.2f} ± {deviation:.2f}{bold}" + f" ({count})" * (count != 5)
                + (f"; paper {theirs}, {mean - float(theirs.split('±')[0]):+.2f}" if theirs else ""))

    print_groups(f"{title}: accuracy in points, mean ± sample standard deviation over five seeds, or over (so many).",
                 results, cell)


def print_comparison(results, against):
    """Is a gain real? Every method against one, seed by seed: a seed draws the same examples for both. The interval is
    over draws of examples, not over trainings of the prompt that the seeds share."""
    from scipy import stats

    def cell(groups, key, task):
        other = next((other for other in groups if other[:2] == key[:2] and against in other[2:]), key)
        ours, theirs = groups[key].get(task, {}), groups[other].get(task, {})
        gains = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if len(gains) < 2 or other == key:
            return "-"
        mean, deviation, count = spread(gains)
        half = stats.t.ppf(0.975, count - 1) * deviation / count**0.5
        bold = "**" if 0 < half < abs(mean) else ""
        return f"{bold}{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]{bold}" + f" ({count})" * (count != 5)

    print_groups(f"Against {against}: mean difference in points, paired over the seeds, with its 95 % t interval; bold "
                 "where that leaves out 0.", results, cell)


def report(args):
    """Tables 1 and 2 of a results file beside the paper's, the paired comparison and, with --figure, Figure 2 or 3."""
    results = read_results(Path(args.report))
    if not results:
        raise InputError(f"{args.report}: no results here; finetune.py --out writes them")
    print_scores("Table 1", results, TABLE_1)
    clustered = [{**row, "method": f"{row['clustering']} clusters"} for row in results
                 if row["method"] == "maml" and "clustering" in row]
    if len({row["method"] for row in clustered}) > 1:
        print_scores("Table 2", clustered + [row for row in results if row["method"] == "ppt"], TABLE_2)
    names = list(dict.fromkeys(name for key in grouped(results) for name in key[2:] if name))
    if args.against and args.against not in names:
        raise InputError(f"{args.report}: no {args.against} to compare with, only {', '.join(names)}")
    print_comparison(results, args.against or names[names.index("MetaPT") + 1 if "MetaPT" in names else 0])
    if args.figure:
        draw(results, args.x, Path(args.figure))


def draw(results, x, path):
    """Figure 2 (x is shots), 3a (source_size) or 3b (clusters): a panel for each task, a line for each method, the mean
    over the seeds in a band of one standard deviation."""
    from matplotlib.figure import Figure
    held, lines = ["prompt"] if x == "shots" else [key for key in ("shots", *SOURCE_FACTS[1:3]) if key != x], {}
    rows = [row for row in results if isinstance(row.get(x), int)]
    for (_, at, *name), tasks in grouped(rows, x, [*held, *RESULT_ARGUMENTS]).items():
        lines.setdefault(", ".join(filter(None, name)), {})[at] = tasks
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines:
        raise InputError(f"{path}: no method was run with more than one value of {x}, so there is nothing to draw")
    names = list(dict.fromkeys(task for line in lines.values() for tasks in line.values() for task in tasks))
    figure = Figure(figsize=(1 + 4 * len(names), 4.5), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, names):
        for (name, line), style in zip(lines.items(), itertools.cycle(["o-", "s--", "^:", "D-.", "v-", "P--"])):
            xs = [at for at in line if task in line[at]]
            means, deviations, _ = np.array([spread(line[at][task].values()) for at in xs]).reshape(-1, 3).T
            panel.plot(xs, means, style, label=name)
            panel.fill_between(xs, means - deviations, means + deviations, alpha=0.15, linewidth=0)
        if x != "clusters":
            panel.set_xscale("log", base=2 if x == "shots" else 10)
        xs = sorted({at for line in lines.values() for at in line})
        panel.set_xticks(xs, [f"{at:,}" for at in xs], rotation=30 * (x == "source_size"))
        panel.minorticks_off()
        panel.set(title=task, xlabel={"shots": "training examples", "source_size": "source examples"}.get(x, x))
    panels[0].set_ylabel("accuracy in points")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, 2 * len(names)),
                  frameon=False)
    kind = path.suffix.lstrip(".")
    if kind not in figure.canvas.get_supported_filetypes():
        raise InputError(f"{path}: no kind of picture; end it in .png, .pdf or .svg")
    write_beside(path, lambda beside: figure.savefig(beside, format=kind, dpi=200, bbox_inches="tight"))
    print(f"wrote {path}")


def main(argv=None):
    parser = data.Parser(__doc__)
    parser.add_config_flag()
    parser.add("--task", "task folders", nargs="+", metavar="FOLDER")
    parser.add("--method", "prompt tuning, full tuning, or both", ["pt"], choices=list(SETTINGS), nargs="+")
    parser.add("--model", f"a T5 by hub name or folder (default: {data.MODEL}; with --predict the prompt's own)")
    parser.add("--prompt", "where prompt tuning starts: random, or prompts' folders", ["random"], nargs="+")
    parser.add("--shots", "training examples", [40], type=int, nargs="+")
    parser.add("--seeds", "each draws its own examples", [1, 2, 3, 4, 5], type=int, nargs="+")
    parser.add("--out", "the results file (default: results.jsonl); with --predict the labelled texts (default: "
               "standard output)", metavar="FILE")
    parser.add("--save", "keeps every tuned prompt in a folder here", metavar="FOLDER")
    parser.add("--predict", "labels the texts of a .txt or .jsonl file with a prompt that --save kept, or "
               "with any prompt for --task", metavar="FILE")
    parser.add_setting("--learning-rate", "AdamW's", SETTINGS, type=float)
    parser.add("--search", f"full tuning tries {GRID} and tests what validates best", False, action="store_true")
    parser.add_setting("--batch-size", "examples of an update", SETTINGS, type=int)
    parser.add("--accumulate", "passes that a batch is split into, where memory is short", 1, type=int)
    parser.add("--max-epochs", "epochs at most; each ends in a validation", 200, type=int)
    parser.add("--max-steps", "updates at most (default: as --max-epochs says)", type=int)
    parser.add_setting("--patience", "epochs without a better validation until the run stops", SETTINGS, type=int)
    parser.add("--validation-shots", "validation examples (default: as many as --shots)", type=int)
    parser.add("--balanced", "draws equally from every class", False, action="store_true")
    parser.add("--max-test", "tests on so many examples, drawn once (default: on all)", type=int)
    parser.add("--report", "prints the tables of a results file, beside the paper's", metavar="FILE")
    parser.add("--against", "with --report: the method or prompt to compare with (default: first MetaPT)",
               metavar="NAME")
    parser.add("--confusion", "prints the confusion matrices too", False, action="store_true")
    parser.add("--figure", "with --report: the picture to draw of it, .png, .pdf or .svg", metavar="FILE")
    parser.add("--x", "the figure's horizontal axis", "shots", choices=["shots", "source_size", "clusters"])
    parser.add_model_flags()
    args = parser.parse(argv)
    if args.predict and args.prompt == ["random"]:
        parser.error("--predict needs --prompt FOLDER, a prompt that --save kept")
    if args.figure and not args.report:
        parser.error("--figure draws the results of --report FILE")
    if args.predict or args.report:
        return predict(args) if args.predict else report(args)
    if not args.task:
        parser.error("--task FOLDER is needed")
    if "ft" in args.method and args.dtype == "bfloat16":
        parser.error("--dtype bfloat16 is for a frozen T5; full tuning's small steps are lost in bfloat16")
    args.out = args.out or "results.jsonl"
    args.model = args.model or data.MODEL
    run_all(args)


def main_demo():
    """The offline demo: prompt tuning from three prompts and full tuning, as demo/pt.json and demo/ft.json say."""
    folder = data.demo()
    for method in SETTINGS:
        print(f"$ python finetune.py --config {folder / method}.json", flush=True)
        main(["--config", f"{folder / method}.json"])


if __name__ == "__main__":
    data.run(main if len(sys.argv) > 1 else main_demo)
