"""
Few-shot runs on downstream tasks (Section 5): prompt tuning from any prompt (Appendix A.4), or full
tuning (A.1).

    python finetune.py                                                          # the offline demo
    python finetune.py --task tasks/sst5 tasks/sst2 --method ft pt --prompt random prompts/metapt
    python finetune.py --task tasks/sst5 --prompt prompts/metapt --seeds 1 --save tuned
    python finetune.py --predict reviews.txt --prompt tuned/sst5-metapt-40-1    # labels new text
    python figures/report.py results.jsonl    # the paper's tables and figures

Every run, of one task, method, prompt, number of shots and seed, becomes one line of --out; a run
that stands there already is not run again, so after Ctrl-C the same command continues. Several
processes may write to one --out, each with its own --seeds, say.
"""

import script  # first: it sets how PyTorch takes its memory

import contextlib
import copy
import itertools
import json
import math
import runpy
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from metapt import Diverged, InputError, PromptedT5, Task, best_of, digest, input_errors
from metapt import linear_schedule, load_prompt, load_t5, out_of_patience, save_prompt, select
from script import number

# What Appendix A sets for each method; flags override it. A.4's batches of 4, accumulated 8 times,
# are batches of 32.
SETTINGS = {
    "pt": {"learning_rate": 3e-3, "batch_size": 32, "patience": 6},  # A.4
    "ft": {"learning_rate": 3e-5, "batch_size": 4, "patience": 5},  # A.1
}
RATES = [3e-3, 3e-4, 8e-5, 3e-5, 3e-6]  # A.1's search; the paper prints its third as 8e5


# -------------------------------------- Appendix A.4 and A.1, of tensors, lists and numbers alone


def tune(
    model,
    prompt,
    training,
    validation,
    learning_rate=3e-3,
    batch_size=32,
    max_epochs=200,
    patience=6,
    accumulate=1,
    seed=1,
):
    """Trains the prompt [n, d] (Appendix A.4), or where that is None the whole T5 (A.1), on
    examples, and leaves what was trained as it was at the best validation. A batch is computed in
    `accumulate` parts. Returns the prompt, [0, d] without one, and what came of the run. Raises
    Diverged where a validation loss is not finite, and InputError where there are no examples."""
    if not training or not validation:
        raise InputError("give at least one example to train on, and one to validate on")
    full = prompt is None
    prompt = torch.nn.Parameter(model.no_prompt() if full else prompt.clone())
    parameters = list(model.t5.requires_grad_().parameters()) if full else [prompt]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    batch = model.encode(training)
    held_out = list(model.batches(validation))
    total = max_epochs * math.ceil(len(training) / batch_size)
    torch.manual_seed(seed)

    log, step, began = [], 0, time.time()
    while step < total and not out_of_patience(log, patience):
        model.t5.train(full)  # dropout, in full tuning only
        for rows in torch.randperm(len(training)).split(batch_size):
            optimizer.param_groups[0]["lr"] = learning_rate * linear_schedule(step, total)
            for part in rows.chunk(accumulate):
                loss = model.loss(prompt, select(batch, part))
                (loss * len(part) / len(rows)).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1

        model.t5.eval()
        log.append(model.evaluate(prompt.detach(), held_out))
        if best_of(log) == len(log) - 1:
            best = [parameter.detach().clone() for parameter in parameters]

    model.t5.requires_grad_(False)
    with torch.no_grad():
        for parameter, value in zip(parameters, best):
            parameter.copy_(value)

    score = log[best_of(log)]
    return prompt.detach(), {
        "epochs": len(log),
        "best_epoch": best_of(log) + 1,
        "validation_accuracy": score["accuracy"],
        "validation_loss": score["loss"],
        "seconds": round(time.time() - began, 2),
    }


