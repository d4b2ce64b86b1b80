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

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    HELP = not {"-h", "--help"}.isdisjoint(sys.argv)

import argparse
import itertools
import json
import math
import runpy
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data

if not data.HELP:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from metapt import Diverged, InputError, PromptedT5, Task, adapt, best_of, blame
    from metapt import linear_schedule, load_prompt, load_t5, meta_gradient, out_of_patience
    from metapt import parse_json, read_json, save_prompt, write_beside

# What Appendix A sets for each method; flags override it.
MAML = {"learning_rate": 0.025, "max_steps": 20_000, "eval_every": 500, "patience": 6}  # A.3
PPT = {"learning_rate": 0.003, "max_steps": 1_250_000, "eval_every": 20_000, "patience": 5}  # A.2
SETTINGS = {"maml": MAML, "fomaml": MAML, "ppt": PPT}
ALPHA = 0.08  # the inner loop's learning rate, A.3
M = 4  # its examples of a task, A.3
ALPHAS = [0.8, 0.3, 0.08, 0.03, 0.008]  # A.3's search
BETAS = [0.3, 0.08, 0.03, 0.025, 0.008]
EPOCHS = 5  # of PPT at most, A.2
STARTS = ("vocab", "uniform")  # random prompts


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
    the task, each the mean over clusters.

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


def train(args):
    """One run from source data to the best prompt, in the folder args.out; returns its score."""
    out, ppt = Path(args.out), args.method == "ppt"
    checkpoint = out / "checkpoint.safetensors"
    begun = {} if args.restart or not checkpoint.exists() else read_checkpoint(checkpoint)
    # A prompt's digits depend on the number of threads: a run goes on with that of its beginning.
    args.threads = args.threads or begun.get("run", {}).get("--threads") or torch.get_num_threads()
    torch.set_num_threads(args.threads)

    m = M if ppt else args.batch_size  # PPT, whatever its batch, is scored on what MetaPT is
    task = Task.load(Path(args.source).parent)
    tasks, held_out, facts = read_source(args, task, m)
    model = PromptedT5(*load_t5(args.model, args.device, args.dtype), task, args.max_length)
    facts["fingerprint"] = data.fingerprint(model.t5)
    run = {**deciding(args), **facts["digests"], args.model: facts["fingerprint"]}
    # PPT's schedule knows its end, so that more steps would be another run.
    longer = ["--patience"] if ppt else ["--patience", "--max-steps"]
    if begun:
        data.check_same(out, begun["run"], run, longer)

    held_out = [encode_held_out(model, examples, m, ppt) for examples in held_out]
    step, log = learn(args, model, tasks, held_out, facts, run, begun)

    best = log[best_of(log)]
    if data.rank_and_world()[0] == 0:
        print(
            f"wrote {out}: the prompt of step {best['step']:,} of {step:,}, validation accuracy "
            f"{best['accuracy']:.1%} (at the start {log[0]['accuracy']:.1%})"
            + ("; no step of this run was better than its start" if best is log[0] else "")
        )

    return best


def learn(args, model, tasks, held_out, facts, run, begun):
    """The outer loop of Section 4.3, from where the checkpoint stands; returns the last step and
    the log. Under torchrun every process works on its share of a step's meta-tasks.

    facts: what is written beside the prompt. run: what decides about its digits, by which a run is
    known when it is continued. begun: what the checkpoint holds, {} where there is none.
    """
    out, rank = Path(args.out), data.rank_and_world()[0]
    max_steps, patience_from = limits(args, tasks)
    prompt = torch.nn.Parameter(start_prompt(model, args))
    optimizer = torch.optim.AdamW([prompt], lr=args.learning_rate, weight_decay=0.0)
    best = prompt.detach().clone()
    step, log = load_state(out, begun, prompt, best, optimizer)
    claim(args, prompt.device)
    save = partial(save_run, out, run, facts, model.t5, prompt, best, optimizer)
    stopped = False
    bar = tqdm(None, args.method, max_steps, initial=step, disable=rank > 0 or None)
    with data.stop_signal() as stop, bar:
        while True:
            due = step % args.eval_every == 0 or step >= max_steps
            if due and not (log and log[-1]["step"] == step):  # which may be where it continues
                log.append(scored(args, model, prompt, held_out, step))
                if best_of(log) == len(log) - 1:
                    best.copy_(prompt.detach())
                save(step, log)
                if rank == 0:
                    bar.write(f"{out}: step {step:,}, accuracy {log[-1]['accuracy']:.1%}")

            if stopped or step >= max_steps or out_of_patience(log, args.patience, patience_from):
                break

            if args.method == "ppt":  # A.2's schedule; MetaPT's β is constant
                factor = linear_schedule(step, max_steps)
                optimizer.param_groups[0]["lr"] = args.learning_rate * factor

            drawn = draw_encoded(args, model, tasks, step)
            gradient, loss = gradient_of(args, model, prompt, drawn)
            gradient, loss, stopped = all_reduce(gradient, loss, torch.tensor(float(bool(stop))))
            check_finite(out, step, gradient, loss)
            prompt.grad = gradient
            optimizer.step()  # P <- P - β ∇_P ..., by AdamW
            step += 1
            bar.update()

        save(step, log)  # where it was stopped, and what an earlier end may not have written
        if stopped:
            raise KeyboardInterrupt(f"stopped at step {step:,} and saved; {data.CONTINUES}")

    return step, log


