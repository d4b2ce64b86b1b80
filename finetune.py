"""
Few-shot runs on downstream tasks (Section 5): prompt tuning from any prompt (Appendix A.4), or full tuning (A.1).

    python finetune.py                                                                     # the offline demo
    python finetune.py --task tasks/sst5 tasks/sst2 --prompt random prompts/ppt prompts/metapt
    python finetune.py --task tasks/sst5 tasks/sst2 --method ft
    python finetune.py --task tasks/sst5 --prompt prompts/metapt --seeds 1 --save tuned    # keeps tuned/sst5-metapt-40-1
    python finetune.py --predict reviews.txt --prompt tuned/sst5-metapt-40-1               # labels new text with it

Every run, of one task, method, prompt, number of shots and seed, becomes one line of --out; a run that stands there
already is not run again. At the end comes the table of that file: accuracy in points, mean ± sample standard deviation
over the seeds.
"""

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
from metapt import InputError, PromptedT5, Task, load_prompt, load_t5, save_prompt, select

# What Appendix A sets for each method; flags override it. A.4's batches of 4, accumulated 8 times, are batches of 32.
SETTINGS = {
    "pt": {"learning_rate": 3e-3, "batch_size": 32, "patience": 6},  # A.4
    "ft": {"learning_rate": 3e-5, "batch_size": 4, "patience": 5},  # A.1
}
NAMES = {"maml": "MetaPT", "fomaml": "MetaPT, first order", "ppt": "PPT", "random": "PT, random prompt",
         "ft": "FT, no prompt"}
# The arguments that a result depends on: a run with others is another run.
RESULT_ARGUMENTS = ("model", "learning_rate", "batch_size", "patience", "max_epochs", "max_steps", "weight_decay",
                    "max_length", "validation_shots", "balanced", "max_test")


def run_all(args):
    """Every run that the arguments name and the file args.out does not hold yet, then the table of that file."""
    out = Path(args.out)
    results = read_results(out) if out.exists() and not args.restart else []
    settings = {name: getattr(args, name) for name in RESULT_ARGUMENTS}
    t5, tokenizer = load_t5(args.model, args.device, args.dtype)
    weights = {name: weight.clone() for name, weight in t5.state_dict().items()} if args.method == "ft" else {}
    tasks = [load_task(folder, t5, tokenizer, args) for folder in args.task]
    prompts = ["none"] if args.method == "ft" else args.prompt
    for prompt in prompts:
        start_prompt(prompt, tasks[0][0], args, seed=1)  # a broken one ends the sweep before it begins

    runs = list(itertools.product(tasks, prompts, args.shots, args.seeds))
    new = 0
    for (model, training, test), prompt, shots, seed in tqdm(runs, "runs", disable=None):
        start, method = start_prompt(prompt, model, args, seed)
        run = {"task": model.task.name, "method": method, "prompt": prompt, "shots": shots, "seed": seed,
               "digest": hashlib.sha256(start.cpu().numpy().tobytes()).hexdigest()[:12], "settings": settings}
        if any(all(row.get(key) == run[key] for key in run) for row in results):
            continue
        few, validation = data.few_shot(training, shots, seed, args.validation_shots, args.balanced)
        tuned, facts = tune(model, start, few, validation, args, seed)
        score = model.evaluate(tuned, batches(model, test))
        if args.method == "ft":
            t5.load_state_dict(weights)
        elif args.save:
            save_prompt(Path(args.save) / f"{model.task.name}-{Path(prompt).name}-{shots}-{seed}", tuned, t5,
                        **run, accuracy=score["accuracy"], template=model.task.template, words=model.task.words)
        results.append({**run, **score, **facts})
        data.write_examples(out, results)
        tqdm.write(f"{model.task.name}, {label(run)}, {shots} shots, seed {seed}: {100 * score['accuracy']:.1f} % "
                   f"after {facts['epochs']} epochs and {facts['seconds']:.1f} s")
        new += 1
    print_table(results)
    print(f"wrote {out}: {new} new runs, {len(runs) - new} stood there already"
          + (f"; the tuned prompts are in {args.save}" if args.save else ""))


def load_task(folder, t5, tokenizer, args):
    """A task's model, its training examples and its test examples; with --max-test only so many, always the same."""
    folder = Path(folder)
    model = PromptedT5(t5, tokenizer, Task.load(folder), args.max_length)
    training, test = (list(data.read_examples(folder / f"{split}.jsonl", model.task)) for split in ("train", "test"))
    if not test:
        raise InputError(f"{folder / 'test.jsonl'}: no examples to test on")
    if args.max_test and args.max_test < len(test):
        test = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:args.max_test]]
    test.sort(key=lambda example: sum(len(example[field]) for field in model.task.fields))  # to pad less
    return model, training, test


def start_prompt(name, model, args, seed):
    """Where a run starts, and by which method that was made: a random prompt [n, d], the prompt in a folder, or for
    full tuning none, [0, d]."""
    if name == "none":
        return torch.zeros(0, model.t5.config.d_model, device=model.device), "ft"
    if name == "random":
        return model.init_prompt(args.prompt_length, seed), "random"
    prompt, facts = load_prompt(name, model.t5.config.d_model)
    return prompt.to(model.device), facts.get("method", "PEFT")


