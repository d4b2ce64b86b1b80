"""
Few-shot runs on downstream tasks (Section 5): prompt tuning from any prompt (Appendix A.4), or full
tuning (A.1).

    python finetune.py                                                          # the offline demo
    python finetune.py --task tasks/sst5 tasks/sst2 --method ft pt --prompt random prompts/metapt
    python finetune.py --report results.jsonl --figure shots.png    # Tables 1 and 2, Figure 2
    python finetune.py --task tasks/sst5 --prompt prompts/metapt --seeds 1 --save tuned
    python finetune.py --predict reviews.txt --prompt tuned/sst5-metapt-40-1    # labels new text

Every run, of one task, method, prompt, number of shots and seed, becomes one line of --out; a run
that stands there already is not run again, so after Ctrl-C the same command continues. Under
torchrun the runs are spread over the processes. Table 2 compares prompts of cluster.py's four
--method, Figure 3 prompts of several --source-size and --k: a prompt brings these facts along.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import copy
import hashlib
import itertools
import json
import math
import sys
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
    from metapt import summed_loss

# What Appendix A sets for each method; flags override it. A.4's batches of 4, accumulated 8 times,
# are batches of 32.
SETTINGS = {
    "pt": {"learning_rate": 3e-3, "batch_size": 32, "patience": 6},  # A.4
    "ft": {"learning_rate": 3e-5, "batch_size": 4, "patience": 5},  # A.1
}
RATES = [3e-3, 3e-4, 8e-5, 3e-5, 3e-6]  # A.1's search; the paper prints its third as 8e5


# ------------------------------------------------------------- Appendix A.4 and A.1, to be copied


def tune(
    model,
    prompt,
    training,
    validation,
    learning_rate=3e-3,
    batch_size=32,
    max_epochs=200,
    patience=6,
    full=False,
    seed=1,
    accumulate=1,
    max_steps=None,
    weight_decay=0.0,
):
    """Trains the prompt [n, d] (Appendix A.4), or if `full` the whole T5 (A.1), on examples, and
    leaves what was trained as it was at the best validation. Returns the prompt and the run's
    facts. Raises Diverged where no epoch's validation loss is finite."""
    prompt = torch.nn.Parameter(prompt.clone())
    parameters = list(model.t5.requires_grad_(full).parameters()) if full else [prompt]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    batch, held_out = model.encode(training), list(data.encoded(model, validation))
    torch.manual_seed(seed)
    total = max_epochs * math.ceil(len(training) / batch_size)
    total = min(total, max_steps or total)
    log, best, step, began = [], None, 0, time.time()
    while step < total and not out_of_patience(log, patience):
        model.t5.train(full)  # dropout, in full tuning only
        for rows in torch.randperm(len(training)).split(batch_size)[: total - step]:
            optimizer.param_groups[0]["lr"] = learning_rate * linear_schedule(step, total)
            for part in rows.chunk(accumulate):
                loss = summed_loss(model, prompt[None], [select(batch, part)])  # the part's mean
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

    return prompt.detach(), course_of(log, time.time() - began)


def course_of(log, seconds):
    """The facts of a run from the log of its validations."""
    score = log[best_of(log)]
    return {
        "epochs": len(log),
        "best_epoch": best_of(log) + 1,
        "validation_accuracy": score["accuracy"],
        "validation_loss": score["loss"],
        "seconds": round(seconds, 2),
    }


def search(model, prompt, training, validation, rates=RATES, **settings):
    """Full tuning with every learning rate of A.1's search, each from the same weights. The best on
    validation is left in the T5 to be tested; the test split plays no part in the choice."""
    weights = copy.deepcopy(model.t5.state_dict())
    scores, runs = [], []
    for rate in rates:
        model.t5.load_state_dict(weights)
        with contextlib.suppress(Diverged):  # a rate at which it diverges is no choice
            _, facts = tune(
                model, prompt, training, validation, learning_rate=rate, full=True, **settings
            )
            accuracy, loss = facts["validation_accuracy"], facts["validation_loss"]
            scores.append({"accuracy": accuracy, "loss": loss})
            runs.append({**facts, "learning_rate": rate})
            if best_of(scores) == len(scores) - 1:
                best = copy.deepcopy(model.t5.state_dict())

    if not runs:
        raise Diverged(f"no validation loss is finite at any learning rate of {rates}")

    model.t5.load_state_dict(best)
    found = {run["learning_rate"]: run["validation_accuracy"] for run in runs}
    return prompt, {**runs[best_of(scores)], "tried": {rate: found.get(rate) for rate in rates}}


def macro_f1(confusion):
    """The mean F1 over the classes that occur, in truth or in prediction."""
    confusion = np.array(confusion)
    occurs = confusion.sum(0) + confusion.sum(1)
    return float(np.mean((2 * confusion.diagonal())[occurs > 0] / occurs[occurs > 0]))


# ------------------------------------------------ The runs: what to run, one run, labelling text

