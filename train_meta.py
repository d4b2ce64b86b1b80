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

if __name__ == "__main__":  # Ctrl-C during the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import itertools
import math
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data

if not data.HELP:
    import torch

    from metapt import Diverged, InputError, PromptedT5, Task, adapt, adapt_all, best_of
    from metapt import linear_schedule, load_prompt, load_t5, meta_gradient, out_of_patience
    from metapt import read_json, save_prompt, write_beside

# What Appendix A sets for each method; flags override it.
MAML = {"learning_rate": 0.025, "max_steps": 20_000, "eval_every": 500, "patience": 6}  # A.3
PPT = {"learning_rate": 0.003, "max_steps": 1_250_000, "eval_every": 20_000, "patience": 5}  # A.2
SETTINGS = {"maml": MAML, "fomaml": MAML, "reptile": MAML, "ppt": PPT}
ALPHA = 0.08  # the inner loop's learning rate, A.3
M = 4  # its examples, Section 4.3
ALPHAS = [0.8, 0.3, 0.08, 0.03, 0.008]  # A.3's search
BETAS = [0.3, 0.08, 0.03, 0.025, 0.008]
EPOCHS = 5  # of PPT at most, A.2


# ------------------------------------------------------- Section 4.3 and Appendix A, to be copied


def split_clusters(examples, validation, m, seed):
    """The meta-tasks: [training examples of each cluster] and [held-out examples of each], about
    `validation` held out in all. Raises InputError where a cluster is too small to draw m support
    and m query examples from it, and to hold out more than m."""
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
    """The examples of one meta-step: for every meta-task m to support and another m to query.
    They depend on the seed and the step alone, so that a run can go on from any step."""
    rng = np.random.default_rng([seed, step])
    supports, queries = [], []
    for task in tasks:
        drawn = [task[i] for i in rng.choice(len(task), 2 * m, replace=False)]
        supports.append(drawn[:m])
        queries.append(drawn[m:])
    return supports, queries


def draw_batch(examples, size, seed, step):
    """PPT's batch of one step, drawn likewise."""
    rng = np.random.default_rng([seed, step])
    return [examples[i] for i in rng.choice(len(examples), size, replace=False)]


def ppt_gradient(model, prompt, batch, size):
    """The gradient that the PPT baseline descends (A.2), and the loss: of the mean over `size`
    examples, of which `batch` (or None) holds a share."""
    if batch is None:
        return torch.zeros_like(prompt), torch.zeros((), device=prompt.device)
    P = prompt.detach().requires_grad_()
    loss = model.loss(P, batch, reduction="sum") / size
    (gradient,) = torch.autograd.grad(loss, P)
    return gradient, loss.detach()


def reptile_gradient(model, prompt, supports, queries, alpha):
    """Reptile (Nichol et al., 2018): the way that two steps of Equation 1 go, the support's and
    then the query's, summed over the tasks and divided by alpha."""
    if not supports:
        return torch.zeros_like(prompt)
    P = prompt.detach().repeat(len(supports), 1, 1)
    for batches in (supports, queries):
        P = adapt_all(model, P, batches, alpha).detach()
    return (prompt.detach() - P).sum(0) / alpha