def claim(args, device):
    """Makes the folder args.out this run's, from the first process, once all have read what an
    earlier run left there."""
    all_reduce(torch.zeros(1, device=device))
    if data.rank_and_world()[0] > 0:
        return
    if args.restart:
        Path(args.out, "checkpoint.safetensors").unlink(missing_ok=True)
    data.save_arguments(Path(args.out, "arguments.json"), args)


def scored(args, model, prompt, held_out, step):
    """A line of the log: the meta-validation of a step. Raises Diverged where its loss is not
    finite."""
    score = shared_mean(validate(model, prompt.detach(), held_out, args.alpha), prompt)
    check_finite(Path(args.out), step, torch.tensor(score["loss"]))
    return {"step": step, **score}


def limits(args, tasks):
    """How many steps a run has at most, and the evaluation from which its patience counts: for PPT
    five epochs, and the end of the first (A.2)."""
    if args.method != "ppt":
        return args.max_steps, 0
    epoch = math.ceil(len(tasks[0]) / args.batch_size)
    return min(args.max_steps, EPOCHS * epoch), math.ceil(epoch / args.eval_every)


def draw_encoded(args, model, tasks, step):
    """What this process works on in a step, encoded: the supports and the queries of its share of
    the meta-tasks, or PPT's batch."""
    if args.method == "ppt":
        return [model.encode(draw_batch(tasks[0], args.batch_size, args.seed, step))]

    rank, world = data.rank_and_world()
    drawn = draw(tasks, args.batch_size, args.seed, step)
    return [[model.encode(examples) for examples in side[rank::world]] for side in drawn]


def gradient_of(args, model, prompt, drawn):
    """What the outer loop descends, by the method of the run, and the loss."""
    if args.method == "ppt":
        return ppt_gradient(model, prompt, *drawn)
    how = {"first_order": args.method == "fomaml", "tasks_per_pass": args.tasks_per_pass}
    return meta_gradient(model, prompt, *drawn, args.alpha, **how)


def all_reduce(*tensors):
    """The sums of tensors over the processes that torchrun started, in one exchange. The first
    says on which device."""
    if data.rank_and_world()[1] == 1:
        return tensors
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if tensors[0].is_cuda else "gloo")
    packed = torch.cat([tensor.detach().to(tensors[0]).flatten() for tensor in tensors])
    torch.distributed.all_reduce(packed)
    sums = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(sums, tensors)]


def shared_mean(score, prompt):
    """The mean of a score over the processes: each has validated, which costs little beside the
    steps, and where their digits differ all must still decide the same."""
    world = data.rank_and_world()[1]
    if world == 1:
        return score
    values = torch.tensor(list(score.values()), dtype=torch.float64, device=prompt.device)
    return dict(zip(score, (all_reduce(values)[0] / world).tolist()))


