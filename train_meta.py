"""
Learns a prompt from source data: meta-learned prompt tuning (Section 4.3, Appendix A.3), or the
baseline of pre-trained prompt tuning (Appendix A.2).

    python train_meta.py                                                        # the offline demo
    python train_meta.py --source source/kmeans10.jsonl --out prompts/metapt    # the paper's MetaPT
    python train_meta.py --source source/kmeans10.jsonl --out prompts/ppt --method ppt  # baseline
    torchrun --nproc_per_node 4 train_meta.py --source ... --out ...            # on four GPUs

The folder --out becomes a prompt in PEFT's layout, the best one by validation so far, with
log.jsonl and arguments.json beside it. Ctrl-C and SIGTERM finish the step and save; the same
command again continues.
"""

import script  # first: it sets how PyTorch takes its memory

import json
import math
import runpy
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

import data
from metapt import InputError, PromptedT5, Task, adapt, best_of, check_finite, digest
from metapt import input_errors, linear_schedule, load_prompt, load_t5, meta_gradient
from metapt import out_of_patience, read_json, save_prompt, write_atomically
from script import number, rank_and_world

# What Appendix A sets for each method; flags override it.
MAML = {"learning_rate": 0.025, "max_steps": 20_000, "eval_every": 500, "patience": 6}  # A.3
PPT = {"learning_rate": 0.003, "max_steps": 1_250_000, "eval_every": 20_000, "patience": 5}  # A.2
SETTINGS = {"maml": MAML, "fomaml": MAML, "ppt": PPT}
ALPHA = 0.08  # the inner loop's learning rate, A.3
M = 4  # its examples of a task, A.3
EPOCHS = 5  # of PPT at most, A.2


# -------------------------------- Section 4.3 and Appendix A, of tensors, lists and numbers alone


