"""
Few-shot runs on downstream tasks (Section 5): prompt tuning from any prompt (Appendix A.4), or full
tuning (A.1).

    python finetune.py                                                          # the offline demo
    python finetune.py --task tasks/sst5 tasks/sst2 --method ft pt --prompt random prompts/metapt
    python finetune.py --task tasks/sst5 --prompt prompts/metapt --seeds 1 --save tuned
    python finetune.py --predict reviews.txt --prompt tuned/sst5-metapt-40-1    # labels new text
    python figures/report.py results.jsonl    # the paper's tables; with --figure, its figures

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
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import data
from metapt import Diverged, InputError, PromptedT5, Task, best_of, digest, input_errors
from metapt import linear_schedule, load_prompt, load_t5, out_of_patience, save_prompt, select
from script import number

# What Appendix A sets for each method; flags override it. A.4's batches of 4, accumulated 8 times,
# are batches of 32.
SETTINGS = {
    "pt": {"learning_rate": 3e-3, "batch_size": 32, "max_epochs": 200, "patience": 6},  # A.4
    "ft": {"learning_rate": 3e-5, "batch_size": 4, "max_epochs": 200, "patience": 5},  # A.1
}


# -------------------------------------- Appendix A.4 and A.1, of tensors, lists and numbers alone


def tune(
    model,
    prompt,
    training,
    validation,
    learning_rate,
    batch_size,
    max_epochs,
    patience,
    accumulate=1,
    seed=1,
):
    """Trains the prompt [n, d] (Appendix A.4), or where that is None the whole T5 (A.1), on
    examples, and leaves what was trained as it was at the best validation: tune(model, prompt,
    training, validation, **SETTINGS["pt"]). Returns the prompt, [0, d] without one, and what came
    of the run. Raises Diverged where a validation loss is not finite."""
    full = prompt is None
    prompt = torch.nn.Parameter(model.no_prompt() if full else prompt.clone())
    parameters = list(model.t5.requires_grad_().parameters()) if full else [prompt]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    total = max_epochs * math.ceil(len(training) / batch_size)
    schedule = LambdaLR(optimizer, lambda step: linear_schedule(step, total))
    batch = model.encode(training)
    held_out = list(model.batches(validation))
    torch.manual_seed(seed)

    log = []
    while len(log) < max_epochs and not out_of_patience(log, patience):
        model.t5.train(full)  # dropout, in full tuning only
        train_epoch(model, prompt, batch, batch_size, accumulate, optimizer, schedule)
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
    }


def train_epoch(model, prompt, examples, batch_size, accumulate, optimizer, schedule):
    """One pass over encoded examples, in random order; a batch is computed in `accumulate` parts."""
    for rows in torch.randperm(len(examples["labels"])).split(batch_size):
        for part in rows.chunk(accumulate):
            loss = model.loss(prompt, select(examples, part))
            (loss * len(part) / len(rows)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


# ------------------------------------------------------------- The runs: what to run, and one run


@dataclass
class Run:
    """A run to be made: the beginning of its line of results, the T5 for its task, the prompt that
    it starts at (None for full tuning), its examples, and what `tune` takes beside them."""

    row: dict
    model: PromptedT5
    start: torch.Tensor
    training: list
    validation: list
    test: list
    settings: dict


def run_all(args):
    """Every run that the arguments name and args.out does not hold yet, then the table of them."""
    out = Path(args.out)
    results = read_results(out)
    names = [Task.load(folder).name for folder in args.task]
    if len(set(names)) < len(names):
        raise InputError(f"--task: two tasks have one name, of {names}; change it in a task.json")

    t5, contents, prompts = read_prompts(args)
    runs = []
    for folder in args.task:
        runs += read_runs(args, folder, t5, contents, prompts)

    write_results(out, {})  # an error here comes before the work
    rows = []
    diverged = []
    new = 0
    for run in tqdm(runs, "runs", disable=None):
        identity = run.row["identity"]
        if args.restart or identity not in results or not is_saved(args, run.row):
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
        heading = "accuracy in points, mean ± sample standard deviation over the seeds"
        print_table(f"{out}: {heading}", score_table(rows))
    print(f"wrote {out}: {new} of {len(rows)} results are new")
    if diverged:
        raise Diverged(f"{len(diverged)} of {len(runs)} runs have no result; {diverged[0]}")


def read_prompts(args):
    """The T5 and its tokenizer, the T5's contents, and {folder: (prompt, its facts)} of the learned
    prompts. Where flags do not, these decide about the T5 and a random prompt's length. Raises
    InputError."""
    names = args.prompt if "pt" in args.method else []
    prompts = {name: load_prompt(name) for name in names if name != "random"}
    lengths = [len(prompt) for prompt, _ in prompts.values()]
    args.prompt_length = args.prompt_length or max(lengths, default=100)
    for _, facts in prompts.values():  # a prompt belongs to the T5 that it was learned with
        args.model = args.model or facts["base_model"]
    args.model = args.model or script.MODEL
    if Path(args.model).is_dir():  # under one name, wherever it is named from
        args.model = str(Path(args.model).resolve())

    t5, tokenizer = load_t5(args.model, args.device, args.dtype)
    contents = script.contents(args.model)
    for name, (prompt, facts) in prompts.items():
        width = t5.config.d_model
        if prompt.shape[1] != width:
            raise InputError(f"{name}: of width {prompt.shape[1]}; {args.model} needs {width}")
        base = facts["base_model"]
        learned_with = facts.get("made_of", {}).get("--model", base)  # PEFT notes a name alone
        if learned_with not in (None, contents, args.model):
            print(f"{name} was learned with {base}, not {args.model}", file=sys.stderr)
        prompts[name] = prompt.to(args.device), facts
    return (t5, tokenizer), contents, prompts


def read_runs(args, folder, t5, contents, prompts):
    """The runs on a task: of every method, start, number of shots and seed. A run that no draw
    enters, as without shots from a learned prompt, is one whatever the seeds. Raises InputError."""
    task = Task.load(folder)
    model = PromptedT5(*t5, task, args.max_length)
    train = Path(folder) / "train.jsonl"
    test = Path(folder) / "test.jsonl"
    examples = list(data.read_examples(train, task))
    tested = read_test(test, task, args.max_test, examples)
    files = {"train.jsonl": digest(train), "test.jsonl": digest(test), "--model": contents}
    files["task.json"] = digest([task.template, task.words])

    splits = {}
    labels = [example["label"] for example in examples]
    for shots, seed in itertools.product(args.shots, args.seeds):
        with input_errors(train, ""):
            training, validation = data.few_shot(
                labels, shots, seed, args.validation_shots, args.balanced
            )
        splits[shots, seed] = [examples[i] for i in training], [examples[i] for i in validation]

    runs = []
    for method in args.method:
        names = args.prompt if method == "pt" else ["none"]
        for name, (shots, seed) in itertools.product(names, splits):
            if method == "ft":
                start, facts = None, {"method": "ft"}
            elif name == "random":
                start, facts = model.init_prompt(args.prompt_length, seed), {"method": "random"}
            else:
                start, facts = prompts[name]

            no_draw = shots == 0 and name != "random"
            if no_draw and seed != args.seeds[0]:
                continue
            about = {"task": task.name, "tuning": method, "prompt": name}
            about |= {"shots": shots, "seed": None if no_draw else seed}
            row = begin_row(args, about, start, facts, files)
            settings = {flag: row["settings"][flag] for flag in SETTINGS[method]}
            settings |= {"accumulate": args.accumulate, "seed": seed}
            runs.append(Run(row, model, start, *splits[shots, seed], tested, settings))
    return runs


def read_test(path, task, max_test, training):
    """The examples to test on, the shortest first; prints their classes, and how many texts are in
    train.jsonl too. Raises InputError."""
    examples = list(data.read_examples(path, task))
    if not examples:
        raise InputError(f"{path}: no examples to test on; give some")
    if max_test and max_test < len(examples):  # always the same
        order = np.random.default_rng(0).permutation(len(examples))
        examples = [examples[i] for i in order[:max_test]]

    counts = Counter(task.words[example["label"]] for example in examples)
    shares = ", ".join(f"{count:,} {word}" for word, count in counts.most_common())
    print(f"{task.name}: {len(examples):,} test examples, {shares}", flush=True)
    texts = {data.text_of(example, task) for example in examples}
    repeated = sum(data.text_of(example, task) in texts for example in training)
    if repeated:
        print(f"{path}: {repeated:,} texts of train.jsonl are in it too", file=sys.stderr)
    return sorted(examples, key=lambda example: len(data.text_of(example, task)))


# What comparable results share: SHARED always, OWN where both are of one tuning (A.1 or A.4).
SHARED = ("max_length", "max_epochs", "validation_shots", "balanced", "max_test", "dtype", "matmul")
OWN = {"pt": ("learning_rate", "batch_size", "patience")}
OWN["ft"] = (*OWN["pt"], "accumulate")
# What a prompt brings along for Table 2 and Figure 3, and which trainings are of one recipe.
SOURCE_FACTS = ("clustering", "clusters", "source_size", "source_task", "is_start")
SOURCE_FACTS += ("recipe", "prompt_seed")


def begin_row(args, about, start, facts, files):
    """The beginning of a line of results: what the run is about, and its identity, the digest of
    all that decides its digits."""
    tuning = about["tuning"]
    settings = {}
    for flag in (*SHARED, *OWN[tuning]):
        value = getattr(args, flag)
        settings[flag] = SETTINGS[tuning].get(flag) if value is None else value
    if start is not None:
        settings["prompt_length"] = len(start)

    method = facts.get("method", "PEFT")
    made_of = {**files, "method": method, "start": facts.get("weights"), **settings}
    made_of |= {"shots": about["shots"], "seed": about["seed"]}
    row = {**about, "method": method, "model": args.model, "settings": settings}
    row |= {fact: facts[fact] for fact in SOURCE_FACTS if fact in facts}
    return {**row, "made_of": made_of, "identity": digest(made_of)}


def one_run(args, run):
    """One run, as its line of results. Raises Diverged."""
    # Full tuning is of a copy: the T5 keeps its weights for the other runs.
    model = copy.deepcopy(run.model) if run.start is None else run.model
    began = time.time()
    if run.training:
        tuned, outcome = tune(model, run.start, run.training, run.validation, **run.settings)
    else:  # 0 shots test the start, or with --method ft the T5, as it is
        tuned = model.no_prompt() if run.start is None else run.start
        outcome = {"epochs": 0}
    outcome["seconds"] = round(time.time() - began, 2)

    total = math.ceil(len(run.test) / 64)
    batches = tqdm(model.batches(run.test, 64), "testing", total, leave=False, disable=None)
    score = model.evaluate(tuned, batches)
    row = {**run.row, "words": model.task.words, **score, **outcome}
    row |= script.provenance(args.device)
    if args.save and run.start is not None:
        save_tuned(args, model, tuned, row)
    tqdm.write(
        f"{title(row)}: {row['accuracy']:.1%}, {row['in_words']:.0%} answer with a task word; "
        f"{row['epochs']} epochs, {row['seconds']:.1f} s"
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


def is_saved(args, row):
    """Whether --save holds this run's tuned prompt, or wants none."""
    if not args.save or row["tuning"] == "ft":
        return True
    with contextlib.suppress(InputError):
        return load_prompt(saved_folder(args, row))[1].get("identity") == row["identity"]
    return False


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
    if not file.exists():
        return {}

    results = {}
    hint = "not a line of these results: remove it, or name another file"
    for line_number, line in data.numbered_lines(file):
        with input_errors(f"{file}:{line_number}", hint):
            row = json.loads(line)
            if not 0 <= row["accuracy"] <= 1:
                raise ValueError("the accuracy is no share")
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


