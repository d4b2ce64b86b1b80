"""
Learns a prompt from source data: meta-learned prompt tuning (Section 4.3, Appendix A.3), or the baseline of
pre-trained prompt tuning (Appendix A.2).

    python train_meta.py                                                                 # the offline demo
    python train_meta.py --source source/kmeans10.jsonl --out prompts/metapt             # the paper's MetaPT
    python train_meta.py --source source/kmeans10.jsonl --out prompts/ppt --method ppt   # the baseline

The folder --out becomes a prompt in PEFT's layout, the best one by validation, with log.jsonl and arguments.json
beside it. The same command again continues a run that was stopped.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
from metapt import InputError, PromptedT5, Task, adapt, load_prompt, load_t5, meta_gradient, save_prompt, write_beside

# What Appendix A sets for each method; flags override it.
MAML = {"learning_rate": 0.025, "max_steps": 20_000, "eval_every": 500, "patience": 6}  # A.3
PPT = {"learning_rate": 0.003, "max_steps": 1_250_000, "eval_every": 20_000, "patience": 5}  # A.2
SETTINGS = {"maml": MAML, "fomaml": MAML, "ppt": PPT}


def train(args):
    """One run from source data to the best prompt, in the folder args.out."""
    out = Path(args.out)
    t5, tokenizer = load_t5(args.model, args.device)
    model = PromptedT5(t5, tokenizer, Task.load(Path(args.source).parent), args.max_length)
    tasks, held_out = split_clusters(list(data.read_examples(args.source, model.task)), args)
    print(f"{args.method} on {sum(map(len, tasks)):,} examples in {len(tasks)} clusters; "
          f"{sum(map(len, held_out)):,} others validate", flush=True)
    if args.method == "ppt":  # which mixes all source data
        tasks = [[example for task in tasks for example in task]]
    first_epoch = len(tasks[0]) // args.batch_size if args.method == "ppt" else 0  # A.2: no early stop within it
    held_out = [encode_held_out(model, examples, args.batch_size) for examples in held_out]

    prompt = torch.nn.Parameter(start_prompt(model, args))
    optimizer = torch.optim.AdamW([prompt], lr=args.learning_rate, weight_decay=args.weight_decay)
    start, best = 0, {"prompt": prompt.detach().clone(), "step": 0, "accuracy": -1.0, "loss": 0.0}
    if (out / "checkpoint.safetensors").exists() and not args.restart:
        start, best = load_checkpoint(out / "checkpoint.safetensors", prompt, optimizer)
        print(f"continues {out} from step {start:,}")
    out.mkdir(parents=True, exist_ok=True)
    data.save_arguments(out / "arguments.json", args)
    log = Log(out / "log.jsonl", start)

    with data.StopSignal() as stop, tqdm(total=args.max_steps, initial=start, desc=args.method, disable=None) as bar:
        for step in range(start, args.max_steps + 1):
            if step % args.eval_every == 0 or step == args.max_steps:
                score = validate(model, prompt.detach(), held_out, args)
                if (score["accuracy"], -score["loss"]) > (best["accuracy"], -best["loss"]):
                    best = {"prompt": prompt.detach().clone(), "step": step, **score}
                log.write({"step": step, **score, "best_step": best["step"]})
                bar.set_postfix(accuracy=f"{score['accuracy']:.3f}", best=f"{best['accuracy']:.3f}")
            ended = step == args.max_steps or step - max(best["step"], first_epoch) >= args.patience * args.eval_every
            if ended or stop or step % args.eval_every == 0:
                save_checkpoint(out / "checkpoint.safetensors", prompt, optimizer, step, best)
            if ended:
                break
            if stop:
                raise KeyboardInterrupt(f"stopped at step {step:,} and saved; the same command continues")
            update(model, prompt, optimizer, tasks, step, args)
            bar.update()

    first = log.lines[0]["accuracy"]
    save_prompt(out, best["prompt"], t5, method=args.method, step=best["step"], accuracy=best["accuracy"],
                start_accuracy=first, arguments=vars(args))
    if best["step"] == 0:
        print(f"no step of this run was better than its start; {out} holds the prompt that it started from")
    print(f"wrote {out}: the prompt of step {best['step']:,} of {step:,}, validation accuracy "
          f"{100 * best['accuracy']:.1f} % (at the start {100 * first:.1f} %)")


def split_clusters(examples, args):
    """The meta-tasks T: [training examples of each cluster] and [held-out examples of each], about args.validation
    held out in all. PPT also takes source data without clusters. Raises InputError where a cluster is too small."""
    clusters = {}
    for example in examples:
        clusters.setdefault(example.get("cluster", 0), []).append(example)
    if args.method != "ppt" and "cluster" not in examples[0]:
        raise InputError(f"{args.source}: no clusters; make them with cluster.py --source {args.source}")
    count = max(args.validation // len(clusters), args.batch_size + 1)
    for name, members in clusters.items():
        if len(members) < count + 2 * args.batch_size:
            raise InputError(f"{args.source}: cluster {name} has {len(members)} examples; {2 * args.batch_size} to "
                             f"train and {count} to validate are needed: lower --k of cluster.py or --validation")
        np.random.default_rng(args.seed).shuffle(members)
    ordered = [clusters[name] for name in sorted(clusters)]
    return [members[count:] for members in ordered], [members[:count] for members in ordered]


def start_prompt(model, args):
    """A random prompt, or the one in the folder --init."""
    if args.init in ("vocab", "normal"):
        return model.init_prompt(args.prompt_length, args.seed, args.init)
    return load_prompt(args.init, model.t5.config.d_model)[0].to(model.device)


def encode_held_out(model, examples, m, batch_size=64):
    """A cluster's held-out examples, encoded: m of them to adapt on, and batches of the rest to score."""
    rest = examples[m:]
    return model.encode(examples[:m]), [model.encode(rest[i:i + batch_size]) for i in range(0, len(rest), batch_size)]