def search(model, training, validation, rates=RATES, **settings):
    """Full tuning with every learning rate of A.1's search, each from the same weights. The best on
    validation is left in the T5 to be tested; the test split plays no part in the choice. Returns
    what came of the best run. Raises Diverged."""
    weights = copy.deepcopy(model.t5.state_dict())
    scores, outcomes = [], []
    for rate in rates:
        model.t5.load_state_dict(weights)
        with contextlib.suppress(Diverged):  # a rate at which it diverges is no choice
            _, outcome = tune(model, None, training, validation, learning_rate=rate, **settings)
            accuracy, loss = outcome["validation_accuracy"], outcome["validation_loss"]
            scores.append({"accuracy": accuracy, "loss": loss})
            outcomes.append({**outcome, "learning_rate": rate})
            if best_of(scores) == len(scores) - 1:
                best = copy.deepcopy(model.t5.state_dict())

    if not outcomes:
        raise Diverged(f"it diverges at every learning rate of {rates}")

    model.t5.load_state_dict(best)
    accuracies = {one["learning_rate"]: one["validation_accuracy"] for one in outcomes}
    return {**outcomes[best_of(scores)], "tried": {rate: accuracies.get(rate) for rate in rates}}


def macro_f1(confusion):
    """The mean F1 over the classes that occur, in truth or in prediction."""
    confusion = np.array(confusion)
    occurs = confusion.sum(0) + confusion.sum(1)
    return float(np.mean((2 * confusion.diagonal())[occurs > 0] / occurs[occurs > 0]))


# ------------------------------------------------------------- The runs: what to run, and one run


@dataclass
class Downstream:
    """A task as it is read for its runs: the model around it; the few-shot examples by (shots,
    seed); the test examples; what all of it is made of."""

    model: PromptedT5
    splits: dict
    test: list
    made_of: dict


@dataclass
class Run:
    """A run to be made: the beginning of its line of results, its task, the prompt that it starts
    at (None for full tuning) and its settings."""

    row: dict
    task: Downstream
    start: torch.Tensor
    settings: dict


def run_all(args):
    """Every run that the arguments name and args.out does not hold yet, then the table of them."""
    out = Path(args.out)
    results = read_results(out)
    names = [load_task(folder).name for folder in args.task]
    if len(set(names)) < len(names):
        raise InputError(f"--task: two tasks have one name, of {names}; change it in a task.json")

    t5, tokenizer = load_t5(args.model, args.device, args.dtype)
    contents = script.contents(args.model)
    prompts = read_prompts(args, t5, contents)
    tasks = [read_task(folder, t5, tokenizer, contents, args) for folder in args.task]

    write_results(out, {})  # an error here comes before the work
    rows, new, diverged = [], 0, []
    runs = list_runs(args, tasks, prompts)
    for run in tqdm(runs, "runs", disable=None):
        identity = run.row["identity"]
        if args.restart or identity not in results or is_unsaved(args, run):
            try:
                row = one_run(args, run)
            except Diverged as error:  # the others go on
                diverged.append(f"{title(run.row)}: {error}")
                tqdm.write(diverged[-1])
                continue
            # What another process has added meanwhile is seen too.
            results = write_results(out, {identity: row}, args.restart)
            new += 1
        rows.append({**results[identity], "prompt": run.row["prompt"]})

    if rows:
        print_table(
            f"{out}: accuracy in points, mean ± sample standard deviation over the seeds",
            score_table(rows),
        )
    saved = f"; the tuned prompts are in {args.save}" if args.save else ""
    word = "run" if new == 1 else "runs"
    print(f"wrote {out}: {new} new {word}, {len(rows) - new} stood there already{saved}")
    if diverged:
        raise Diverged(f"{len(diverged)} of {len(runs)} runs have no result; {diverged[0]}")


def read_prompts(args, t5, contents):
    """{folder: (prompt, its facts)} of the learned prompts. Raises InputError where one cannot be
    used: before a sweep rather than in it."""
    if "pt" not in args.method:
        return {}
    if args.save and len({Path(prompt).name for prompt in args.prompt}) < len(args.prompt):
        raise InputError("--save: two of the prompts have one name; rename a folder")

    prompts = {}
    for folder in args.prompt:
        if folder != "random":
            prompts[folder] = load_prompt(folder, t5.config.d_model)
            notice_another_t5(folder, prompts[folder][1], args.model, contents)
    return prompts