# The arguments that a result depends on: a run with others is another run.
RESULT_ARGUMENTS = (
    "model learning_rate batch_size patience max_epochs max_steps weight_decay max_length "
    "validation_shots balanced max_test dtype matmul prompt_length"
).split()
SOURCE_FACTS = ("clustering", "clusters", "source_size", "source_task")  # for Table 2, Figure 3
# The arguments of train_meta.py in which two trainings of one prompt may differ.
TRAINING_ARGUMENTS = "seed out config restart search device threads tasks_per_pass".split()


def run_all(args):
    """Every run that the arguments name and args.out does not hold yet, then the table of it."""
    out, (rank, world) = Path(args.out), data.rank_and_world()
    names = [Task.load(folder).name for folder in args.task]
    if len(set(names)) < len(names):
        raise InputError(f"--task: two tasks have one name, of {names}; change it in a task.json")

    t5, tokenizer = load_t5(args.model, args.device, args.dtype)
    prompts = read_prompts(args, t5)
    tasks = [load_task(folder, t5, tokenizer, args) for folder in args.task]
    data.try_place(out)
    if args.save:
        data.try_place(Path(args.save) / "prompt")

    runs = list_runs(args, tasks, prompts)
    made, stood, diverged = make_runs(args, runs[rank::world])
    results = read_results(out)
    if {run["identity"] for run in runs} <= results.keys():
        # Under torchrun this is not so before the last process ends.
        title = (
            f"All of {out}: accuracy in points, mean ± sample standard deviation over five seeds"
        )
        print_table(
            f"{title}, or over (so many).", score_table(table_lines(newest(results.values())))
        )
        print(LEGEND)
        here = " of this process" if world > 1 else ""
        kept = f"; the tuned prompts are in {args.save}" if args.save else ""
        word = "run" if made == 1 else "runs"
        print(f"wrote {out}: {made} new {word}{here}, {stood} stood there already{kept}")

    if diverged:
        total = made + len(diverged)
        raise Diverged(f"{len(diverged)} of {total} runs have no result; {diverged[0]}")


def make_runs(args, runs):
    """Makes the runs that do not stand in the results and adds them; returns how many it made, how
    many stood there, and the errors of those that diverged."""
    out, made, stood, diverged = Path(args.out), 0, 0, []
    results = read_results(out)
    current = {identity(row) for row in newest(results.values())}
    for run in tqdm(runs, "runs", disable=True if data.rank_and_world()[0] else None):
        row = results.get(run["identity"])
        if row and not args.restart and not run["missing"]:
            if identity(row) not in current:  # its prompt, task or T5 of then is back
                results = add_result(out, row, again=True)
            stood += 1
            continue

        try:
            # What another process with the same command has added meanwhile is seen too.
            results = add_result(out, run_one(args, run), args.restart)
            made += 1
        except Diverged as error:  # the others go on
            task, start = run["task"]["model"].task.name, run["prompt"]
            diverged.append(f"{task}, {run['method']} ({start}), seed {run['seed']}: {error}")
            tqdm.write(diverged[-1])

    return made, stood, diverged


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
    for folder, (prompt, facts) in prompts.items():
        notice_another_t5(folder, facts, args.model, fingerprint)
        if "random" in args.prompt and len(prompt) != args.prompt_length:
            lengths = f"{folder} has {len(prompt)} vectors, random {args.prompt_length}"
            notice(f"{lengths}: --prompt-length {len(prompt)} makes them alike")

    return prompts


def notice_another_t5(prompt, facts, name, fingerprint):
    """Says so where a prompt is used with another T5 than it was learned with."""
    base, known = facts["base_model"], facts.get("fingerprint")
    same = known == fingerprint if known else base in (None, name)
    if not same:
        now = name if name != base else "another T5 that is there now"
        notice(f"{prompt} was learned with {base}, and is used with {now}")


def notice(text):
    """Prints a line on standard error, from the first process."""
    if data.rank_and_world()[0] == 0:
        print(text, file=sys.stderr)


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

    examples = data.read_examples(paths[0], model.task)
    labels = np.fromiter((example["label"] for example in examples), dtype=np.int64)
    draws = {}
    for shots, seed in itertools.product(args.shots, args.seeds):
        how = (args.validation_shots, args.balanced)
        try:
            draws[shots, seed] = data.few_shot(labels, shots, seed, *how)
        except InputError as error:
            raise InputError(f"{paths[0]}: {error}")

    wanted = set()
    for training, validation in draws.values():
        wanted.update(training, validation)

    lines = enumerate(data.read_examples(paths[0], model.task))
    found = {row: example for row, example in lines if row in wanted}
    splits = {}
    for key, (training, validation) in draws.items():
        splits[key] = [found[row] for row in training], [found[row] for row in validation]

    test = list(data.read_examples(paths[1], model.task))
    if not test:
        raise InputError(f"{paths[1]}: no examples to test on; give some")
    if args.max_test and args.max_test < len(test):  # always the same
        order = np.random.default_rng(0).permutation(len(test))
        test = [test[i] for i in order[: args.max_test]]

    warn_of_leak(paths[1], model.task, found.values(), test)
    print_test(model.task, test)
    test.sort(key=lambda example: len(data.text_of(example, model.task)))
    made = data.provenance(args.device, *paths)
    made["digests"][args.model] = made["fingerprint"] = data.fingerprint(t5)
    return {"model": model, "splits": splits, "test": list(data.encoded(model, test)), "made": made}


