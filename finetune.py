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

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    HELP = not {"-h", "--help"}.isdisjoint(sys.argv)

import contextlib
import copy
import itertools
import json
import math
import runpy
import time
from collections import Counter
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

import data

if not data.HELP:
    import torch

    from metapt import Diverged, InputError, PromptedT5, Task, best_of, blame, linear_schedule
    from metapt import load_prompt, load_t5, out_of_patience, parse_json, save_prompt, select

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
    `accumulate` parts. Returns the prompt, [0, d] without one, and the run's facts. Raises Diverged
    where no epoch's validation loss is finite."""
    full = prompt is None
    prompt = torch.nn.Parameter(model.no_prompt() if full else prompt.clone())
    parameters = list(model.t5.requires_grad_().parameters()) if full else [prompt]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    batch, held_out = model.encode(training), list(model.batches(validation))
    total = max_epochs * math.ceil(len(training) / batch_size)
    torch.manual_seed(seed)

    log, best, step, began = [], None, 0, time.time()
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
    if best is None:
        raise Diverged(f"no validation loss is finite at learning rate {learning_rate}; lower it")

    with torch.no_grad():
        for parameter, value in zip(parameters, best):
            parameter.copy_(value)

    score = log[best_of(log)]
    facts = {
        "epochs": len(log),
        "best_epoch": best_of(log) + 1,
        "validation_accuracy": score["accuracy"],
        "validation_loss": score["loss"],
        "seconds": round(time.time() - began, 2),
    }
    return prompt.detach(), facts


def search(model, training, validation, rates=RATES, **settings):
    """Full tuning with every learning rate of A.1's search, each from the same weights. The best on
    validation is left in the T5 to be tested; the test split plays no part in the choice. Returns
    the best run's facts. Raises Diverged."""
    weights = copy.deepcopy(model.t5.state_dict())
    scores, runs = [], []
    for rate in rates:
        model.t5.load_state_dict(weights)
        with contextlib.suppress(Diverged):  # a rate at which it diverges is no choice
            _, facts = tune(model, None, training, validation, learning_rate=rate, **settings)
            accuracy, loss = facts["validation_accuracy"], facts["validation_loss"]
            scores.append({"accuracy": accuracy, "loss": loss})
            runs.append({**facts, "learning_rate": rate})
            if best_of(scores) == len(scores) - 1:
                best = copy.deepcopy(model.t5.state_dict())

    if not runs:
        raise Diverged(f"no validation loss is finite at any learning rate of {rates}")

    model.t5.load_state_dict(best)
    found = {run["learning_rate"]: run["validation_accuracy"] for run in runs}
    return {**runs[best_of(scores)], "tried": {rate: found.get(rate) for rate in rates}}


def macro_f1(confusion):
    """The mean F1 over the classes that occur, in truth or in prediction."""
    confusion = np.array(confusion)
    occurs = confusion.sum(0) + confusion.sum(1)
    return float(np.mean((2 * confusion.diagonal())[occurs > 0] / occurs[occurs > 0]))


# ------------------------------------------------------------- The runs: what to run, and one run


def run_all(args):
    """Every run that the arguments name and args.out does not hold yet, then the table of them."""
    out = Path(args.out)
    names = [Task.load(folder).name for folder in args.task]
    if len(set(names)) < len(names):
        raise InputError(f"--task: two tasks have one name, of {names}; change it in a task.json")

    t5, tokenizer = load_t5(args.model, args.device, args.dtype)
    prompts = read_prompts(args, t5)
    tasks = [load_task(folder, t5, tokenizer, args) for folder in args.task]
    runs = list_runs(args, tasks, prompts)
    out.parent.mkdir(parents=True, exist_ok=True)
    results, rows, made, diverged = read_results(out), [], 0, []
    for run in tqdm(runs, "runs", disable=None):
        key = identity(run["row"])
        if args.restart or key not in results or is_unsaved(args, run):
            try:
                # What another process has added meanwhile is seen too.
                results = add_result(out, one_run(args, run), args.restart)
                made += 1
            except Diverged as error:  # the others go on
                diverged.append(f"{shown(run['row'])}: {error}")
                tqdm.write(diverged[-1])
                continue
        rows.append(results[key])

    if rows:
        print_table(
            f"{out}: accuracy in points, mean ± sample standard deviation over the seeds",
            score_table(rows),
        )
    kept = f"; the tuned prompts are in {args.save}" if args.save else ""
    word = "run" if made == 1 else "runs"
    print(f"wrote {out}: {made} new {word}, {len(rows) - made} stood there already{kept}")
    if diverged:
        raise Diverged(f"{len(diverged)} of {len(runs)} runs have no result; {diverged[0]}")