def draw_tasks(tasks, m, seed, step):
    """For every meta-task m support examples and another m query examples, disjoint. The draw depends on seed and
    step alone, so that a run can be continued from any step."""
    rng = np.random.default_rng([seed, step])
    drawn = [[task[i] for i in rng.choice(len(task), 2 * m, replace=False)] for task in tasks]
    return [examples[:m] for examples in drawn], [examples[m:] for examples in drawn]


def update(model, prompt, optimizer, tasks, step, args):
    """One step P <- P - β ∇_P ... of the outer loop, by AdamW: Equation 2, or for PPT the loss of one batch."""
    if args.method == "ppt":
        optimizer.param_groups[0]["lr"] = args.learning_rate * data.linear_schedule(step, args.max_steps)
        chosen = np.random.default_rng([args.seed, step]).choice(len(tasks[0]), args.batch_size, replace=False)
        loss = model.loss(prompt, model.encode([tasks[0][i] for i in chosen]))
        prompt.grad, = torch.autograd.grad(loss, prompt)
    else:
        supports, queries = draw_tasks(tasks, args.batch_size, args.seed, step)
        prompt.grad, loss = meta_gradient(
            model, prompt.detach(), [model.encode(s) for s in supports], [model.encode(q) for q in queries],
            args.alpha, first_order=args.method == "fomaml", tasks_per_pass=args.tasks_per_pass)
    optimizer.step()


def validate(model, prompt, held_out, args):
    """Accuracy and loss on held-out source data. Meta-learning: after adapting to each cluster (Equation 1), the mean
    over the clusters; PPT: as it is."""
    scores = []
    for support, batches in held_out:
        adapted = prompt if args.method == "ppt" else adapt(model, prompt, support, args.alpha).detach()
        scores.append(model.evaluate(adapted, batches))
    return {name: float(np.mean([score[name] for score in scores])) for name in ("accuracy", "loss", "in_words")}


def save_checkpoint(path, prompt, optimizer, step, best):
    """Everything that a continued run needs, in one safetensors file: numbers in its header, tensors after it."""
    tensors = {"prompt": prompt.detach(), "best": best["prompt"]}
    for name, value in optimizer.state_dict()["state"].get(0, {}).items():
        tensors[f"optimizer.{name}"] = value
    facts = {"step": step, "best": {name: value for name, value in best.items() if name != "prompt"}}
    write_beside(path, lambda beside: save_file(tensors, beside, {"facts": json.dumps(facts)}))


def load_checkpoint(path, prompt, optimizer):
    """Puts prompt and optimizer back as they were; returns the step and the best so far. Raises InputError."""
    try:
        with safe_open(path, "pt", device=str(prompt.device)) as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        prompt.data.copy_(tensors["prompt"])
        state = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
        if state:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
        return facts["step"], {"prompt": tensors["best"], **facts["best"]}
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: a broken checkpoint: {error}; --restart begins anew")


class Log:
    """log.jsonl, a line per evaluation; a continued run keeps the lines before its first step."""

    def __init__(self, path, start):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if start and path.exists() else []
        self.lines = [line for line in map(json.loads, lines) if line["step"] < start]

    def write(self, line):
        self.lines.append(line)
        data.write_examples(self.path, self.lines)


def main(argv=None):
    parser = data.Parser(__doc__)
    parser.add_config_flag()
    parser.add("--source", "source data with clusters, as cluster.py writes it", metavar="FILE")
    parser.add("--out", "the prompt's folder", metavar="FOLDER")
    parser.add("--method", "MetaPT, first-order MAML, or the PPT baseline", "maml", choices=list(SETTINGS))
    parser.add("--model", "a T5 by hub name or folder", data.MODEL)
    parser.add("--alpha", "the inner loop's learning rate", 0.08, type=float)
    parser.add_setting("--learning-rate", "AdamW's, the outer loop's β", SETTINGS, type=float)
    parser.add("--batch-size", "m, examples of a task to adapt on and another m to score (PPT: of a batch)", 4,
               type=int)
    parser.add_setting("--max-steps", "steps at most", SETTINGS, type=int)
    parser.add_setting("--eval-every", "steps between evaluations", SETTINGS, type=int)
    parser.add_setting("--patience", "evaluations without a better one until the run stops", SETTINGS, type=int)
    parser.add("--validation", "examples held out in all, evenly over the clusters", 640, type=int)
    parser.add("--init", "where the prompt starts: vocab, normal, or a prompt's folder", "vocab")
    parser.add("--tasks-per-pass", "meta-tasks in a forward pass (default: all on a GPU, 2 on a CPU)", type=int)
    parser.add("--seed", "of the random prompt, the split and every draw", 1, type=int)
    parser.add_model_flags()
    args = parser.parse(argv)
    if not args.source or not args.out:
        parser.error("--source FILE and --out FOLDER are needed")
    if args.tasks_per_pass is None and args.device == "cpu":
        args.tasks_per_pass = 2
    train(data.fill(args, SETTINGS[args.method]))


def main_demo():
    """MetaPT and PPT on the offline demo, as the files demo/maml.json and demo/ppt.json say."""
    folder = data.demo()
    for method in ("maml", "ppt"):
        print(f"$ python train_meta.py --config {folder / method}.json", flush=True)
        main(["--config", f"{folder / method}.json"])
    print("now: python finetune.py")


if __name__ == "__main__":
    data.run(main if len(sys.argv) > 1 else main_demo)