def split_clusters(examples, validation, m, seed):
    """The meta-tasks (A.3): [training examples of each cluster] and [held-out examples of each],
    about `validation` held out in all. Raises InputError where a cluster is too small to draw m
    support and m query examples from it, and to hold out more than m."""
    clusters = {}
    for example in examples:
        clusters.setdefault(example.get("cluster", 0), []).append(example)

    count = max(validation // len(clusters), m + 1)

    tasks, held_out = [], []
    for name in sorted(clusters):
        members = clusters[name]
        if len(members) < count + 2 * m:
            raise InputError(
                f"cluster {name} has {len(members)} examples; {2 * m} to train and {count} to "
                "validate are needed: lower --validation or --k of cluster.py, or give more data"
            )
        np.random.default_rng(seed).shuffle(members)
        tasks.append(members[count:])
        held_out.append(members[:count])

    return tasks, held_out


def draw(tasks, m, seed, step):
    """The examples of one meta-step (Section 4.3): for every meta-task m to support and another m
    to query. They depend on the seed and the step alone, so that a run can go on from any step."""
    rng = np.random.default_rng([seed, step])
    supports, queries = [], []
    for task in tasks:
        drawn = [task[i] for i in rng.choice(len(task), 2 * m, replace=False)]
        supports.append(drawn[:m])
        queries.append(drawn[m:])
    return supports, queries


def draw_batch(examples, size, seed, step):
    """PPT's batch of one step (A.2), drawn likewise."""
    rng = np.random.default_rng([seed, step])
    return [examples[i] for i in rng.choice(len(examples), size, replace=False)]


def ppt_gradient(model, prompt, batch):
    """The gradient that the PPT baseline descends (A.2), that of the batch's mean loss, and the
    loss."""
    P = prompt.detach().requires_grad_()
    loss = model.loss(P, batch)
    (gradient,) = torch.autograd.grad(loss, P)
    return gradient, loss.detach()


def validate(model, prompt, held_out, alpha):
    """Meta-validation (A.3): adapts to m held-out examples of every cluster (Equation 1), the same
    at every validation, and scores the rest; accuracy, loss and the share answered with a word of
    the task, each the mean over clusters. Raises Diverged.

    held_out: (support, batches to score) for each cluster. Without a support, as for PPT, the
    prompt is scored as it is.
    """
    names = ("accuracy", "loss", "in_words")
    scores = []
    for support, batches in held_out:
        adapted = prompt if support is None else adapt(model, prompt, support, alpha).detach()
        score = model.evaluate(adapted, batches)
        scores.append([score[name] for name in names])

    return dict(zip(names, np.mean(scores, axis=0).tolist()))


# ------------------------------------------- The run: files, continuing, processes, Ctrl-C, errors


@dataclass
class Progress:
    """How far a run has come: what its checkpoint holds, beside what the run is made of."""

    prompt: torch.nn.Parameter
    best: torch.Tensor
    optimizer: torch.optim.AdamW
    step: int
    log: list


def train(args):
    """One run from source data to the best prompt, in the folder args.out."""
    out = Path(args.out)
    is_first = rank_and_world()[0] == 0
    with script.only_writer(out) if is_first else nullcontext():
        checkpoint = {} if args.restart else read_checkpoint(out)
        # The digits depend on the number of threads: a run goes on with that of its beginning.
        args.threads = args.threads or checkpoint.get("threads") or torch.get_num_threads()
        torch.set_num_threads(args.threads)

        task = Task.load(Path(args.source).parent)
        tasks, held_out, facts = read_source(args, task)
        model = PromptedT5(*load_t5(args.model, args.device, args.dtype), task, args.max_length)
        facts |= identity(args, task)
        ppt = args.method == "ppt"
        m = M if ppt else args.batch_size  # examples of a cluster to adapt on, which PPT leaves out
        supports = [None if ppt else model.encode(examples[:m]) for examples in held_out]
        batches = [list(model.batches(examples[m:])) for examples in held_out]
        # PPT's schedule knows its end, so that more steps would be another run.
        longer = ["--patience"] if ppt else ["--patience", "--max-steps"]
        if checkpoint:
            script.check_same(out, checkpoint["made_of"], facts["made_of"], longer)

        progress = begin(args, model, checkpoint)
        all_reduce(progress.best)  # a barrier: by now every process has read the folder
        if is_first:
            if args.restart:
                checkpoint_in(out).unlink(missing_ok=True)
            script.save_arguments(out / "arguments.json", args)
        learn(args, model, tasks, list(zip(supports, batches)), facts, progress)

    best = progress.log[best_of(progress.log)]
    if is_first:
        print(
            f"wrote {out}: the prompt of step {best['step']:,} of {progress.step:,}, validation "
            f"accuracy {best['accuracy']:.1%} (at the start {progress.log[0]['accuracy']:.1%})"
            + ("; it is the start itself: no step was better" if best["step"] == 0 else "")
        )


def learn(args, model, tasks, held_out, facts, progress):
    """The outer loop of Section 4.3, from where `progress` stands. Under torchrun every process
    works on its share of a step's meta-tasks."""
    rank, world = rank_and_world()
    ppt = args.method == "ppt"
    epoch = math.ceil(len(tasks[0]) / args.batch_size)
    max_steps = min(args.max_steps, EPOCHS * epoch) if ppt else args.max_steps
    patience_from = math.ceil(epoch / args.eval_every) if ppt else 0  # the end of the first epoch
    prompt, log = progress.prompt, progress.log
    encode = lambda parts: [model.encode(examples) for examples in parts[rank::world]]
    settings = (args.alpha, args.method == "fomaml", args.tasks_per_pass)
    stopped = False
    bar = tqdm(desc=args.method, total=max_steps, initial=progress.step, disable=rank > 0 or None)
    with script.stop_signal() as stop, bar:
        while True:
            step = progress.step
            due = step % args.eval_every == 0 or step >= max_steps
            if due and not (log and log[-1]["step"] == step):  # a continued run may have it
                score = validate(model, prompt.detach(), held_out, args.alpha)
                record(args, model, {"step": step, **shared_mean(score, prompt)}, facts, progress)

            # An evaluation where a shorter run ended is none of a longer one's.
            regular = [line for line in log if line["step"] % args.eval_every == 0]
            tired = out_of_patience(regular, args.patience, patience_from)
            if stopped or step >= max_steps or tired:
                break

            if ppt:
                batch = model.encode(draw_batch(tasks[0], args.batch_size, args.seed, step))
                gradient, loss = ppt_gradient(model, prompt, batch)
                factor = linear_schedule(step, max_steps)  # A.2's; MetaPT's β is constant
                progress.optimizer.param_groups[0]["lr"] = args.learning_rate * factor
            else:
                supports, queries = map(encode, draw(tasks, args.batch_size, args.seed, step))
                gradient, loss = meta_gradient(model, prompt, supports, queries, *settings)

            gradient, loss = all_reduce(gradient), all_reduce(loss)
            check_finite(f"{args.out}: the loss or gradient of step {step:,}", gradient, loss)
            prompt.grad = gradient
            progress.optimizer.step()  # P <- P - β ∇_P ..., by AdamW
            progress.step += 1
            bar.update()
            stopped = all_reduce(torch.tensor(float(bool(stop)), device=prompt.device)) > 0

        save_run(args, model.t5, facts, progress)  # the last step may be no validation's
        if stopped:
            message = f"stopped at step {progress.step:,} and saved"
            raise KeyboardInterrupt(f"{message}; {script.CONTINUES}")


def record(args, model, score, facts, progress):
    """Adds a validation's score to the log; keeps the prompt if it is the best; saves."""
    progress.log.append(score)
    if best_of(progress.log) == len(progress.log) - 1:
        progress.best.copy_(progress.prompt.detach())
    save_run(args, model.t5, facts, progress)
    if rank_and_world()[0] == 0:
        tqdm.write(f"{args.out}: step {score['step']:,}, accuracy {score['accuracy']:.1%}")


def all_reduce(tensor):
    """The sum of a tensor over the processes that torchrun started."""
    if rank_and_world()[1] == 1:
        return tensor
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if tensor.is_cuda else "gloo")
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def shared_mean(score, prompt):
    """The mean of a score over the processes: each has validated, which costs little beside the
    steps, and where their digits differ all must still decide the same."""
    values = torch.tensor(list(score.values()), dtype=torch.float64, device=prompt.device)
    return dict(zip(score, (all_reduce(values) / rank_and_world()[1]).tolist()))