def warn_of_leak(path, task, drawn, test):
    """Prints a warning where what is tested on was trained on."""
    tested = {data.text_of(example, task) for example in test}
    seen = sum(data.text_of(example, task) in tested for example in drawn)
    if seen > len(drawn) / 10:  # any two splits share a few short texts
        what = f"{seen} of the {len(drawn)} examples drawn from train.jsonl"
        notice(f"warning: {path} holds {what}: results will look better than they are")


def print_test(task, test):
    """Prints how the test split is made up, which accuracy alone hides."""
    if data.rank_and_world()[0] > 0:
        return

    counts = Counter(example["label"] for example in test)
    shares = [f"{counts[label]:,} {word}" for label, word in enumerate(task.words)]
    largest = max(counts.values()) / len(test)
    print(
        f"{task.name}: {len(test):,} test examples, {', '.join(shares)}; the most frequent class "
        f"alone gives {largest:.1%}",
        flush=True,
    )


def list_runs(args, tasks, prompts):
    """What the arguments name: a run for every method, task, prompt, number of shots and seed.
    Raises InputError where --save would replace another run's prompt."""
    runs = []
    for method in args.method:
        settings = vars(data.fill(args, SETTINGS[method]))
        starts = ["none"] if method == "ft" else args.prompt
        for task, start, shots, seed in itertools.product(tasks, starts, args.shots, args.seeds):
            run = {"method": method, "settings": settings, "task": task}
            run |= {"prompt": start, "learned": prompts.get(start), "shots": shots, "seed": seed}
            run["row"], run["start"], run["facts"] = begin(run)
            run["identity"] = identity(run["row"])
            run["missing"] = is_missing(args, run)
            runs.append(run)

    return runs


def begin(run):
    """What tells a run from all others; where it starts, a random prompt [n, d], a learned one, or
    for full tuning none, [0, d]; and that prompt's facts."""
    model, made, settings = run["task"]["model"], run["task"]["made"], run["settings"]
    kept = {name: settings[name] for name in RESULT_ARGUMENTS}
    if run["method"] == "ft":
        start, facts = torch.zeros(0, model.t5.config.d_model), {"method": "ft"}
        kept["learning_rate"] = RATES if settings["search"] else settings["learning_rate"]
    elif run["prompt"] == "random":
        start = model.init_prompt(settings["prompt_length"], run["seed"])
        facts = {"method": "random"}
    else:
        start, facts = run["learned"]

    kept["prompt_length"] = len(start)
    what = json.dumps([model.task.template, model.task.words, *made["digests"].values()])
    row = {
        "task": model.task.name,
        "method": str(facts.get("method", "PEFT")),
        "prompt": run["prompt"],
        "shots": run["shots"],
        "seed": run["seed"],
        "digest": hashlib.sha256(start.cpu().numpy().tobytes()).hexdigest()[:12],
        "data": hashlib.sha256(what.encode()).hexdigest()[:12],
        "settings": kept,
    }
    return row, start.to(model.device), facts


def run_one(args, run):
    """One run, as its line of results. After full tuning the T5 has its own weights again."""
    model, test, made = run["task"]["model"], run["task"]["test"], run["task"]["made"]
    row, start, facts = run["row"], run["start"], run["facts"]
    training, validation = run["task"]["splits"][run["shots"], run["seed"]]
    warn_of_one_class(model.task, training, run)
    names = ("batch_size", "max_epochs", "patience", "accumulate", "max_steps", "weight_decay")
    settings = {name: run["settings"][name] for name in names} | {"seed": run["seed"]}
    examples, rate = (training, validation), run["settings"]["learning_rate"]
    full = run["method"] == "ft"
    weights = copy.deepcopy(model.t5.state_dict()) if full else {}
    try:
        if full and args.search:
            tuned, course = search(model, start, *examples, **settings)
        else:
            tuned, course = tune(model, start, *examples, rate, full=full, **settings)
        score = model.evaluate(tuned, test)
    finally:
        if full:
            model.t5.load_state_dict(weights)

    score["macro_f1"] = macro_f1(score["confusion"])
    if args.save and not full:
        how = {"template": model.task.template, "words": model.task.words}
        how |= {"accuracy": score["accuracy"]}
        save_prompt(saved_folder(args, run), tuned, model.t5, **row, **made, **how)

    row |= {fact: facts[fact] for fact in SOURCE_FACTS if fact in facts}
    row["recipe"] = recipe_of(facts)
    row |= {"words": model.task.words, **score, **course, **made}
    tqdm.write(
        f"{row['task']}, {method_name(row)} ({row['prompt']}), {row['shots']} shots, seed "
        f"{row['seed']}: {score['accuracy']:.1%}, macro-F1 {100 * score['macro_f1']:.1f}, "
        f"{score['in_words']:.0%} answer with a task word; {row['epochs']} epochs, "
        f"{row['seconds']:.1f} s"
    )
    if args.confusion:
        print_confusion(row["words"], score["confusion"])

    return row