def notice_another_t5(prompt, facts, model, contents):
    """Says so where a prompt is used with another T5 than it was learned with."""
    known = facts.get("made_of", {}).get("--model")
    base = facts["base_model"]
    if not known and base and Path(base).is_dir():
        known = script.contents(base)
    same = known == contents if known else base in (None, model)
    if not same:
        print(f"{prompt} was learned with {base}, not {model}", file=sys.stderr)


def load_task(folder):
    """The task in a folder. Raises InputError, which for a folder of tasks names one of them."""
    inner = sorted(Path(folder).glob("*/test.jsonl"))
    if inner and not (Path(folder) / "task.json").exists():
        raise InputError(f"{folder}: a folder of tasks; give one of them, as {inner[0].parent}")
    return Task.load(folder)


def read_task(folder, t5, tokenizer, contents, args):
    """A task: its few-shot splits of every number of shots and seed, and its test. Of the training
    split only what is drawn is held in memory. Raises InputError."""
    task = load_task(folder)
    folder = Path(folder)
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    if not test.exists():
        hint = "move lines of train.jsonl there, as data.py convert does with --test-share"
        raise InputError(f"{test}: no such file; {hint}")

    tested = list(data.read_examples(test, task))
    if not tested:
        raise InputError(f"{test}: no examples to test on; give some")
    if args.max_test and args.max_test < len(tested):  # always the same
        order = np.random.default_rng(0).permutation(len(tested))
        tested = [tested[i] for i in order[: args.max_test]]
    print_test(task, tested)

    texts = {data.text_of(example, task) for example in tested}
    labels, repeated = [], 0
    for example in data.read_examples(train, task):
        labels.append(example["label"])
        repeated += data.text_of(example, task) in texts
    if repeated:
        print(f"{train}: {repeated:,} of its texts are test texts too", file=sys.stderr)

    tested.sort(key=lambda example: len(data.text_of(example, task)))
    made_of = {
        "task.json": digest([task.template, task.words]),
        "train.jsonl": digest(train),
        "test.jsonl": digest(test),
        "--model": contents,
    }
    model = PromptedT5(t5, tokenizer, task, args.max_length)
    return Downstream(model, read_draws(train, task, labels, args), tested, made_of)


def read_draws(train, task, labels, args):
    """{(shots, seed): (training examples, validation examples)} of Section 5.1's draws. Raises
    InputError."""
    draws, wanted = {}, set()
    for shots, seed in itertools.product(args.shots, args.seeds):
        with input_errors(train, ""):
            draw = data.few_shot(labels, shots, seed, args.validation_shots, args.balanced)
        draws[shots, seed] = draw
        wanted.update(*draw)

    lines = enumerate(data.read_examples(train, task))
    examples = {row: example for row, example in lines if row in wanted}
    splits = {}
    for key, (training, validation) in draws.items():
        splits[key] = [examples[row] for row in training], [examples[row] for row in validation]
    return splits


def print_test(task, test):
    """Prints how the test split is made up, which accuracy alone hides."""
    counts = Counter(example["label"] for example in test)
    shares = [f"{counts[label]:,} {word}" for label, word in enumerate(task.words)]
    largest = max(counts.values()) / len(test)
    print(
        f"{task.name}: {len(test):,} test examples, {', '.join(shares)}; the most frequent class "
        f"alone gives {largest:.1%}",
        flush=True,
    )


def list_runs(args, tasks, prompts):
    """The runs that the arguments name: of every method, task, prompt, number of shots and seed. A
    run that no draw enters, as without shots from a learned prompt, is one whatever the seeds."""
    lengths = {len(prompt) for prompt, _ in prompts.values()}
    if "random" in args.prompt and not args.prompt_length and len(lengths) > 1:
        raise InputError(f"prompts of {sorted(lengths)} vectors: give the random --prompt-length")
    prompt_length = args.prompt_length or max(lengths, default=100)

    runs = []
    for method in args.method:
        given = {name: value for name, value in vars(args).items() if value is not None}
        settings = {**SETTINGS[method], **given, "prompt_length": prompt_length}
        starts = ["none"] if method == "ft" else args.prompt
        for task, name, shots, seed in itertools.product(tasks, starts, args.shots, args.seeds):
            start, facts = None, {"method": "ft"}
            if name == "random":
                start, facts = task.model.init_prompt(prompt_length, seed), {"method": "random"}
            elif method == "pt":
                start, facts = prompts[name][0].to(task.model.device), prompts[name][1]
            if shots == 0 and name != "random":
                if seed != args.seeds[0]:
                    continue
                seed = None
            row = begin_row(method, task, name, start, facts, shots, seed, settings)
            runs.append(Run(row, task, start, settings))
    return runs