def validate(model, prompt, held_out, alpha):
    """Meta-validation: adapts to m examples of every cluster (Equation 1) and scores the rest of
    it; accuracy, loss and the share answered with a word of the task, each the mean over clusters.

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
    m = M if ppt else args.batch_size  # PPT, whatever its batch, is scored on what MetaPT is
    # PPT's schedule knows its end, so that more steps would be another run.
    more = ["patience"] if ppt else ["patience", "max_steps"]
    data.check_arguments(out / "arguments.json", args, more)
    task = Task.load(Path(args.source).parent)
    tasks, held_out, facts = read_source(args, task, m)
    model = PromptedT5(*load_t5(args.model, args.device, args.dtype), task, args.max_length)
    facts["digests"][args.model] = facts["fingerprint"] = data.fingerprint(model.t5)
    held_out = [encode_held_out(model, examples, m, ppt) for examples in held_out]
    data.try_place(out / "checkpoint.safetensors")
    step, log = learn(args, model, tasks, held_out, facts)

    best = log[best_of(log)]
    if data.rank_and_world()[0] == 0:
        print(
            f"wrote {out}: the prompt of step {best['step']:,} of {step:,}, validation accuracy "
            f"{best['accuracy']:.1%} (at the start {log[0]['accuracy']:.1%})"
            + ("; no step of this run was better than its start" if best is log[0] else "")
        )

    return best


def learn(args, model, tasks, held_out, facts):
    """The outer loop, from where the checkpoint stands; returns the last step and the log. Under
    torchrun every process works on its share of a step's meta-tasks, or of PPT's batch."""
    out, rank = Path(args.out), data.rank_and_world()[0]
    max_steps, first = limits(args, tasks)
    prompt = torch.nn.Parameter(start_prompt(model, args))
    optimizer = torch.optim.AdamW([prompt], lr=args.learning_rate, weight_decay=args.weight_decay)
    best = prompt.detach().clone()
    tensors, digests = {"prompt": prompt, "best": best}, facts["digests"]
    step, log = data.load_state(out, tensors, optimizer, digests, args.restart)
    all_reduce(torch.zeros(1, device=prompt.device))  # no process writes before all have read
    if rank == 0:
        if args.restart:
            (out / "checkpoint.safetensors").unlink(missing_ok=True)
        data.save_arguments(out / "arguments.json", args)

    stopped = False
    bar = tqdm(None, args.method, max_steps, initial=step, disable=rank > 0 or None)
    with data.stop_signal() as stop, bar:
        while True:
            ended = step >= max_steps
            evaluated = bool(log) and log[-1]["step"] == step  # a run may continue from one
            due = not evaluated and (ended or step % args.eval_every == 0)
            if due:
                score = validate(model, prompt.detach(), held_out, args.alpha)
                log.append({"step": step, **shared_mean(score, prompt)})
                if best_of(log) == len(log) - 1:
                    best.copy_(prompt.detach())
                show(bar, **log[-1])

            over = ended or out_of_patience(log, args.patience, first)
            if due or stopped or over:  # over: what an earlier end did not write is mended
                save(out, tensors, optimizer, step, log, model.t5, facts)
            if stopped:
                raise KeyboardInterrupt(f"stopped at step {step:,} and saved; {data.CONTINUES}")
            if over:
                return step, log

            if args.method == "ppt":
                factor = linear_schedule(step, max_steps)
                optimizer.param_groups[0]["lr"] = args.learning_rate * factor

            drawn = draw_encoded(args, model, tasks, step)
            gradient, loss = gradient_of(args, model, prompt, drawn)
            gradient, loss, stopped = all_reduce(gradient, loss, torch.tensor(float(bool(stop))))
            check_finite(args, model, prompt, drawn, step, gradient, loss)
            prompt.grad = gradient
            optimizer.step()  # P <- P - β ∇_P ..., by AdamW
            step += 1
            bar.update()


def limits(args, tasks):
    """How many steps a run has at most, and the evaluation from which its patience counts: for PPT
    five epochs, and the end of the first (A.2)."""
    if args.method != "ppt":
        return args.max_steps, 0
    epoch = math.ceil(len(tasks[0]) / args.batch_size)
    return min(args.max_steps, EPOCHS * epoch), math.ceil(epoch / args.eval_every)


def show(bar, step, accuracy, loss, **others):
    """Shows an evaluation beside the bar; where there is none, as in a file, the first process
    prints a line."""
    bar.set_postfix(accuracy=f"{accuracy:.3f}")
    if bar.disable and data.rank_and_world()[0] == 0:
        print(f"step {step:,}: accuracy {accuracy:.1%}, loss {loss:.3f}", flush=True)


def draw_encoded(args, model, tasks, step):
    """What this process works on in a step, encoded: the supports and the queries of its share of
    the meta-tasks, or its share of PPT's batch."""
    rank, world = data.rank_and_world()
    if args.method == "ppt":
        batch = draw_batch(tasks[0], args.batch_size, args.seed, step)[rank::world]
        return [model.encode(batch) if batch else None]

    drawn = draw(tasks, args.batch_size, args.seed, step)
    return [[model.encode(examples) for examples in side[rank::world]] for side in drawn]


def gradient_of(args, model, prompt, drawn):
    """What the outer loop descends, by the method of the run, and the loss."""
    if args.method == "ppt":
        return ppt_gradient(model, prompt, *drawn, args.batch_size)
    if args.method == "reptile":
        return reptile_gradient(model, prompt, *drawn, args.alpha), torch.zeros(())
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