def recipe_of(facts):
    """What trainings of one prompt share, as text, so that a report can tell them from different
    prompts: all but the seed and what changes no digit. None for a prompt from elsewhere."""
    if "arguments" not in facts:
        return None
    arguments = facts["arguments"].items()
    kept = {name: value for name, value in arguments if name not in TRAINING_ARGUMENTS}
    made_of = json.dumps([kept, facts.get("digests")], sort_keys=True)
    return hashlib.sha256(made_of.encode()).hexdigest()[:12]


def warn_of_one_class(task, training, run):
    """Prints a warning where a run's training examples are all of one class."""
    labels = {example["label"] for example in training}
    if len(labels) == 1:
        word = task.words[labels.pop()]
        tqdm.write(
            f"warning: all {len(training)} training examples of {task.name}, seed {run['seed']}, "
            f"are {word!r}; --balanced draws equally from every class"
        )


def is_missing(args, run):
    """Whether --save wants a tuned prompt that its folder does not hold. Raises InputError where
    that holds another run's."""
    if not args.save or run["method"] == "ft":
        return False
    folder = saved_folder(args, run)
    if not (folder / "metapt.json").exists():  # which is written last
        return True

    facts = load_prompt(folder)[1]
    same = all(key in facts for key in KINDS) and identity(facts) == run["identity"]
    if not same and not args.restart:
        mend = "give another --save, or --restart to replace it"
        raise InputError(f"{folder}: it holds a prompt of another run; {mend}")
    return not same


def saved_folder(args, run):
    name = (run["task"]["model"].task.name, Path(run["prompt"]).name, run["shots"], run["seed"])
    return Path(args.save) / "-".join(map(str, name))


def predict(args):
    """Labels the texts of a file with a tuned prompt: JSON lines with the label, its word and every
    word's probability, to args.out or to standard output."""
    _, facts = load_prompt(args.prompt[0])
    if not args.task and "template" not in facts:
        message = "it does not say its task, as a prompt that --save kept does; name a --task"
        raise InputError(f"{args.prompt[0]}: {message}")

    with blame(args.prompt[0], "name a --task", TypeError):
        if not args.max_length:
            flags = facts.get("settings") or facts.get("arguments") or {}
            args.max_length = int(flags.get("max_length", data.MAX_LENGTH))
        if args.task:
            task = Task.load(args.task[0])
        else:
            task = Task(facts["task"], facts["template"], facts["words"])

    if args.out:
        data.try_place(args.out)

    name = args.model or facts["base_model"] or data.MODEL
    t5, tokenizer = load_t5(name, args.device, args.dtype)
    notice_another_t5(args.prompt[0], facts, name, data.fingerprint(t5))
    model = PromptedT5(t5, tokenizer, task, args.max_length)
    prompt = load_prompt(args.prompt[0], t5.config.d_model)[0].to(model.device)
    examples = list(data.read_examples(args.predict, task, labelled=False))
    if not examples:
        raise InputError(f"{args.predict}: no text to label; give one on each line")
    if Path(args.predict).is_file():  # and no pipe, which can be read once
        blank = sum(1 for _, line in data.numbered_lines(args.predict) if not line.strip())
        if blank:
            notice(f"{args.predict}: blank lines, which get no label: {blank}")

    has_gold = keep_gold(examples, task, args.predict)
    label(model, prompt, examples)
    if args.out:
        data.write_examples(args.out, examples)
        counts = Counter(example["word"] for example in examples)
        shares = [f"{count:,} {word}" for word, count in counts.items()]
        print(f"wrote {args.out}: {len(examples):,} texts, {', '.join(shares)}")
    else:
        for example in examples:
            print(json.dumps(example, ensure_ascii=False))

    if has_gold:
        print(scored(examples, task), file=sys.stdout if args.out else sys.stderr)


def keep_gold(examples, task, path):
    """Calls the labels of examples "gold", where all have one; returns whether they have. Raises
    InputError for a label that the task has not."""
    has_gold = all("label" in example for example in examples)
    for number, example in enumerate(examples, 1):
        if has_gold:
            with blame(f"{path}: text {number}", "mend it, or leave out all labels"):
                data.check_example(example, task)
            example["gold"] = example["label"]
    return has_gold


def scored(examples, task):
    """How well the labels agree with the gold ones, as text."""
    confusion = np.zeros((len(task.words), len(task.words)), dtype=int)
    for example in examples:
        confusion[example["gold"], example["label"]] += 1
    accuracy, f1 = confusion.trace() / len(examples), macro_f1(confusion)
    return f"accuracy {accuracy:.1%}, macro-F1 {100 * f1:.1f}, of {len(examples):,} labelled texts"


def label(model, prompt, examples, size=64):
    """Gives examples their label, its word and every word's probability, in place."""
    words = model.task.words
    for example in examples:
        example.pop("label", None)

    for start in range(0, len(examples), size):
        some = examples[start : start + size]
        probabilities = model.probabilities(prompt, model.encode(some)).tolist()
        for example, p in zip(some, probabilities):
            example["label"] = int(np.argmax(p))
            example["word"] = words[example["label"]]
            example["probabilities"] = {w: round(value, 4) for w, value in zip(words, p)}