# What two results must share to be compared; beyond the first line A.1 and A.4 differ.
SHARED = ("max_length", "max_epochs", "validation_shots", "balanced", "max_test", "dtype", "matmul")
OWN = {"pt": tuple(SETTINGS["pt"]), "ft": (*SETTINGS["ft"], "accumulate")}
# What a prompt brings along for Table 2 and Figure 3, and which trainings are of one recipe.
SOURCE_FACTS = ("clustering", "clusters", "source_size", "source_task", "is_start")
SOURCE_FACTS += ("recipe", "prompt_seed")


def begin_row(method, task, name, start, facts, shots, seed, settings):
    """The beginning of a line of results: what the run is about, and its identity, the digest of
    all that decides its digits."""
    kept = {flag: settings.get(flag) for flag in (*SHARED, *OWN[method])}
    if start is not None:
        kept["prompt_length"] = len(start)
    if method == "ft" and settings["search"]:
        kept["learning_rate"] = RATES

    row = {
        "task": task.model.task.name,
        "tuning": method,
        "method": facts.get("method", "PEFT"),
        "prompt": name,
        "shots": shots,
        "seed": seed,
        "model": settings["model"],
        "settings": kept,
        **{fact: facts[fact] for fact in SOURCE_FACTS if fact in facts},
    }
    row["made_of"] = {
        **task.made_of,
        "method": row["method"],
        "start": facts.get("weights"),
        "shots": shots,
        "seed": seed,
        **kept,
    }
    return {**row, "identity": digest(row["made_of"])}


def one_run(args, run):
    """One run, as its line of results. After full tuning the T5 has its own weights again. Raises
    Diverged."""
    model, start, row = run.task.model, run.start, run.row
    seed = args.seeds[0] if row["seed"] is None else row["seed"]
    training, validation = run.task.splits[row["shots"], seed]
    names = ("batch_size", "max_epochs", "patience", "accumulate")
    settings = {name: run.settings[name] for name in names} | {"seed": seed}
    weights = copy.deepcopy(model.t5.state_dict()) if start is None else None
    try:
        if not training:  # 0 shots test the start, or with --method ft the T5, as it is
            tuned = model.no_prompt() if start is None else start
            outcome = {"epochs": 0, "seconds": 0.0}
        elif start is None and args.search:
            tuned, outcome = model.no_prompt(), search(model, training, validation, **settings)
        else:
            rate = run.settings["learning_rate"]
            tuned, outcome = tune(model, start, training, validation, rate, **settings)

        total = math.ceil(len(run.task.test) / 64)
        batches = model.batches(run.task.test, 64)
        score = model.evaluate(tuned, tqdm(batches, "testing", total, leave=False, disable=None))
    finally:
        if weights:
            model.t5.load_state_dict(weights)
            model.t5.requires_grad_(False).eval()

    score["macro_f1"] = macro_f1(score["confusion"])
    row = {**row, "words": model.task.words, **score, **outcome, **script.provenance(args.device)}
    if args.save and start is not None:
        save_tuned(args, model, tuned, row)
    tqdm.write(
        f"{title(row)}: {row['accuracy']:.1%}, macro-F1 {100 * row['macro_f1']:.1f}, "
        f"{row['in_words']:.0%} answer with a task word; {row['epochs']} epochs, "
        f"{row['seconds']:.1f} s"
    )
    return row


def title(row):
    """A run's name, for a person."""
    name = f"{row['task']}, {method_name(row)} ({row['prompt']})"
    seed = "" if row["seed"] is None else f", seed {row['seed']}"
    return f"{name}, {row['shots']} shots{seed}"