def read_prompts(args, t5):
    """{folder: (prompt, its facts)} of the learned prompts. Raises InputError where one cannot be
    used: before a sweep rather than in it."""
    if "pt" not in args.method:
        return {}
    if args.save and len({Path(prompt).name for prompt in args.prompt}) < len(args.prompt):
        message = "two of the prompts have one name, and so would their tuned ones"
        raise InputError(f"--save: {message}; rename a folder")

    folders = [prompt for prompt in args.prompt if prompt != "random"]
    prompts = {folder: load_prompt(folder, t5.config.d_model) for folder in folders}
    fingerprint = data.fingerprint(t5)
    for folder, (_, facts) in prompts.items():
        notice_another_t5(folder, facts, args.model, fingerprint)

    return prompts


def notice_another_t5(prompt, facts, name, fingerprint):
    """Says so where a prompt is used with another T5 than it was learned with."""
    base, known = facts["base_model"], facts.get("fingerprint")
    same = known == fingerprint if known else base in (None, name)
    if not same:
        now = name if name != base else "another T5 that is there now"
        print(f"{prompt} was learned with {base}, and is used with {now}", file=sys.stderr)


def load_task(folder, t5, tokenizer, args):
    """A task's model, the few-shot splits of every number of shots and seed, the encoded test
    batches, and what all can be traced by. Of the training split only what is drawn is held in
    memory. Raises InputError."""
    folder = Path(folder)
    model = PromptedT5(t5, tokenizer, Task.load(folder), args.max_length)
    paths = [folder / "train.jsonl", folder / "test.jsonl"]
    if not paths[1].exists():
        mend = "move lines of train.jsonl there, as data.py convert does with --test-share"
        raise InputError(f"{paths[1]}: no such file; {mend}")

    splits = read_draws(paths[0], model.task, args)
    test = list(data.read_examples(paths[1], model.task))
    if not test:
        raise InputError(f"{paths[1]}: no examples to test on; give some")
    if args.max_test and args.max_test < len(test):  # always the same
        order = np.random.default_rng(0).permutation(len(test))
        test = [test[i] for i in order[: args.max_test]]

    print_test(model.task, test)
    test.sort(key=lambda example: len(data.text_of(example, model.task)))
    facts = data.provenance(args.device, *paths)
    facts["fingerprint"] = data.fingerprint(t5)
    return {"model": model, "splits": splits, "test": list(model.batches(test)), "facts": facts}


def read_draws(path, task, args):
    """{(shots, seed): (training examples, validation examples)} of Section 5.1's draws. Raises
    InputError."""
    examples = data.read_examples(path, task)
    labels = np.fromiter((example["label"] for example in examples), dtype=np.int64)
    draws, wanted = {}, set()
    for shots, seed in itertools.product(args.shots, args.seeds):
        how = (args.validation_shots, args.balanced)
        try:
            draws[shots, seed] = data.few_shot(labels, shots, seed, *how)
        except InputError as error:
            raise InputError(f"{path}: {error}")
        wanted.update(*draws[shots, seed])

    lines = enumerate(data.read_examples(path, task))
    found = {row: example for row, example in lines if row in wanted}
    splits = {}
    for key, (training, validation) in draws.items():
        splits[key] = [found[row] for row in training], [found[row] for row in validation]
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
    """What the arguments name: for every method, task, prompt, number of shots and seed where the
    run starts, with what settings, and the facts that tell its line of results from all others."""
    runs = []
    for method in args.method:
        settings = vars(data.fill(args, SETTINGS[method]))
        names = ["none"] if method == "ft" else args.prompt
        for task, name, shots, seed in itertools.product(tasks, names, args.shots, args.seeds):
            start, facts = None, {"method": "ft"}
            if name == "random":
                how = (settings[flag] for flag in ("init", "init_scale"))
                start = task["model"].init_prompt(settings["prompt_length"], seed, *how)
                facts = {"method": "random"}
            elif method == "pt":
                start, facts = prompts[name]
                start = start.to(task["model"].device)

            row = key_of(task, name, start, facts, shots, seed, settings)
            run = {"row": row, "task": task, "start": start, "prompt": facts, "settings": settings}
            runs.append(run)

    return runs