# -------------------------------------------------- Results: their file, the tables, the figures

NAMES = {
    "maml": "MetaPT",
    "fomaml": "MetaPT, first-order",
    "reptile": "MetaPT, Reptile",
    "ppt": "PPT",
    "ft": "FT",
    "random": "PT",
}
LEGEND = (
    "PT: prompt tuning from a random start. PPT: from a prompt pre-trained on source data. MetaPT: "
    "from a prompt\nmeta-learned on it. FT: full tuning, all weights of T5 and no prompt. A run answers "
    "with a task word where\nthe most probable token of the whole vocabulary is a word of the task.\n"
)
# What a line of results must hold.
KINDS = dict.fromkeys(("task", "method", "prompt", "digest", "data"), str)
KINDS |= {"shots": int, "seed": int, "settings": dict, "accuracy": float}
# The paper's own results: 40 shots, five seeds.
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
"""  # Tables 1 and 2, whose K-means is MetaPT(Y)
DRAWS = ("validation_shots", "balanced", "max_test")  # runs with others are of other examples


def identity(row):
    """What a line of results is about, as text."""
    return json.dumps([row[key] for key in KINDS if key != "accuracy"])


def read_results(path):
    """{identity: line} of a results file, of each run the newest; empty where there is no file.
    Raises InputError."""
    results, number = {}, 0
    if not path.exists():
        return {}

    with blame(lambda: f"{path}:{number}", "not a line of results: remove it", TypeError):
        for number, line in data.numbered_lines(path):
            row = parse_json(line)
            for key, kind in KINDS.items():
                if not isinstance(row[key], kind):
                    raise ValueError(f"{key} {row[key]!r}")
            if not 0 <= row["accuracy"] <= 1 or not isinstance(row["settings"]["model"], str):
                raise ValueError("the accuracy is no share or the model no name")
            results[identity(row)] = row

    return results


def add_result(path, row, again=False):
    """Adds a line to the end of a results file that other processes add to as well; returns what
    then stands there. A run that another process has added meanwhile is not added twice, unless it
    is to be made `again`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # freed with the process
        results = read_results(path)
        if again or identity(row) not in results:
            results.pop(identity(row), None)
            results[identity(row)] = row
            data.write_examples(path, results.values())

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


def newest(results):
    """The rows without those of a prompt, a task or a T5 that was made anew under its old name
    since."""
    prompts = {row["prompt"]: row["digest"] for row in results if row["prompt"] != "random"}
    tasks = {(row["task"], row["settings"]["model"]): row["data"] for row in results}
    rows = []
    for row in results:
        same_prompt = prompts.get(row["prompt"], row["digest"]) == row["digest"]
        if same_prompt and tasks[row["task"], row["settings"]["model"]] == row["data"]:
            rows.append(row)
    return rows


def differing(rows, keys, group):
    """For each row the settings, of `keys`, in which the rows of one `group` differ, as text."""
    values = {}
    for row in rows:
        for key in keys:
            values.setdefault((row[group], key), set()).add(str(row.get(key)))

    details = []
    for row in rows:
        shown = [key for key in keys if len(values[row[group], key]) > 1]
        details.append([f"{key} {row[key]}" for key in shown if row.get(key)])

    return details


def table_lines(results, x="shots", keys=RESULT_ARGUMENTS[1:], prompts=True):
    """The lines of a table: {(model, x, draws, method, details): {task: {(start, seed): row}}}.
    Lines of one model, x and draws were tuned and tested on the same examples. The details are the
    prompt, or all trainings of one prompt, and those of `keys` in which the rows of a method
    differ. The start is a learned prompt's digest: the same one in two folders is one training."""
    rows = [{**row, **row["settings"]} for row in results]
    models = {row["model"] for row in rows}
    namesakes = Counter(Path(model).name for model in models)
    short = {m: Path(m).name if namesakes[Path(m).name] == 1 else m for m in models}
    trainings = {}
    for row in rows:
        row["recipe"] = str(row.get("recipe") or row["prompt"])
        trainings.setdefault(row["recipe"], {})[row["prompt"]] = None

    lines = {}
    draws = differing(rows, DRAWS, "task")
    details = differing(rows, [key for key in keys if key not in DRAWS], "method")
    for row, drawn, detail in zip(rows, draws, details):
        if prompts and row["method"] != "ft":
            detail = [*trainings[row["recipe"]], *detail]
        name = (short[row["model"]], row[x], ", ".join(drawn), method_name(row), ", ".join(detail))
        start = row["method"] if row["method"] in ("random", "ft") else row["digest"]
        lines.setdefault(name, {}).setdefault(row["task"], {})[start, row["seed"]] = row

    return dict(sorted(lines.items(), key=lambda line: line[0][:3]))


def spread(rows):
    """Mean, sample standard deviation and number of rows' accuracies, in points."""
    scores = [100 * row["accuracy"] for row in rows]
    deviation = np.std(scores, ddof=1) if len(scores) > 1 else 0.0
    return np.mean(scores), deviation, len(scores)