def predict(args):
    """Labels the texts of a file with a tuned prompt: a JSON line for each, and where texts have
    labels of their own the accuracy. Raises InputError."""
    t5, _, prompts = read_prompts(args)
    folder = args.prompt[0]
    prompt, facts = prompts[folder]
    if args.task:
        task = Task.load(args.task[0])
    elif "template" in facts:
        task = Task(facts["task"], facts["template"], facts["words"])
    else:
        raise InputError(f"{folder}: it does not say its task; name a --task")

    flags = facts.get("settings") or facts.get("arguments") or {}
    max_length = args.max_length or flags.get("max_length", script.MAX_LENGTH)
    model = PromptedT5(*t5, task, max_length)
    rows = list(data.read_examples(args.predict, task, labelled=False))
    probabilities = []
    total = math.ceil(len(rows) / 64)
    for batch in tqdm(model.batches(rows, 64), "labelling", total, disable=None):
        probabilities += model.probabilities(prompt, batch).tolist()

    for row, p in zip(rows, probabilities):
        label = int(np.argmax(p))
        row["prediction"] = {"label": label, "word": task.words[label]}
        row["prediction"]["probabilities"] = {w: round(q, 4) for w, q in zip(task.words, p)}

    if args.out:
        data.write_lines(args.out, rows)
        print(f"wrote {args.out}")
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
    hits = [row["label"] == row["prediction"]["label"] for row in rows if "label" in row]
    if hits:
        print(f"accuracy {np.mean(hits):.1%}, of {len(hits):,} labelled texts", file=sys.stderr)


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
    add("--batch-size", type=number(1), help=f"examples of a step {default('batch_size')}")
    vectors = "vectors of a random prompt (default: as the longest named beside it, else 100)"
    add("--prompt-length", type=number(1), help=vectors)
    add("--max-length", type=number(1), help=f"tokens of a text (default: {script.MAX_LENGTH})")

    add = parser.add_argument_group("how long").add_argument
    epochs = f"epochs at most, a validation each (default: {SETTINGS['pt']['max_epochs']})"
    add("--max-epochs", type=number(1), help=epochs)
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
    for name in ("task", "prompt", "shots", "seeds", "method"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name) or [])))  # each once
    several = len(args.prompt) > 1 or len(args.task) > 1
    if args.predict and (several or args.prompt == ["random"] or args.method != ["pt"]):
        parser.error("--predict needs one --prompt FOLDER, which --save kept, or with one --task")
    if not args.predict and not args.task:
        parser.error("--task FOLDER is needed")
    if args.save and "pt" not in args.method:
        parser.error("--save keeps tuned prompts, and full tuning has none; add --method pt")
    if args.save and len({Path(prompt).name for prompt in args.prompt}) < len(args.prompt):
        parser.error("--save: two of the prompts have one name; rename a folder")
    if "ft" in args.method and args.dtype == "bfloat16":
        parser.error("--dtype bfloat16 is for a frozen T5: full tuning's steps are lost in it")

    script.set_machine(args)
    if args.predict:
        return predict(args)

    args.out = args.out or "results.jsonl"
    args.max_length = args.max_length or script.MAX_LENGTH
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