def key_of(task, name, start, facts, shots, seed, settings):
    """The beginning of a line of results: what tells the run from all others."""
    form, files = task["model"].task, task["facts"]["digests"].values()
    kept = {flag: settings[flag] for flag in DECIDING}
    kept["prompt_length"] = 0 if start is None else len(start)
    if start is None and settings["search"]:
        kept["learning_rate"] = RATES
    made_of = json.dumps([form.template, form.words, *files, task["facts"]["fingerprint"]])
    return {
        "task": form.name,
        "method": str(facts.get("method", "PEFT")),
        "prompt": name,
        "shots": shots,
        "seed": seed,
        "digest": data.digest(b"" if start is None else start.cpu().numpy().tobytes()),
        "data": data.digest(made_of),
        "settings": kept,
    }


def one_run(args, run):
    """One run, as its line of results. After full tuning the T5 has its own weights again."""
    model, start, settings = run["task"]["model"], run["start"], run["settings"]
    training, validation = run["task"]["splits"][run["row"]["shots"], run["row"]["seed"]]
    names = ("batch_size", "max_epochs", "patience", "accumulate")
    how = {name: settings[name] for name in names} | {"seed": run["row"]["seed"]}
    weights = copy.deepcopy(model.t5.state_dict()) if start is None else None
    try:
        if not training:  # 0 shots test the start, or with --method ft the T5, as it is
            tuned = model.no_prompt() if start is None else start
            course = {"epochs": 0, "seconds": 0.0}
        elif start is None and args.search:
            tuned, course = model.no_prompt(), search(model, training, validation, **how)
        else:
            rate = settings["learning_rate"]
            tuned, course = tune(model, start, training, validation, rate, **how)
        score = model.evaluate(tuned, run["task"]["test"])
    finally:
        if weights:
            model.t5.load_state_dict(weights)

    score["macro_f1"] = macro_f1(score["confusion"])
    form = {"template": model.task.template, "words": model.task.words}
    if args.save and start is not None:
        facts = {**run["row"], **run["task"]["facts"], **form, "accuracy": score["accuracy"]}
        save_prompt(saved_folder(args, run["row"]), tuned, model.t5, **facts)

    kept = {name: run["prompt"][name] for name in SOURCE_FACTS if name in run["prompt"]}
    row = {**run["row"], **kept, "words": model.task.words, **score, **course}
    tqdm.write(
        f"{shown(row)}: {row['accuracy']:.1%}, macro-F1 {100 * row['macro_f1']:.1f}, "
        f"{row['in_words']:.0%} answer with a task word; {row['epochs']} epochs, "
        f"{row['seconds']:.1f} s"
    )
    return {**row, **run["task"]["facts"]}


# What a prompt brings along for Table 2 and Figure 3, and which trainings of it are of one recipe.
SOURCE_FACTS = ("clustering", "clusters", "source_size", "source_task", "recipe")


def shown(row):
    """A run's name, for a person."""
    name = f"{row['task']}, {method_name(row)} ({row['prompt']})"
    return f"{name}, {row['shots']} shots, seed {row['seed']}"


def saved_folder(args, row):
    """The folder of a run's tuned prompt."""
    name = (row["task"], Path(row["prompt"]).name, row["shots"], row["seed"])
    return Path(args.save) / "-".join(map(str, name))


def is_unsaved(args, run):
    """Whether --save wants a tuned prompt whose folder does not hold one, whole."""
    if not args.save or run["start"] is None:
        return False
    return not (saved_folder(args, run["row"]) / "metapt.json").exists()  # written last


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
# What tells a line of results from all others.
KEY = dict.fromkeys(("task", "method", "prompt", "digest", "data"), str)
KEY |= {"shots": int, "seed": int, "settings": dict}


def identity(row):
    """What a line of results is about, as text."""
    return json.dumps([row[key] for key in KEY])


def read_results(path):
    """{identity: line} of a results file, of each run the newest; empty where there is no file.
    Raises InputError."""
    results, number = {}, 0
    if not path.exists():
        return {}

    with blame(lambda: f"{path}:{number}", "not a line of results: remove it", TypeError):
        for number, line in data.numbered_lines(path):
            row = parse_json(line)
            for key, kind in {**KEY, "accuracy": float}.items():
                if not isinstance(row[key], kind):
                    raise ValueError(f"{key} {row[key]!r}")
            if not 0 <= row["accuracy"] <= 1 or not isinstance(row["settings"]["model"], str):
                raise ValueError("the accuracy is no share or the model no name")
            results[identity(row)] = row

    return results