def fill_table(lines, cell):
    """Rows of a table: one for each line of results, with a column for each task. `cell` gives the
    text from the line's name and the task."""
    tasks = list(dict.fromkeys(task for tasks in lines.values() for task in tasks))
    rows = [["model", "shots", "method", "prompt", *tasks]]
    for name, line in lines.items():
        model, shots, drawn, method, details = name
        cells = [cell(name, task) if task in line else "-" for task in tasks]
        shots = ", ".join(filter(None, [str(shots), drawn]))
        rows.append([model, shots, method, details or "-", *cells])
    return rows


def score_table(lines, paper=""):
    """Table 1's form: the best of each model and number of shots in bold; behind it what the paper
    has for the same."""
    best = {}
    for name, tasks in lines.items():
        for task, rows in tasks.items():
            best.setdefault((*name[:3], task), []).append(spread(rows.values())[0])

    def cell(name, task):
        rows = lines[name][task]
        mean, deviation, count = spread(rows.values())
        text = f"{mean:.2f} ± {deviation:.2f}" if count > 1 else f"{mean:.2f}"
        if mean == max(best[*name[:3], task]):
            text = f"**{text}**"
        trainings, seeds = len({start for start, _ in rows}), len(seeds_of(rows))
        if trainings > 1 and count == trainings * seeds:
            text += f" ({trainings} × {seeds})"
        elif trainings > 1 or count != 5:
            text += f" ({count})"
        theirs = paper_value(paper, name, task)
        if theirs:
            text += f"; paper {theirs}, {mean - float(theirs.split('±')[0]):+.2f}"
        return text

    return fill_table(lines, cell)


def paper_value(paper, name, task):
    """What the paper has for a line's model and method, at 40 shots; else None."""
    model, shots, _, method, _ = name
    for line in paper.strip().splitlines():
        words = line.split()
        if shots == 40 and words[:2] == [model, method.replace(" ", "")]:
            return dict(zip(PAPER_TASKS, words[2:])).get(task)
    return None


def gain_table(lines, against):
    """Is a gain real? Every method against one: its mean gain, and that gain's interval."""

    def cell(name, task):
        others = [
            other
            for other, tasks in lines.items()
            if other[:3] == name[:3] and task in tasks and against in names_of(other)
        ]
        if not others or others[0] == name:
            return "-"

        ours, theirs = lines[name][task], lines[others[0]][task]
        if len(seeds_of(ours) & seeds_of(theirs)) < 2:
            return "-"

        mean, half = gain(ours, theirs)
        text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
        return f"**{text}**" if half < abs(mean) else text

    return fill_table(lines, cell)


def names_of(name):
    """What --against may call a line: its method, its details, or one of these."""
    return [part for part in (*name[3:], *name[4].split(", ")) if part]


def gain(ours, theirs):
    """The mean of what one line {(start, seed): row} is ahead of another, and half of its
    95 % t interval. A seed draws the same examples for both, so draws are compared in pairs. Where
    a line holds several trainings of its prompt, the variance over trainings is added to that over
    draws: the interval is then about the next training and the next draw."""
    from scipy import stats

    seeds = sorted(seeds_of(ours) & seeds_of(theirs))
    our_means, their_means = means(ours, 1), means(theirs, 1)
    gains = [our_means[seed] - their_means[seed] for seed in seeds]
    variances = [(np.var(gains, ddof=1) / len(seeds), len(seeds) - 1)]
    for line in (ours, theirs):
        starts = {start for start, _ in line}
        complete = [seed for seed in seeds if all((start, seed) in line for start in starts)]
        trainings = list(means(line, 0, complete).values())
        if len(trainings) > 1:
            count = len(trainings)
            variances.append((np.var(trainings, ddof=1) / count, count - 1))

    variance = sum(one for one, _ in variances)
    if variance == 0:
        return np.mean(gains), 0.0
    # Welch and Satterthwaite's degrees of freedom, of a sum of variances.
    freedom = variance**2 / sum(one**2 / degrees for one, degrees in variances)
    return np.mean(gains), stats.t.ppf(0.975, freedom) * variance**0.5


def seeds_of(line):
    """The seeds of a line {(start, seed): row}."""
    return {seed for _, seed in line}


def means(line, part, seeds=None):
    """The mean accuracy of every training (part 0 of a line's keys) or of every seed (part 1)."""
    groups = {}
    for key, row in line.items():
        if seeds is None or key[1] in seeds:
            groups.setdefault(key[part], []).append(row)
    return {name: spread(rows)[0] for name, rows in groups.items()}