def check_finite(out, step, *tensors):
    """Raises Diverged where the loss or the gradient of a step is not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise Diverged(
            f"step {step:,}: a loss or a gradient is not finite; {out} keeps the best prompt so "
            "far; lower --alpha or --learning-rate, or give another model, and --restart"
        )


def read_source(args, task, m):
    """The meta-tasks: [training examples of each], [held-out examples of each], and the facts that
    go with the prompt. PPT mixes all source data into one task. Raises InputError."""
    examples = list(data.read_examples(args.source, task))
    if args.source_size and args.source_size < len(examples):  # Figure 3a
        order = np.random.default_rng(args.seed).permutation(len(examples))
        examples = [examples[i] for i in order[: args.source_size]]

    clustered = all("cluster" in example for example in examples)
    if not examples or args.method != "ppt" and not clustered:
        mend = f"make them with cluster.py --source {args.source}"
        raise InputError(f"{args.source}: no clusters, or not for every line; {mend}")

    try:
        tasks, held_out = split_clusters(examples, args.validation, m, args.seed)
    except InputError as error:
        raise InputError(f"{args.source}: {error}")

    size = sum(map(len, tasks))
    if args.batch_size > size:
        raise InputError(f"{args.source}: {size} examples to train on; lower --batch-size")

    made = Path(args.source).with_name(data.unpacked_name(args.source))
    made = made.with_suffix(".json")  # cluster.py's arguments
    clustering = read_json(made, "make the clusters again").get("method") if made.exists() else None
    facts = {
        "method": "no inner step" if args.method == "maml" and args.alpha == 0 else args.method,
        "clustering": clustering,
        "clusters": len(tasks),
        "source_size": len(examples),
        "source_task": task.name,
        "arguments": vars(args),
        **data.provenance(args.device, args.source, Path(args.source).with_name("task.json")),
    }
    # What trainings of one prompt share, so that a report can tell them from other prompts.
    shared = deciding(args)
    del shared["--seed"], shared["--threads"]
    facts["recipe"] = data.digest(json.dumps([shared, facts["digests"]]))
    if data.rank_and_world()[0] == 0:
        print(
            f"{args.method} on {size:,} examples in {len(tasks)} clusters; "
            f"{sum(map(len, held_out)):,} others are held out",
            flush=True,
        )

    return [sum(tasks, [])] if args.method == "ppt" else tasks, held_out, facts


def encode_held_out(model, examples, m, ppt):
    """A cluster's held-out examples, encoded: m of them to adapt on (none for PPT, which leaves the
    same out), and batches of the rest to score."""
    return None if ppt else model.encode(examples[:m]), list(model.batches(examples[m:]))


def start_prompt(model, args):
    """A random prompt, or the one in the folder --init."""
    if args.init in STARTS:
        return model.init_prompt(args.prompt_length, args.seed, args.init, args.init_scale)
    return load_prompt(args.init, model.t5.config.d_model)[0].to(model.device)


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the checkpoint

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by PyTorch's names


def save_run(out, run, facts, t5, prompt, best, optimizer, step, log):
    """Writes, from the first process, the best prompt so far and what a continued run needs, in one
    safetensors file: the prompt, the best, AdamW's two moments and its step; in the header the log
    and what decides about the run."""
    if data.rank_and_world()[0] > 0:
        return

    out.mkdir(parents=True, exist_ok=True)
    adamw = optimizer.state[prompt] or {name: torch.zeros_like(prompt) for name in MOMENTS}
    tensors = {"prompt": prompt.detach(), "best": best, **{name: adamw[name] for name in MOMENTS}}
    tensors = {name: values.cpu().contiguous() for name, values in tensors.items()}
    header = {"facts": json.dumps({"run": run, "step": step, "log": log})}
    path = out / "checkpoint.safetensors"
    write_beside(path, lambda beside: save_file(tensors, beside, header))
    data.write_lines(out / "log.jsonl", log)
    score = {name: log[best_of(log)][name] for name in ("step", "accuracy", "loss")}
    save_prompt(out, best, t5, **facts, **score, start_accuracy=log[0]["accuracy"])


def read_checkpoint(path):
    """The facts and the tensors of a checkpoint. Raises InputError."""
    with blame(path, data.BEGIN_ANEW, TypeError, RuntimeError, AttributeError):
        with safe_open(path, "pt") as file:
            facts = parse_json(file.metadata()["facts"])
            facts["tensors"] = {name: file.get_tensor(name) for name in file.keys()}

        counts = facts["step"], facts["run"]["--threads"]
        if any(type(count) is not int for count in counts) or not facts["log"]:
            raise ValueError("it holds no evaluation, or does not say of which run it is")
        for line in facts["log"]:
            if line["step"] > facts["step"] or not 0 <= line["accuracy"] <= 1:
                raise ValueError("its log does not fit its step")

    return facts


def load_state(out, begun, prompt, best, optimizer):
    """Puts the prompts and AdamW back as a checkpoint has them, in place; returns the step and the
    log, or a run's beginning where there is no checkpoint. Raises InputError."""
    if not begun:
        return 0, []

    tensors, step = begun["tensors"], begun["step"]
    with blame(out / "checkpoint.safetensors", data.BEGIN_ANEW):
        if any(tensors[name].shape != prompt.shape for name in ("prompt", "best", *MOMENTS)):
            raise ValueError("it holds tensors of another shape")

    with torch.no_grad():
        prompt.copy_(tensors["prompt"])
        best.copy_(tensors["best"])

    moments = {name: tensors[name].to(prompt.device) for name in MOMENTS}
    state = {0: {"step": torch.tensor(float(step)), **moments}} if step else {}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if data.rank_and_world()[0] == 0:
        print(f"{out} stands at step {step:,}", flush=True)
    return step, begun["log"]