def save_tuned(args, model, tuned, row):
    """Keeps a tuned prompt in --save, where --predict finds all that it needs beside it."""
    place = saved_folder(args, row)
    recipe = digest({name: value for name, value in row["made_of"].items() if name != "seed"})
    facts = {**row, "template": model.task.template, "is_start": False}
    facts |= {"method": f"{method_name(row)}, tuned on {row['task']}"}
    facts |= {"recipe": recipe, "prompt_seed": row["seed"]}
    with script.only_writer(place, wait=True):
        save_prompt(place, tuned, model.t5, **facts)


def saved_folder(args, row):
    """The folder of a run's tuned prompt."""
    name = (row["task"], Path(row["prompt"]).name, row["shots"], row["seed"])
    return Path(args.save) / "-".join(map(str, name))


def is_unsaved(args, run):
    """Whether --save wants a tuned prompt whose folder does not hold this run's."""
    if not args.save or run.start is None:
        return False
    with contextlib.suppress(InputError):
        return load_prompt(saved_folder(args, run.row))[1].get("identity") != run.row["identity"]
    return True


# ------------------------------------------------------------------ Results: their file, the table

NAMES = {
    "random": "PT",
    "ppt": "PPT",
    "maml": "MetaPT",
    "no inner step": "MetaPT, no inner step",
    "fomaml": "MetaPT, first-order",
    "ft": "FT",
}
LEGEND = (
    "PT: prompt tuning from a random start. PPT: from a prompt pre-trained on source data. MetaPT: "
    "from a prompt\nmeta-learned on it. FT: full tuning, all weights of T5 and no prompt.\n"
)


def read_results(file):
    """{identity: line} of a results file; empty where there is no file. Raises InputError, also for
    a line of an earlier version, which has no identity."""
    results, number = {}, 0
    if not file.exists():
        return {}

    hint = "not a line of these results: remove it, or name another file"
    with input_errors(lambda: f"{file}:{number}", hint):
        for number, line in data.numbered_lines(file):
            row = json.loads(line)
            if not 0 <= row["accuracy"] <= 1 or not isinstance(row["settings"], dict):
                raise ValueError("the accuracy is no share, or the settings are none")
            results[row["identity"]] = row
    return results


def write_results(file, rows, again=False):
    """Adds rows by their identity to a results file that other processes add to as well; returns
    what then stands there. A run that another process has added meanwhile is not added twice,
    unless it is made `again`."""
    with script.only_writer(file, wait=True):
        results = read_results(file)
        results.update({key: row for key, row in rows.items() if again or key not in results})
        data.write_lines(file, results.values())
    return results


def method_name(row):
    """The paper's name of a run's method. MetaPT is on K-means clusters, MetaPT(Y) where the source
    is Yelp itself; a prompt may be no better than its start, and so that start itself."""
    name = NAMES.get(row["method"], row["method"])
    if row["method"] == "maml":
        name += "(Y)" if str(row.get("source_task")).startswith("yelp") else ""
        clustering = row.get("clustering") or "kmeans"
        name += f", {clustering}" if clustering != "kmeans" else ""
    return f"{name}, which is its start" if row.get("is_start") else name


def spread(rows):
    """Mean, sample standard deviation and number of rows' accuracies, in points."""
    scores = [100 * row["accuracy"] for row in rows]
    deviation = np.std(scores, ddof=1) if len(scores) > 1 else 0.0
    return np.mean(scores), deviation, len(scores)


def score_table(rows):
    """A table of results: a line for each method, prompt and number of shots, a column for each
    task."""
    cells = {}
    for row in rows:
        line = (str(row["shots"]), method_name(row), row["prompt"])
        cells.setdefault(line, {}).setdefault(row["task"], []).append(row)

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    table = [["shots", "method", "prompt", *tasks]]
    for line, by_task in cells.items():
        table.append([*line, *(in_points(by_task.get(task, [])) for task in tasks)])
    return table


def in_points(rows):
    """The mean and the deviation of rows' accuracies, as text; of one row the accuracy alone."""
    if not rows:
        return "-"
    mean, deviation, count = spread(rows)
    return f"{mean:.2f} ± {deviation:.2f}" if count > 1 else f"{mean:.2f}"