def add_result(path, row, again=False):
    """Adds a line to a results file that other processes add to as well; returns what then stands
    there. A run that another process has added meanwhile is not added twice, unless it is made
    `again`."""
    with FileLock(path.with_name(f".{path.name}.lock")):  # freed with the process
        results = read_results(path)
        if again or identity(row) not in results:
            results.pop(identity(row), None)
            results[identity(row)] = row
            data.write_lines(path, results.values())

    return results


def method_name(row):
    """The paper's name of a run's method. MetaPT is on K-means clusters, MetaPT(Y) where the source
    is Yelp itself."""
    name = NAMES.get(row["method"], row["method"])
    if row["method"] != "maml":
        return name
    if str(row.get("source_task")).startswith("yelp"):
        name += "(Y)"
    if (row.get("clustering") or "kmeans") != "kmeans":
        name += f", {row['clustering']}"
    return name


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
    for line, found in cells.items():
        table.append([*line, *(in_points(found.get(task, [])) for task in tasks)])
    return table


def in_points(rows):
    """The mean and the deviation of rows' accuracies, as text; of one row the accuracy alone."""
    if not rows:
        return "-"
    mean, deviation, count = spread(rows)
    return f"{mean:.2f} ± {deviation:.2f}" if count > 1 else f"{mean:.2f}"


def print_table(title, rows):
    """Prints rows of cells, the first its header, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width for width in widths]
    print(f"\n{title}\n")
    for row in [rows[0], rule, *rows[1:]]:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    print()


# ------------------------------------------------------------------------------ Labels for new text


def predict(args):
    """Labels the texts of a file with a tuned prompt: JSON lines with the label that is predicted,
    its word and every word's probability, to args.out or to standard output. Where texts have a
    label of their own, the last line says how well the two agree."""
    prompt, facts = load_prompt(args.prompt[0])
    task = task_of(args, facts)
    flags = facts.get("settings") or facts.get("arguments") or {}
    with blame(args.prompt[0], "give --max-length", TypeError, AttributeError):
        length = args.max_length or int(flags.get("max_length", data.MAX_LENGTH))
    name = args.model or facts["base_model"] or data.MODEL
    t5, tokenizer = load_t5(name, args.device, args.dtype)
    notice_another_t5(args.prompt[0], facts, name, data.fingerprint(t5))
    model = PromptedT5(t5, tokenizer, task, length)
    prompt, _ = load_prompt(args.prompt[0], t5.config.d_model)  # of this width
    examples = read_texts(args.predict, task)
    label(model, prompt.to(model.device), examples)
    if args.out:
        data.write_lines(args.out, examples)
        counts = Counter(example["word"] for example in examples)
        shares = [f"{count:,} {word}" for word, count in counts.items()]
        print(f"wrote {args.out}: {len(examples):,} texts, {', '.join(shares)}")
    else:
        for example in examples:
            print(json.dumps(example, ensure_ascii=False))

    labelled = [example for example in examples if "label" in example]
    if labelled:
        print(agreement(labelled, task), file=sys.stdout if args.out else sys.stderr)


def task_of(args, facts):
    """The task --task, or the one that a tuned prompt belongs to. Raises InputError."""
    if args.task:
        return Task.load(args.task[0])
    if "template" not in facts:
        message = "it does not say its task, as a prompt that --save kept does; name a --task"
        raise InputError(f"{args.prompt[0]}: {message}")
    with blame(args.prompt[0], "name a --task", TypeError):
        return Task(facts["task"], facts["template"], facts["words"])


def read_texts(path, task):
    """The examples of a file to label; some may have a label. Raises InputError."""
    examples = list(data.read_examples(path, task, labelled=False))
    if not examples:
        raise InputError(f"{path}: no text to label; give one on each line")
    for number, example in enumerate(examples, 1):
        if "label" in example:  # all else is checked already
            with blame(f"{path}: text {number}", "mend its label, or leave it out"):
                data.check_example(example, task)
    return examples


def label(model, prompt, examples, size=64):
    """Gives examples the predicted label, its word and every word's probability, in place."""
    words = model.task.words
    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        probabilities = model.probabilities(prompt, model.encode(some)).tolist()
        for example, p in zip(some, probabilities):
            example["predicted"] = int(np.argmax(p))
            example["word"] = words[example["predicted"]]
            example["probabilities"] = {w: round(value, 4) for w, value in zip(words, p)}