def check_finite(args, model, prompt, drawn, step, gradient, loss):
    """Raises Diverged where the loss or the gradient of a step is not finite, and names the first
    meta-task of this process for which that is so, and its examples."""
    if gradient.isfinite().all() and loss.isfinite():
        return

    problem, (rank, world) = "a loss or a gradient is not finite", data.rank_and_world()
    tasks = [] if args.method == "ppt" else zip(*drawn)
    for i, batches in enumerate(tasks):
        gradient, loss = gradient_of(args, model, prompt, [[batch] for batch in batches])
        if not (gradient.isfinite().all() and loss.isfinite()):
            ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
            text = model.tokenizer.decode(ids)
            problem = (
                f"the loss or gradient of meta-task {rank + i * world} is not finite on {text!r}"
            )
            break

    raise Diverged(
        f"step {step:,}: {problem}; {args.out} keeps the best prompt so far; lower --alpha or "
        "--learning-rate and give --restart"
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
        "method": args.method,
        "clustering": clustering,
        "clusters": len(tasks),
        "source_size": len(examples),
        "source_task": task.name,
        "arguments": vars(args),
        **data.provenance(args.device, args.source, Path(args.source).with_name("task.json")),
    }
    if data.rank_and_world()[0] == 0:
        print(
            f"{args.method} on {size:,} examples in {len(tasks)} clusters; "
            f"{sum(map(len, held_out)):,} others validate",
            flush=True,
        )

    return [sum(tasks, [])] if args.method == "ppt" else tasks, held_out, facts


def encode_held_out(model, examples, m, ppt, batch_size=64):
    """A cluster's held-out examples, encoded: m of them to adapt on (none for PPT, which leaves the
    same out), and batches of the rest to score."""
    batches = list(data.encoded(model, examples[m:], batch_size))
    return None if ppt else model.encode(examples[:m]), batches


def start_prompt(model, args):
    """A random prompt, or the one in the folder --init."""
    if args.init in ("vocab", "normal"):
        return model.init_prompt(args.prompt_length, args.seed, args.init)
    return load_prompt(args.init, model.t5.config.d_model)[0].to(model.device)


def save(out, tensors, optimizer, step, log, t5, facts):
    """Writes what a continued run needs, and the best prompt so far."""
    if best_of(log) is None:
        raise Diverged(f"step {step:,}: the validation loss is not finite; give another model")
    if data.rank_and_world()[0] > 0:
        return

    out.mkdir(parents=True, exist_ok=True)
    data.save_state(out, tensors, optimizer, step, log, facts["digests"])
    score = {name: log[best_of(log)][name] for name in ("step", "accuracy", "loss")}
    save_prompt(out, tensors["best"], t5, **facts, **score, start_accuracy=log[0]["accuracy"])


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


def main(argv=None):
    """Reads the flags and learns a prompt, or with --search one for every pair of rates."""
    parser = data.Parser(__doc__)
    parser.add_config_flag()
    source = "source data with clusters, as cluster.py writes it"
    method = "MetaPT; without its second order; Reptile; or the PPT baseline"
    m = "m, examples of a task to adapt on and another m to score (PPT: of a batch)"
    patience = "evaluations without a better one until the run stops"
    whole, positive = data.whole, data.positive
    parser.add("--source", source, required=True, type=data.file, metavar="FILE")
    parser.add("--out", "the prompt's folder", required=True, metavar="FOLDER")
    parser.add("--method", method, "maml", choices=list(SETTINGS))
    parser.add("--model", "a T5 by hub name or folder", data.MODEL)
    parser.add("--alpha", "the inner loop's learning rate α", ALPHA, type=positive)
    parser.add_setting("--learning-rate", "AdamW's, the outer loop's β", SETTINGS, type=positive)
    parser.add("--batch-size", m, M, type=whole(1))
    parser.add_setting("--max-steps", "steps at most", SETTINGS, type=whole(0))
    parser.add_setting("--eval-every", "steps between evaluations", SETTINGS, type=whole(1))
    parser.add_setting("--patience", patience, SETTINGS, type=whole(1))
    parser.add("--source-size", "draws so many source examples (default: all)", type=whole(1))
    parser.add("--validation", "examples held out, evenly over clusters", 640, type=whole(1))
    start = data.folder_or("vocab", "normal")
    parser.add("--init", "the start: vocab, normal, or a prompt's folder", "vocab", type=start)
    parser.add("--tasks-per-pass", "meta-tasks of a forward pass (Reptile: all)", 4, type=whole(1))
    parser.add_switch("--search", "tries A.3's learning rates and keeps the best by validation")
    parser.add("--seed", "of the random prompt, the split and every draw", 1, type=whole(0))
    parser.add_prompt_flags()
    args = parser.parse(argv)
    args = data.fill(args, SETTINGS[args.method])
    search(args) if args.search else train(args)


def main_demo():
    """MetaPT and PPT on the offline demo, as the files demo/maml.json and demo/ppt.json say."""
    folder = data.demo()
    for method in ("maml", "ppt"):
        print(f"$ python train_meta.py --config {folder / method}.json", flush=True)
        main(["--config", f"{folder / method}.json"])
    print("now: python finetune.py")


if __name__ == "__main__":
    data.run(main if len(sys.argv) > 1 else main_demo)