def print_table(heading, rows):
    """Prints rows of cells, the first its header, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width for width in widths]
    print(f"\n{heading}\n")
    for row in [rows[0], rule, *rows[1:]]:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    print()


# ------------------------------------------------------------------------------ Labels for new text


def label(model, prompt, texts, size=64):
    """Yields for each text (a dict) the label that is predicted and every word's probability.
    Raises Diverged."""
    for start in range(0, len(texts), size):
        unlabelled = [{**text, "label": 0} for text in texts[start : start + size]]  # not its own
        for p in model.probabilities(prompt, model.encode(unlabelled)).tolist():
            yield int(np.argmax(p)), {w: round(q, 4) for w, q in zip(model.task.words, p)}


def predict(args):
    """Labels the texts of a file with a tuned prompt: a JSON line for each line of it, of a blank
    one null. Where texts have a label of their own, the last line says how well the two agree.
    Raises InputError."""
    folder = args.prompt[0]
    facts = load_prompt(folder)[1]
    if not args.task and "template" not in facts:
        raise InputError(f"{folder}: it does not say its task; name a --task")
    task = load_task(args.task[0]) if args.task else None
    task = task or Task(facts["task"], facts["template"], facts["words"])
    flags = facts.get("settings") or facts.get("arguments") or {}
    max_length = args.max_length or flags.get("max_length", script.MAX_LENGTH)
    name = args.model or facts["base_model"] or script.MODEL
    notice_another_t5(folder, facts, name, script.contents(name))
    model = PromptedT5(*load_t5(name, args.device, args.dtype), task, max_length)
    prompt = load_prompt(folder, model.t5.config.d_model)[0].to(model.device)

    lines = list(data.read_examples(args.predict, task, labelled=False, blanks=True))
    labels = []
    for number, line in enumerate(lines, 1):
        with input_errors(f"{args.predict}:{number}", "correct that, or leave it out"):
            labels.append(data.label_of(line, task) if line and "label" in line else None)
    confusion = np.zeros((len(task.words), len(task.words)), dtype=int)

    def rows():
        predictions = label(model, prompt, [line for line in lines if line])
        for line, own in zip(tqdm(lines, "labelling", disable=None), labels):
            if line:
                predicted, probabilities = next(predictions)
                prediction = {"label": predicted, "word": task.words[predicted]}
                line = {**line, "prediction": {**prediction, "probabilities": probabilities}}
                if own is not None:
                    confusion[own, predicted] += 1
            yield line

    if args.out:
        data.write_lines(args.out, rows())  # which opens a file there before it asks for a row
        print(f"wrote {args.out}: {len(lines):,} lines, {lines.count(None):,} of them blank")
    else:
        for row in rows():
            print(json.dumps(row, ensure_ascii=False))
    if confusion.any():
        accuracy = confusion.trace() / confusion.sum()
        agreement = f"accuracy {accuracy:.1%}, macro-F1 {100 * macro_f1(confusion):.1f}"
        out = sys.stdout if args.out else sys.stderr
        print(f"{agreement}, of {confusion.sum():,} labelled texts", file=out)


# -------------------------------------------------------------------------------- The command line


def make_parser():
    """The flags of this script."""
    parser = script.Parser(__doc__)
    parser.add_config()
    default = lambda name: f"(default: {SETTINGS['pt'][name]}, ft {SETTINGS['ft'][name]})"
    folders = {"type": script.path, "nargs": "+", "metavar": "FOLDER"}

    add = parser.add_argument_group("where").add_argument
    add("--task", **folders, help="task folders")
    starts = "where prompt tuning starts: random, or prompts' folders"
    add("--prompt", **folders, default=["random"], help=starts)
    add("--model", help=f"a T5 (default: the prompt's own, else {script.MODEL})")
    out = "results (default: results.jsonl), or with --predict labelled texts (default: shown)"
    add("--out", metavar="FILE", help=out)
    add("--restart", action="store_true", help="runs again what stands in --out")
    add("--save", metavar="FOLDER", help="keeps tuned prompts in folders here")
    texts = "labels JSON lines, or a .txt's lines, by a prompt that --save kept or one for --task"
    add("--predict", metavar="FILE", help=texts)

    add = parser.add_argument_group("the paper's").add_argument
    methods = list(SETTINGS)
    add("--method", default=["pt"], choices=methods, nargs="+", help="prompt tuning, full tuning")
    shots = "training examples; 0 tests the start, or with --method ft the T5, as it is"
    add("--shots", type=number(0), default=[40], nargs="+", help=shots)
    draws = "a draw of examples, and a random prompt, for each"
    add("--seeds", type=number(0), default=[1, 2, 3, 4, 5], nargs="+", help=draws)
    add("--validation-shots", type=number(1), help="validation examples (default: as --shots)")
    add("--balanced", action="store_true", help="draws equally many of every class")
    add("--max-test", type=number(1), help="test examples, drawn once (default: all)")
    add("--learning-rate", type=number(1e-12), help=f"AdamW's {default('learning_rate')}")
    add("--search", action="store_true", help=f"full tuning tries {RATES} and keeps the best")
    add("--batch-size", type=number(1), help=f"examples of a step {default('batch_size')}")
    vectors = "vectors of a random prompt (default: as the prompts named beside it, else 100)"
    add("--prompt-length", type=number(1), help=vectors)
    add("--max-length", type=number(1), help=f"tokens of a text (default: {script.MAX_LENGTH})")

    add = parser.add_argument_group("how long").add_argument
    add("--max-epochs", type=number(1), default=200, help="epochs at most, a validation each")
    patience = f"epochs without a better one, then it ends {default('patience')}"
    add("--patience", type=number(1), help=patience)

    machine = parser.add_machine()
    script.add_precision(machine)
    parts = "parts in which a batch is computed, where memory is short"
    machine.add_argument("--accumulate", type=number(1), default=1, help=parts)
    return parser


def main(argv=None):
    """Reads the flags; then the runs, or predictions."""
    parser = make_parser()
    args = parser.parse(argv)
    if args.predict and (len(args.prompt) > 1 or args.prompt == ["random"]):
        parser.error("--predict needs one --prompt FOLDER, a prompt that --save kept")
    if args.predict and len(args.task or []) > 1:
        parser.error("--predict takes one --task")
    if not args.predict and not args.task:
        parser.error("--task FOLDER is needed")
    if args.search and "ft" not in args.method:
        parser.error("--search is full tuning's; add --method ft")
    if args.save and "pt" not in args.method:
        parser.error("--save keeps tuned prompts, and full tuning has none; add --method pt")
    if "ft" in args.method and args.dtype == "bfloat16":
        parser.error(
            "--dtype bfloat16 is for a frozen T5: full tuning's small steps are lost in it"
        )

    script.set_machine(args)
    if args.predict:
        return predict(args)

    for name in ("task", "prompt", "shots", "seeds", "method"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))  # each once
    args.out = args.out or "results.jsonl"
    args.max_length = args.max_length or script.MAX_LENGTH
    for start in args.prompt:  # a prompt belongs to the T5 that it was learned with
        if "pt" in args.method and start != "random":
            args.model = args.model or load_prompt(start)[1]["base_model"]
    args.model = args.model or script.MODEL
    if Path(args.model).is_dir():  # under one name, wherever it is named from
        args.model = str(Path(args.model).resolve())
    run_all(args)


def main_demo():
    """The offline demo: prompt tuning from three prompts and full tuning, as demo/pt.json and
    demo/ft.json say, on both tasks at once."""
    offline = runpy.run_path(str(Path(__file__).with_name("offline") / "demo.py"))
    folder = offline["demo"]()
    commands = []
    for method, test in itertools.product(SETTINGS, sorted(folder.glob("*/test.jsonl"))):
        config = folder / f"{method}.json"
        commands.append(["finetune.py", "--config", config, "--task", test.parent])
    offline["at_once"](*commands)

    order = lambda row: (row["task"], list(NAMES).index(row["method"]))
    rows = sorted(read_results(folder / "results.jsonl").values(), key=order)
    print_table("The demo: accuracy in points, mean ± sample standard deviation", score_table(rows))
    print(LEGEND)


if __name__ == "__main__":
    script.run(main if len(sys.argv) > 1 else main_demo)