def print_table(title, rows):
    """Prints rows of cells, the first its header, as a Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rule = ["-" * width for width in widths]
    print(f"\n{title}\n")
    for row in [rows[0], rule, *rows[1:]]:
        print("| " + " | ".join(map(str.ljust, row, widths)) + " |")
    print()


def print_confusion(words, counts):
    """Prints one confusion matrix, [true][predicted]."""
    rows = [[word, *map(str, line)] for word, line in zip(words, counts)]
    print_table("The label down, the prediction across:", [["", *words], *rows])


def print_confusions(lines):
    """A confusion matrix for each line and task, summed over the seeds and trainings."""
    for (model, shots, drawn, method, details), tasks in lines.items():
        for task, rows in tasks.items():
            words = next(iter(rows.values()))["words"]
            counts = sum(np.array(row["confusion"]) for row in rows.values())
            facts = [task, model, f"{shots} shots", drawn, method, details]
            print(f"\n{', '.join(filter(None, facts))}, all seeds:")
            print_confusion(words, counts)


def print_report(args):
    """The table of a results file beside the paper's, the paired comparison and, with --figure,
    Figure 2 or 3."""
    results = read_results(Path(args.report))
    if not results:
        raise InputError(f"{args.report}: no results here; finetune.py --out writes them")

    known, results = len(results), newest(results.values())
    if known > len(results):
        older = known - len(results)
        print(f"left out: {older} results of a prompt, a task or a T5 that was made anew since")

    lines = table_lines(results)
    print_table(
        "Tables 1 and 2: accuracy in points, mean ± sample standard deviation over five seeds, over "
        "(so many), or over (trainings of the prompt × seeds).",
        score_table(lines, PAPER),
    )
    print(LEGEND)

    names = list(dict.fromkeys(part for name in lines for part in names_of(name)))
    against = args.against or next((n[4] for n in lines if n[3] == "MetaPT"), names[0])
    if against not in names:  # ppt may stand for PPT
        named = [name for name in names if name.lower() == against.lower()]
        if not named:
            found = ", ".join(names)
            raise InputError(f"{args.report}: no {against} to compare with, only {found}")
        against = named[0]

    title = (
        f"Against {against}: mean difference in points, paired over the seeds, with its 95 % t "
        "interval over seeds, two at least, and over trainings where there are several; bold where it "
        "leaves out 0."
    )
    print_table(title, gain_table(lines, against))
    if args.confusion:
        with blame(args.report, "run them again for --confusion", TypeError):
            print_confusions(lines)

    if args.figure:
        data.save_figure(args.figure, plot(curves(results, args.x), args.x))


def curves(results, x):
    """{name: {x: {task: {(start, seed): row}}}}: the lines of Figure 2 (x is shots), 3a
    (source_size) or 3b (clusters), each of at least two points. A point of Figure 3 is of all
    prompts of its size or number. Raises InputError without any."""
    others = [key for key in ("shots", *SOURCE_FACTS[1:3]) if key != x]
    keys = RESULT_ARGUMENTS if x == "shots" else [*others, *RESULT_ARGUMENTS]
    rows = [row for row in results if isinstance(row.get(x), int)]
    found = {}
    for name, tasks in table_lines(rows, x, keys, prompts=x == "shots").items():
        _, at, drawn, method, details = name
        found.setdefault((method, drawn, details), {})[at] = tasks

    found = {name: curve for name, curve in found.items() if len(curve) > 1}
    if not found:
        message = f"no method was run with more than one value of {x}: nothing to plot"
        raise InputError(f"{message}; run one with several")

    methods, labelled = Counter(method for method, _, _ in found), {}
    for name, curve in found.items():
        # The details only where another line is of the same method.
        parts = name if methods[name[0]] > 1 else name[:1]
        labelled[", ".join(filter(None, parts))] = curve

    return labelled


def plot(curves, x):
    """Figure 2 or 3: a panel for each task, a line for each method, the mean over the seeds in a
    band of one standard deviation. Returns the figure."""
    from matplotlib.figure import Figure

    ticks = {}  # of each task's panel
    for curve in curves.values():
        for at, tasks in curve.items():
            for task in tasks:
                ticks.setdefault(task, set()).add(at)

    labels = {"shots": "training examples", "source_size": "source examples"}
    figure = Figure(figsize=(1 + 4 * len(ticks), 4.5), layout="constrained")
    panels = figure.subplots(1, len(ticks), squeeze=False)[0]
    for panel, task in zip(panels, ticks):
        styles = itertools.cycle(["o-", "s--", "^:", "D-.", "v-", "P--"])
        for (name, curve), style in zip(curves.items(), styles):
            xs = [at for at in curve if task in curve[at]]
            points = [spread(curve[at][task].values())[:2] for at in xs]
            means, deviations = np.array(points).reshape(-1, 2).T
            panel.plot(xs, means, style, label=name)
            panel.fill_between(xs, means - deviations, means + deviations, alpha=0.15, linewidth=0)
        if x != "clusters":
            panel.set_xscale("log", base=2 if x == "shots" else 10)
        rotation = 30 if x == "source_size" else 0
        marks = sorted(ticks[task])
        panel.set_xticks(marks, [f"{at:,}" for at in marks], rotation=rotation)
        panel.minorticks_off()
        panel.set(title=task, xlabel=labels.get(x, x))

    panels[0].set_ylabel("accuracy in points")
    handles, columns = panels[0].get_legend_handles_labels(), min(4, 2 * len(ticks))
    figure.legend(*handles, loc="outside lower center", ncols=columns, frameon=False)
    return figure


# -------------------------------------------------------------------------------- The command line


def make_parser():
    """The flags of this script."""
    whole, positive = data.whole, data.positive
    parser = data.Parser(__doc__)
    parser.add_config_flag()
    model = f"a T5 by hub name or folder (default: the prompt's own, else {data.MODEL})"
    seeds = [1, 2, 3, 4, 5]
    out = "the results (default: results.jsonl); with --predict the labelled texts (default: shown)"
    texts = "labels a .txt or .jsonl file with a prompt that --save kept, or any prompt for --task"
    parser.add("--task", "task folders", nargs="+", type=data.folder, metavar="FOLDER")
    methods = list(SETTINGS)
    parser.add(
        "--method", "prompt tuning, full tuning, or both", ["pt"], choices=methods, nargs="+"
    )
    parser.add("--model", model)
    prompts = "where prompt tuning starts: random, or prompts' folders"
    start = data.folder_or("random")
    parser.add("--prompt", prompts, ["random"], type=start, nargs="+", metavar="FOLDER")
    parser.add("--shots", "training examples", [40], type=whole(1), nargs="+")
    parser.add("--seeds", "each draws its own examples", seeds, type=whole(0), nargs="+")
    parser.add("--out", out, metavar="FILE")
    save = "keeps every tuned prompt in a folder here; full tuning's weights are not kept"
    parser.add("--save", save, metavar="FOLDER")
    parser.add("--predict", texts, type=data.file, metavar="FILE")
    parser.add_setting("--learning-rate", "AdamW's", SETTINGS, type=positive)
    parser.add_switch("--search", f"full tuning tries {RATES}; tests what validates best")
    parser.add_setting("--batch-size", "examples of an update", SETTINGS, type=whole(1))
    passes = "passes that a batch is split into, where memory is short"
    parser.add("--accumulate", passes, 1, type=whole(1))
    epochs = "epochs at most; each ends in a validation"
    parser.add("--max-epochs", epochs, 200, type=whole(1))
    parser.add("--max-steps", "updates at most (default: as --max-epochs says)", type=whole(1))
    patience = "epochs without a better validation until the run stops"
    parser.add_setting("--patience", patience, SETTINGS, type=whole(1))
    shots = "validation examples (default: as many as --shots)"
    parser.add("--validation-shots", shots, type=whole(1))
    parser.add_switch("--balanced", "draws equally from every class")
    parser.add("--max-test", "tests on so many, drawn once (default: on all)", type=whole(1))
    report = "prints the tables of a results file, beside the paper's"
    parser.add("--report", report, type=data.file, metavar="FILE")
    against = "with --report: the method or prompt to compare with (default: first MetaPT)"
    parser.add("--against", against, metavar="NAME")
    parser.add_switch("--confusion", "prints the confusion matrices too")
    figure = "with --report: the picture to plot of it, .png, .pdf or .svg"
    parser.add("--figure", figure, type=data.picture, metavar="FILE")
    axes = ["shots", "source_size", "clusters"]
    parser.add("--x", "the figure's horizontal axis", "shots", choices=axes)
    parser.add_prompt_flags()
    parser.set_defaults(max_length=None)  # --predict cuts as its prompt's run did
    return parser


def main(argv=None):
    """Reads the flags; then the runs, a report or predictions."""
    parser = make_parser()
    args = parser.parse(argv)
    if args.predict and args.prompt == ["random"]:
        parser.error("--predict needs --prompt FOLDER, a prompt that --save kept")
    if args.predict and (len(args.prompt) > 1 or len(args.task or []) > 1):
        parser.error("--predict takes one --prompt and one --task")
    if (args.figure or args.against) and not args.report:
        parser.error("--figure and --against are about the results of --report FILE")
    if args.predict:
        return predict(args)
    if args.report:
        return print_report(args)
    if not args.task:
        parser.error("--task FOLDER is needed")
    if args.search and "ft" not in args.method:
        parser.error("--search is full tuning's; add --method ft")
    if args.save and "pt" not in args.method:
        parser.error("--save keeps tuned prompts, and full tuning has none; add --method pt")
    if "ft" in args.method and args.dtype == "bfloat16":
        parser.error(
            "--dtype bfloat16 is for a frozen T5: full tuning's small steps are lost in it"
        )

    args.out = args.out or "results.jsonl"
    args.max_length = args.max_length or data.MAX_LENGTH
    for start in args.prompt:  # a prompt belongs to the T5 that it was learned with
        if "pt" in args.method and start != "random":
            args.model = args.model or load_prompt(start)[1]["base_model"]
    args.model = args.model or data.MODEL
    run_all(args)


def main_demo():
    """The offline demo: prompt tuning from three prompts and full tuning, as demo/pt.json and
    demo/ft.json say."""
    folder = data.demo()
    for method in SETTINGS:
        print(f"$ python finetune.py --config {folder / method}.json", flush=True)
        main(["--config", f"{folder / method}.json"])


if __name__ == "__main__":
    data.run(main if len(sys.argv) > 1 else main_demo)