def search(args):
    """Appendix A.3's search: a run for every α and β of the paper (PPT has no α, and A.2's own rate
    beside every β), each in a folder of its own in args.out; the prompt with the best validation
    becomes the one of args.out."""
    folders, scores = [], []
    alphas, betas = ALPHAS, BETAS
    if args.method == "ppt":
        alphas, betas = [args.alpha], [PPT["learning_rate"], *BETAS]
    for alpha, beta in itertools.product(alphas, betas):
        folder = Path(args.out) / f"alpha{alpha}-beta{beta}"
        run = {"alpha": alpha, "learning_rate": beta, "out": str(folder), "search": False}
        try:
            scores.append(train(argparse.Namespace(**{**vars(args), **run})))
            folders.append(folder)
        except Diverged as error:  # a pair at which it diverges is no choice
            if data.rank_and_world()[0] == 0:
                print(f"{folder}: {error}", flush=True)

    if not scores:
        mend = "give another --model or --source"
        raise Diverged(f"{args.out}: it diverges with every pair of rates; {mend}")

    best = best_of(scores)
    if data.rank_and_world()[0] == 0:
        for name in ("adapter_model.safetensors", "adapter_config.json", "metapt.json"):
            copy = lambda beside: shutil.copy(folders[best] / name, beside)
            write_beside(Path(args.out) / name, copy)
        print(
            f"wrote {args.out}: the prompt of {folders[best]}, the best of {len(folders)} by its "
            f"validation accuracy of {scores[best]['accuracy']:.1%}"
        )


# - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - the flags

FREE = ("out", "config", "restart", "search", "device", "tasks_per_pass")  # may differ later


def deciding(args):
    """{flag: its value} of those that decide about the prompt."""
    kept = {name: value for name, value in vars(args).items() if name not in FREE}
    return {f"--{name.replace('_', '-')}": value for name, value in kept.items()}


def make_parser():
    """The flags of this script."""
    parser, number = data.Parser(__doc__), data.number
    file, start = data.existing("file"), data.existing("folder", *STARTS)
    each = lambda name: f"(default: {MAML[name]:,}, ppt {PPT[name]:,})"
    parser.add_config()

    add = parser.add_argument_group("where").add_argument
    add("--source", required=True, type=file, metavar="FILE", help="what cluster.py wrote")
    add("--out", required=True, metavar="FOLDER", help="the prompt's folder")
    add("--restart", action="store_true", help="begins anew where a run could be continued")
    add("--model", default=data.MODEL, help="a T5 by hub name or folder")

    paper = parser.add_argument_group("the paper's")
    add, methods = paper.add_argument, "MetaPT; without its second order; the baseline PPT"
    add("--method", default="maml", choices=list(SETTINGS), help=methods)
    add(
        "--alpha", type=number(0.0), default=ALPHA, help="the inner loop's rate α; 0: no inner step"
    )
    add("--learning-rate", type=number(1e-12), help=f"AdamW's, β {each('learning_rate')}")
    add("--batch-size", type=number(1), default=M, help="m, of support and of query; PPT's batch")
    add("--init", type=start, default="vocab", help=f"{', '.join(STARTS)}, or a prompt's folder")
    data.add_start(paper)
    add("--source-size", type=number(1), help="source examples to draw (default: all)")
    add("--validation", type=number(1), default=640, help="examples held out, over all clusters")
    add("--max-length", type=number(1), default=data.MAX_LENGTH, help="tokens of a text at most")
    add("--search", action="store_true", help="tries A.3's learning rates, keeps the best")
    add("--seed", type=number(0), default=1, help="of the random prompt, the split, every draw")

    add = parser.add_argument_group("how long").add_argument
    add("--max-steps", type=number(0), help=f"steps at most {each('max_steps')}")
    add("--eval-every", type=number(1), help=f"steps {each('eval_every')}")
    add("--patience", type=number(1), help=f"evaluations without a better {each('patience')}")

    machine = parser.add_machine()
    data.add_precision(machine)
    machine.add_argument("--tasks-per-pass", type=number(1), default=4, help="meta-tasks at once")
    return parser


def main(argv=None):
    """Reads the flags and learns a prompt, or with --search one for every pair of rates."""
    args = make_parser().parse(argv)
    args = data.fill(args, SETTINGS[args.method])
    data.set_machine(args)
    if args.method == "ppt" and data.rank_and_world()[1] > 1:
        raise InputError("--method ppt works in one process: start it without torchrun")
    search(args) if args.search else train(args)


def main_demo():
    """MetaPT and PPT at once on the offline demo, as demo/maml.json and demo/ppt.json say."""
    offline = runpy.run_path(str(Path(__file__).with_name("offline") / "demo.py"))
    folder, methods = offline["demo"](), ("maml", "ppt")
    offline["at_once"](*(["train_meta.py", "--config", folder / f"{m}.json"] for m in methods))
    print("now: python finetune.py")


if __name__ == "__main__":
    data.run(main if len(sys.argv) > 1 else main_demo)