def read_source(args, task):
    """The meta-tasks: [training examples of each], [held-out examples of each], and the facts about
    them that go with the prompt. PPT mixes all source data into one task. Raises InputError."""
    source = Path(args.source)
    ppt = args.method == "ppt"
    examples = list(data.read_examples(source, task))
    if args.source_size and args.source_size < len(examples):  # Figure 3a
        order = np.random.default_rng(args.seed).permutation(len(examples))
        examples = [examples[i] for i in order[: args.source_size]]

    clustered = all("cluster" in example for example in examples)
    if not examples or not ppt and not clustered:
        hint = f"make them with cluster.py --source {source}"
        raise InputError(f"{source}: no clusters, or not for every line; {hint}")

    # PPT, whatever its batch, is scored on what MetaPT is.
    with input_errors(source, ""):
        tasks, held_out = split_clusters(
            examples, args.validation, M if ppt else args.batch_size, args.seed
        )
    size = sum(map(len, tasks))
    if args.batch_size > size:
        raise InputError(f"{source}: {size} examples to train on; lower --batch-size")

    facts = {
        "clustering": clustering_of(source),
        "clusters": len(tasks),
        "source_size": len(examples),
        "source_task": task.name,
    }
    if rank_and_world()[0] == 0:
        print(
            f"{args.out}: {args.method} on {size:,} examples in {len(tasks)} clusters; "
            f"{sum(map(len, held_out)):,} others are held out",
            flush=True,
        )
    return [sum(tasks, [])] if ppt else tasks, held_out, facts


def clustering_of(source):
    """How cluster.py made the clusters of a file; None where it made others, or none."""
    stem = source.name.split(".jsonl")[0]
    notes = source.with_name(f"{stem}.json")
    notes = read_json(notes) if notes.exists() else {}
    return notes.get("method") if notes.get("clusters") == digest(source) else None


# Flags that move no digit of the prompt, or by rounding alone.
FREE = ("out", "config", "restart", "device", "threads", "tasks_per_pass")


def identity(args, task):
    """What the prompt is made of, by flag: the values of flags, and of files what they hold. All of
    it but the seed is the recipe, which several trainings of one prompt share."""
    made_of = {}
    for name, value in vars(args).items():
        if name not in FREE:
            made_of[f"--{name.replace('_', '-')}"] = value

    made_of["--source"] = digest(Path(args.source))
    made_of["task.json"] = digest([task.template, task.words])
    made_of["--model"] = script.contents(args.model)
    if args.init:
        made_of["--init"] = load_prompt(args.init)[1]["weights"]

    recipe = digest({name: value for name, value in made_of.items() if name != "--seed"})
    return {"made_of": made_of, "recipe": recipe, "prompt_seed": args.seed}


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the checkpoint

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by PyTorch's names


def checkpoint_in(out):
    return Path(out) / "checkpoint.safetensors"


def save_run(args, t5, facts, progress):
    """Writes, from the first process, what a continued run needs, in one safetensors file: the
    prompt, the best, AdamW's two moments; in the header its step, the log and what it is made of.
    Then the best prompt so far, with its facts."""
    if rank_and_world()[0] > 0:
        return

    out = Path(args.out)
    log = progress.log
    adamw = progress.optimizer.state[progress.prompt]
    tensors = {"prompt": progress.prompt, "best": progress.best}
    tensors |= {name: adamw[name] for name in MOMENTS}
    tensors = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
    header = {"made_of": facts["made_of"], "threads": args.threads, "step": progress.step}
    content = save(tensors, {"run": json.dumps({**header, "log": log})})
    write_atomically(checkpoint_in(out), lambda file: file.write(content))
    data.write_lines(out / "log.jsonl", log)

    best = log[best_of(log)]
    method = "no inner step" if args.method == "maml" and args.alpha == 0 else args.method
    facts = {"method": method, "is_start": best["step"] == 0, **facts, **best}
    facts |= {"start_accuracy": log[0]["accuracy"], "arguments": vars(args)}
    save_prompt(out, progress.best, t5, **facts, **script.provenance(args.device))