def batches(model, examples, size=64):
    return (model.encode(examples[i:i + size]) for i in range(0, len(examples), size))


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
                (model.loss(prompt, select(training, part)) * len(part) / len(rows)).backward()
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
                             "seconds": round(time.time() - began, 2)}


def read_results(path):
    """The lines of a results file. Raises InputError with the line."""
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            results.append(json.loads(line))
            label(results[-1]), results[-1]["task"], results[-1]["shots"], float(results[-1]["accuracy"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a line of results: {error}; --restart begins the file anew")
    return results


def label(row):
    """How a table names a run's method and prompt."""
    name = NAMES.get(row["method"], row["method"])
    return name if row["prompt"] in ("none", "random") else f"{name} ({row['prompt']})"


def print_table(results):
    """Table 1's form: a line for each method and prompt, a column for each task, mean ± sample standard deviation."""
    groups = {}
    for row in results:
        setting = (label(row), row["shots"], json.dumps(row.get("settings")))
        groups.setdefault(setting, {}).setdefault(row["task"], []).append(100 * row["accuracy"])
    tasks = list(dict.fromkeys(row["task"] for row in results))
    print("\n" + f"{'':34}{'shots':>6}" + "".join(f"{task:>20}" for task in tasks))
    for (name, shots, _), scores in groups.items():
        cells = [mean_and_deviation(scores[task]) if task in scores else "-" for task in tasks]
        print(f"{name:34}{shots:6}" + "".join(f"{cell:>20}" for cell in cells))
    print("accuracy in points, mean ± sample standard deviation over the seeds, their number in brackets\n")


def mean_and_deviation(points):
    spread = f" ± {np.std(points, ddof=1):.2f}" if len(points) > 1 else ""
    return f"{np.mean(points):.2f}{spread} ({len(points)})"


def predict(args):
    """Labels the texts of a file with a tuned prompt: JSON lines with the label, its word and every word's
    probability, to args.out or to standard output."""
    prompt, facts = load_prompt(args.prompt[0])
    if "template" not in facts:
        raise InputError(f"{args.prompt[0]}: not a prompt that --save kept, so without its task's template and words")
    t5, tokenizer = load_t5(args.model or facts["base_model"], args.device)
    task = Task(facts["task"], facts["template"], facts["words"])
    model = PromptedT5(t5, tokenizer, task, facts["settings"]["max_length"])
    prompt = prompt.to(model.device)
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


def main(argv=None):
    parser = data.Parser(__doc__)
    parser.add_config_flag()
    parser.add("--task", "task folders", nargs="+", metavar="FOLDER")
    parser.add("--method", "prompt tuning or full tuning", "pt", choices=list(SETTINGS))
    parser.add("--model", f"a T5 by hub name or folder (default: {data.MODEL}; with --predict the prompt's own)")
    parser.add("--prompt", "where prompt tuning starts: random, or prompts' folders", ["random"], nargs="+")
    parser.add("--shots", "training examples", [40], type=int, nargs="+")
    parser.add("--seeds", "each draws its own examples", [1, 2, 3, 4, 5], type=int, nargs="+")
    parser.add("--out", "the results file (default: results.jsonl); with --predict the labelled texts (default: "
               "standard output)", metavar="FILE")
    parser.add("--save", "keeps every tuned prompt in a folder here", metavar="FOLDER")
    parser.add("--predict", "labels the texts of a .txt or .jsonl file with a prompt that --save kept", metavar="FILE")
    parser.add_setting("--learning-rate", "AdamW's", SETTINGS, type=float)
    parser.add_setting("--batch-size", "examples of an update", SETTINGS, type=int)
    parser.add("--accumulate", "passes that a batch is split into, where memory is short", 1, type=int)
    parser.add("--max-epochs", "epochs at most; each ends in a validation", 200, type=int)
    parser.add("--max-steps", "updates at most (default: as --max-epochs says)", type=int)
    parser.add_setting("--patience", "epochs without a better validation until the run stops", SETTINGS, type=int)
    parser.add("--validation-shots", "validation examples (default: as many as --shots)", type=int)
    parser.add("--balanced", "draws equally from every class", False, action="store_true")
    parser.add("--max-test", "tests on so many examples, drawn once (default: on all)", type=int)
    parser.add_model_flags()
    args = parser.parse(argv)
    if args.predict:
        return predict(args)
    if not args.task:
        parser.error("--task FOLDER is needed")
    args.out = args.out or "results.jsonl"
    args.model = args.model or data.MODEL
    run_all(data.fill(args, SETTINGS[args.method]))


def main_demo():
    """The offline demo: prompt tuning from three prompts and full tuning, as demo/pt.json and demo/ft.json say."""
    folder = data.demo()
    for method in SETTINGS:
        print(f"$ python finetune.py --config {folder / method}.json", flush=True)
        main(["--config", f"{folder / method}.json"])


if __name__ == "__main__":
    data.run(main if len(sys.argv) > 1 else main_demo)