def agreement(examples, task):
    """How well predicted labels agree with the texts' own, as text."""
    confusion = np.zeros((len(task.words), len(task.words)), dtype=int)
    for example in examples:
        confusion[example["label"], example["predicted"]] += 1
    accuracy, f1 = confusion.trace() / len(examples), macro_f1(confusion)
    return f"accuracy {accuracy:.1%}, macro-F1 {100 * f1:.1f}, of {len(examples):,} labelled texts"


# -------------------------------------------------------------------------------- The command line

# The flags that decide about a result: a run with others is another run.
DECIDING = (
    "model learning_rate batch_size patience max_epochs max_length validation_shots balanced "
    "max_test dtype matmul prompt_length init init_scale"
).split()


def make_parser():
    """The flags of this script."""
    parser, number, folder = data.Parser(__doc__), data.number, data.existing("folder")
    file, start = data.existing("file"), data.existing("folder", "random")
    each = lambda name: f"(default: {SETTINGS['pt'][name]}, ft {SETTINGS['ft'][name]})"
    parser.add_config()

    add = parser.add_argument_group("where").add_argument
    prompts = "where prompt tuning starts: random, or prompts' folders"
    out = "results (default: results.jsonl), or with --predict labelled texts (default: shown)"
    texts = "labels a .jsonl, or a text a line, by a prompt that --save kept or one for --task"
    many = {"nargs": "+", "metavar": "FOLDER"}
    add("--task", type=folder, **many, help="task folders")
    add("--prompt", type=start, default=["random"], **many, help=prompts)
    add("--model", help=f"a T5 (default: the prompt's own, else {data.MODEL})")
    add("--out", metavar="FILE", help=out)
    add("--restart", action="store_true", help="runs again what stands in --out")
    add("--save", metavar="FOLDER", help="keeps every tuned prompt in a folder here")
    add("--predict", type=file, metavar="FILE", help=texts)

    paper = parser.add_argument_group("the paper's")
    add, methods = paper.add_argument, list(SETTINGS)
    shots = "training examples; 0: the start, or with --method ft the T5, as it is"
    add("--method", default=["pt"], choices=methods, nargs="+", help="prompt or full tuning")
    add("--shots", type=number(0), default=[40], nargs="+", help=shots)
    add("--seeds", type=number(0), default=[1, 2, 3, 4, 5], nargs="+", help="one draw each")
    add("--validation-shots", type=number(1), help="validation examples (default: --shots)")
    add("--balanced", action="store_true", help="draws equally from every class")
    add("--max-test", type=number(1), help="tests on so many, drawn once (default: on all)")
    add("--learning-rate", type=number(1e-12), help=f"AdamW's {each('learning_rate')}")
    add("--search", action="store_true", help=f"full tuning tries {RATES}, keeps the best")
    add("--batch-size", type=number(1), help=f"of an update {each('batch_size')}")
    starts = ["vocab", "uniform"]
    add("--init", default="vocab", choices=starts, help="how a random prompt is drawn")
    data.add_start(paper)
    add("--max-length", type=number(1), help=f"tokens of a text (default: {data.MAX_LENGTH})")

    add = parser.add_argument_group("how long").add_argument
    add("--max-epochs", type=number(1), default=200, help="epochs at most, a validation each")
    add("--patience", type=number(1), help=f"epochs without a better {each('patience')}")

    machine = parser.add_machine()
    data.add_precision(machine)
    add = machine.add_argument
    add("--accumulate", type=number(1), default=1, help="parts of a batch, where memory is short")
    return parser


def main(argv=None):
    """Reads the flags; then the runs, or predictions."""
    parser = make_parser()
    args = parser.parse(argv)
    if args.predict and args.prompt == ["random"]:
        parser.error("--predict needs --prompt FOLDER, a prompt that --save kept")
    if args.predict and (len(args.prompt) > 1 or len(args.task or []) > 1):
        parser.error("--predict takes one --prompt and one --task")
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

    data.set_machine(args)
    if args.predict:
        return predict(args)

    args.out = args.out or "results.jsonl"
    args.max_length = args.max_length or data.MAX_LENGTH
    for start in args.prompt:  # a prompt belongs to the T5 that it was learned with
        if "pt" in args.method and start != "random":
            args.model = args.model or load_prompt(start)[1]["base_model"]
    args.model = args.model or data.MODEL
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
    data.run(main if len(sys.argv) > 1 else main_demo)