def read_checkpoint(out):
    """What a checkpoint in `out` holds, {} where there is none. Raises InputError."""
    if not checkpoint_in(out).exists():
        return {}
    with input_errors(checkpoint_in(out), "--restart begins anew"):
        with safe_open(checkpoint_in(out), "pt") as file:
            header = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in ("prompt", "best", *MOMENTS)}
        return {**header, "tensors": tensors}


def begin(args, model, checkpoint):
    """Where a run begins: at its checkpoint, or else at a random prompt or the one in --init."""
    start = model.init_prompt(args.prompt_length, args.seed)
    if args.init:
        start = load_prompt(args.init, model.t5.config.d_model)[0]

    tensors = {"prompt": start, "best": start, **dict.fromkeys(MOMENTS, torch.zeros_like(start))}
    tensors = checkpoint.get("tensors", tensors)
    tensors = {name: values.to(model.device, copy=True) for name, values in tensors.items()}
    prompt = torch.nn.Parameter(tensors["prompt"])
    optimizer = torch.optim.AdamW([prompt], lr=args.learning_rate, weight_decay=0.0)
    step = checkpoint.get("step", 0)
    moments = {name: tensors[name] for name in MOMENTS}
    optimizer.state[prompt] = {"step": torch.tensor(float(step)), **moments}
    if checkpoint and rank_and_world()[0] == 0:
        print(f"{args.out} stands at step {step:,}", flush=True)
    return Progress(prompt, tensors["best"], optimizer, step, checkpoint.get("log", []))


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the flags


def make_parser():
    """The flags of this script."""
    parser = script.Parser(__doc__)
    parser.add_config()
    default = lambda name: f"(default: {MAML[name]:,}, ppt {PPT[name]:,})"

    add = parser.add_argument_group("where").add_argument
    add("--source", required=True, metavar="FILE", help="clustered examples, as cluster.py writes")
    add("--out", required=True, type=script.path, metavar="FOLDER", help="the prompt's folder")
    add("--restart", action="store_true", help="begins anew where a run could be continued")
    add("--model", default=script.MODEL, help="a T5 by hub name or folder")

    add = parser.add_argument_group("the paper's").add_argument
    methods = "MetaPT; MetaPT without its second order; the baseline PPT"
    add("--method", default="maml", choices=list(SETTINGS), help=methods)
    rate = "the inner loop's learning rate α; 0: no inner step"
    add("--alpha", type=number(0.0), default=ALPHA, help=rate)
    add("--learning-rate", type=number(1e-12), help=f"AdamW's, β {default('learning_rate')}")
    m = "m, the support examples of a task and as many queries; for ppt a step's examples"
    add("--batch-size", type=number(1), default=M, help=m)
    add("--prompt-length", type=number(1), default=100, help="vectors of a random prompt")
    add("--init", metavar="FOLDER", help="a prompt to start at (default: a random one)")
    add("--source-size", type=number(1), help="source examples, drawn at random (default: all)")
    add("--validation", type=number(1), default=640, help="examples held out over all clusters")
    add("--max-length", type=number(1), default=script.MAX_LENGTH, help="tokens of a text at most")
    add("--seed", type=number(0), default=1, help="of the random prompt, the split and every draw")

    add = parser.add_argument_group("how long").add_argument
    add("--max-steps", type=number(0), help=f"steps at most {default('max_steps')}")
    add("--eval-every", type=number(1), help=f"steps to a validation {default('eval_every')}")
    patience = f"validations without a better one, then it ends {default('patience')}"
    add("--patience", type=number(1), help=patience)

    machine = parser.add_machine()
    script.add_precision(machine)
    at_once = "meta-tasks that are worked on at once, as memory allows"
    machine.add_argument("--tasks-per-pass", type=number(1), default=4, help=at_once)
    return parser


def main(argv=None):
    """Reads the flags and learns a prompt."""
    args = make_parser().parse(argv)
    for name, value in SETTINGS[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    script.set_machine(args)
    if args.method == "ppt" and rank_and_world()[1] > 1:
        raise InputError("--method ppt works in one process: start it without torchrun")
    train(args)


def main_demo():
    """MetaPT and PPT at once on the offline demo, as demo/maml.json and demo/ppt.json say."""
    offline = runpy.run_path(str(Path(__file__).with_name("offline") / "demo.py"))
    folder = offline["demo"]()
    configs = (folder / "maml.json", folder / "ppt.json")
    offline["at_once"](*(["train_meta.py", "--config", config] for config in configs))
    print("now: python finetune.py")


if __name__ == "__main__":
    script.run(main if len(sys.argv) > 1 else main_demo)
