"""
Learns a prompt from source data: meta-learned prompt tuning (Section 4.3, Appendix A.3), or the baseline of
pre-trained prompt tuning (Appendix A.2).

    python train_meta.py                                                                 # the offline demo
    python train_meta.py --source source/kmeans10.jsonl --out prompts/metapt             # the paper's MetaPT
    python train_meta.py --source source/kmeans10.jsonl --out prompts/ppt --method ppt   # the baseline
    torchrun --nproc_per_node 4 train_meta.py --source ... --out ...                     # the same on four GPUs

The folder --out becomes a prompt in PEFT's layout, the best one by validation so far, with log.jsonl and arguments.json
beside it. The same command again continues a run that was stopped.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import data
from metapt import (InputError, PromptedT5, Task, adapt, first_line, load_prompt, load_t5, meta_gradient, parse_json,
                    read_json, save_prompt, write_beside)

# What Appendix A sets for each method; flags override it.
MAML = {"learning_rate": 0.025, "max_steps": 20_000, "eval_every": 500, "patience": 6}  # A.3
PPT = {"learning_rate": 0.003, "max_steps": 1_250_000, "eval_every": 20_000, "patience": 5}  # A.2
SETTINGS = {"maml": MAML, "fomaml": MAML, "reptile": MAML, "ppt": PPT}
SEARCH = {"alpha": [0.8, 0.3, 0.08, 0.03, 0.008], "learning_rate": [0.3, 0.08, 0.03, 0.025, 0.008]}  # A.3's α and β


def train(args):
    """One run from source data to the best prompt, in the folder args.out; returns its validation accuracy."""
    out, rank = Path(args.out), data.rank_and_world()[0]
    data.check_arguments(out / "arguments.json", args)
    t5, tokenizer = load_t5(args.model, args.device, args.dtype)
    model = PromptedT5(t5, tokenizer, Task.load(Path(args.source).parent), args.max_length)
    tasks, held_out, facts = read_source(args, model.task)
    first_epoch = len(tasks[0]) // args.batch_size if args.method == "ppt" else 0  # A.2: no early stop within it
    held_out = [encode_held_out(model, examples, args.batch_size) for examples in held_out]
    prompt = torch.nn.Parameter(start_prompt(model, args))
    optimizer = torch.optim.AdamW([prompt], lr=args.learning_rate, weight_decay=args.weight_decay)
    step, best, log = load_checkpoint(out, prompt, optimizer, args)
    if step and load_prompt(out)[1].get("digests") != facts["digests"]:
        raise InputError(f"{args.source}: not the data that the run in {out} began with; another --out or --restart")
    if rank == 0:
        data.save_arguments(out / "arguments.json", args)
    drawn = draw(model, tasks, step, args)
    if args.tasks_per_pass == "auto" and args.method in ("maml", "fomaml"):
        args.tasks_per_pass = fastest_pass(model, prompt.detach(), drawn, args)
    stopping = False  # Ctrl-C was seen, by any process
    bar = tqdm(None, args.method, args.max_steps, initial=step, disable=rank > 0 or None)
    with data.StopSignal() as stop, bar:
        while True:
            due = (step % args.eval_every == 0 or step == args.max_steps) and not (log and log[-1]["step"] == step)
            if due:
                score = validate(model, prompt.detach(), held_out, args)
                better = not best or (score["accuracy"], -score["loss"]) > (best["accuracy"], -best["loss"])
                if better and np.isfinite(score["loss"]) or not best:
                    best = {"prompt": prompt.detach().clone(), "step": step, **score}
                log.append({"step": step, **score, "best_step": best["step"]})
                bar.set_postfix(accuracy=f"{score['accuracy']:.3f}", best=f"{best['accuracy']:.3f}")
            ended = step == args.max_steps or step - max(best["step"], first_epoch) >= args.patience * args.eval_every
            if rank == 0 and (due or ended or stopping):
                save_checkpoint(out, prompt, optimizer, step, best, log)
                data.write_examples(out / "log.jsonl", log)
                save_prompt(out, best["prompt"], t5, **facts, step=best["step"], accuracy=best["accuracy"],
                            start_accuracy=log[0]["accuracy"])
            if ended:
                break
            if stopping:
                raise KeyboardInterrupt(f"stopped at step {step:,} and saved; the same command continues")
            stopping, drawn = update(model, prompt, optimizer, tasks, drawn, step, stop, args)
            step += 1
            bar.update()

    if rank == 0:
        print(f"wrote {out}: the prompt of step {best['step']:,} of {step:,}, validation accuracy "
              f"{100 * best['accuracy']:.1f} % (at the start {100 * log[0]['accuracy']:.1f} %)"
              + "; no step of this run was better than its start" * (best["step"] == 0))
    return best["accuracy"]


def read_source(args, task):
    """The meta-tasks: [training examples of each], [held-out examples of each], and the facts that go with the prompt.
    PPT mixes all source data into one task."""
    examples = list(data.read_examples(args.source, task))
    if args.source_size and args.source_size < len(examples):  # Figure 3a
        chosen = np.random.default_rng(args.seed).permutation(len(examples))[:args.source_size]
        examples = [examples[i] for i in chosen]
    tasks, held_out = split_clusters(examples, args)
    made = Path(args.source).with_suffix(".json")  # cluster.py's arguments
    clustering = read_json(made, "make the clusters again").get("method") if made.exists() else None
    facts = {"method": args.method, "clustering": clustering, "clusters": len(tasks), "source_size": len(examples),
             "source_task": task.name, "arguments": vars(args), **data.provenance(args.device, args.source)}
    if data.rank_and_world()[0] == 0:
        print(f"{args.method} on {sum(map(len, tasks)):,} examples in {len(tasks)} clusters; "
              f"{sum(map(len, held_out)):,} others validate", flush=True)
    return [sum(tasks, [])] if args.method == "ppt" else tasks, held_out, facts


def split_clusters(examples, args):
    """The meta-tasks T: [training examples of each cluster] and [held-out examples of each], about args.validation
    held out in all. PPT also takes source data without clusters. Raises InputError where a cluster is too small."""
    if not examples or args.method != "ppt" and not all("cluster" in example for example in examples):
        raise InputError(f"{args.source}: no clusters, or not for every line; make them with cluster.py --source "
                         f"{args.source}")
    clusters = {}
    for example in examples:
        clusters.setdefault(example.get("cluster", 0), []).append(example)
    count = max(args.validation // len(clusters), args.batch_size + 1)
    for name, members in clusters.items():
        if len(members) < count + 2 * args.batch_size:
            raise InputError(f"{args.source}: cluster {name} has {len(members)} examples; {2 * args.batch_size} to "
                             f"train and {count} to validate are needed: lower --k of cluster.py or --validation, "
                             "or raise --source-size")
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


def draw(model, tasks, step, args):
    """The encoded examples of a step: for every meta-task m to support and another m to query, disjoint; for PPT one
    batch. The draw depends on the seed and the step alone, so that a run can be continued from any step. Under torchrun
    each process has its share of the meta-tasks, or of the batch."""
    rng, (rank, ranks), m = np.random.default_rng([args.seed, step]), data.rank_and_world(), args.batch_size
    size = m if args.method == "ppt" else 2 * m
    drawn = [[task[i] for i in rng.choice(len(task), size, replace=False)] for task in tasks]
    if args.method == "ppt":
        return [model.encode(part) for part in [drawn[0][rank::ranks]] if part], None
    mine = drawn[rank::ranks]
    return [model.encode(examples[:m]) for examples in mine], [model.encode(examples[m:]) for examples in mine]


def gradient_of(model, prompt, supports, queries, args):
    """What the outer loop descends, and the loss: Equation 2's gradient, for PPT that of a batch's mean loss."""
    if args.method == "ppt":
        loss = sum(model.loss(prompt, batch, reduction="none").sum() for batch in supports) / args.batch_size
        return (torch.autograd.grad(loss, prompt)[0], loss.detach()) if supports else (0 * prompt, 0 * prompt.sum())
    if args.method == "reptile":  # Nichol et al. (2018): the way that two steps of Equation 1 go, support then query
        P = prompt.detach().repeat(len(supports), 1, 1)
        for batches in (supports, queries) if supports else ():
            P = adapt(model, P, batches, args.alpha).detach()
        return (prompt - P).sum(0) / args.alpha, torch.zeros(())
    return meta_gradient(model, prompt.detach(), supports, queries, args.alpha, first_order=args.method == "fomaml",
                         tasks_per_pass=args.tasks_per_pass)


def update(model, prompt, optimizer, tasks, drawn, step, stop, args):
    """One step P <- P - β ∇_P ... of the outer loop, by AdamW. Returns whether to stop here, and what the next step has
    drawn, which is encoded while the device works. Raises InputError where the loss or the gradient is not finite."""
    if args.method == "ppt":
        optimizer.param_groups[0]["lr"] = args.learning_rate * data.linear_schedule(step, args.max_steps)
    gradient, loss = gradient_of(model, prompt, *drawn, args)
    following = draw(model, tasks, step + 1, args)
    stopping = torch.tensor([float(bool(stop))], device=prompt.device)
    packed = sum_over_ranks(torch.cat([gradient.detach().flatten(), loss.reshape(1).to(gradient), stopping]))
    if not packed.isfinite().all():
        raise InputError(f"step {step:,}: {what_is_not_finite(model, prompt, *drawn, args)}; {args.out} keeps the best "
                         "prompt so far; lower --alpha or --learning-rate and give --restart")
    prompt.grad = packed[:prompt.numel()].view_as(prompt)
    optimizer.step()
    return packed[-1] > 0, following


def what_is_not_finite(model, prompt, supports, queries, args):
    """Names the meta-task of a step, and its examples, whose loss or gradient is not finite."""
    for i, batch in enumerate(supports):
        query = [] if queries is None else [queries[i]]
        gradient, loss = gradient_of(model, prompt, [batch], query, args)
        if not (gradient.isfinite().all() and loss.isfinite()):
            texts = model.tokenizer.batch_decode(torch.cat([b["input_ids"].flatten() for b in [batch, *query]])[None])
            return f"the loss or gradient of meta-task {i} is not finite on {texts[0]!r}"
    return "a loss or a gradient is not finite"


def sum_over_ranks(tensor):
    """The sum of this tensor over the processes that torchrun started."""
    if data.rank_and_world()[1] > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if tensor.is_cuda else "gloo")
        torch.distributed.all_reduce(tensor)
    return tensor


def fastest_pass(model, prompt, drawn, args):
    """How many meta-tasks a forward pass should hold, by measuring a step with 1, 2, 4, ... while memory suffices."""
    seconds = {}
    for count in [1] + [2**i for i in range(len(drawn[0]).bit_length() + 1)]:  # the first call warms up
        began = time.perf_counter()
        try:
            meta_gradient(model, prompt, *drawn, args.alpha, tasks_per_pass=count)[1].item()
        except torch.OutOfMemoryError:
            break
        seconds[count] = time.perf_counter() - began
    chosen = min(seconds, key=seconds.get)
    if data.rank_and_world()[0] == 0:
        print(f"{chosen} meta-tasks a forward pass: {seconds[chosen]:.2f} s a step")
    return chosen


def validate(model, prompt, held_out, args):
    """Accuracy and loss on held-out source data. Meta-learning: after adapting to each cluster (Equation 1), the mean
    over the clusters; PPT: as it is."""
    rank, ranks = data.rank_and_world()
    names = ("accuracy", "loss", "in_words")
    total = torch.zeros(len(names), dtype=torch.float64)
    for support, batches in held_out[rank::ranks]:
        adapted = prompt if args.method == "ppt" else adapt(model, prompt, support, args.alpha).detach()
        score = model.evaluate(adapted, batches)
        total += torch.tensor([score[name] for name in names], dtype=torch.float64)
    total = sum_over_ranks(total.to(prompt.device)) / len(held_out)
    return dict(zip(names, total.tolist()))


def save_checkpoint(out, prompt, optimizer, step, best, log):
    """Everything that a continued run needs, in one safetensors file: numbers and a checksum in its header, tensors
    after it. The checkpoint before it is kept."""
    tensors = {"prompt": prompt.detach(), "best": best["prompt"]}
    for name, value in optimizer.state_dict()["state"].get(0, {}).items():
        tensors[f"optimizer.{name}"] = value
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    best = {name: value for name, value in best.items() if name != "prompt"}
    facts = json.dumps({"step": step, "best": best, "log": log})
    header = {"facts": facts, "checksum": checksum(facts, tensors)}

    def write(beside):
        save_file(tensors, beside, header)
        if (out / "checkpoint.safetensors").exists():
            os.replace(out / "checkpoint.safetensors", out / "checkpoint.previous.safetensors")
    write_beside(out / "checkpoint.safetensors", write)


def load_checkpoint(out, prompt, optimizer, args):
    """Puts prompt and optimizer back as the last whole checkpoint has them; returns the step, the best so far and the
    log, or a run's beginning where there is no checkpoint. Raises InputError where none is whole."""
    paths = [out / "checkpoint.safetensors", out / "checkpoint.previous.safetensors"]
    if args.restart:
        for path in paths:
            path.unlink(missing_ok=True)
    paths = [path for path in paths if path.exists()]
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
            facts = parse_json(header["facts"])
            if header["checksum"] != checksum(header["facts"], tensors):
                raise ValueError("its checksum does not fit")
            state = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
            with torch.no_grad():
                prompt.copy_(tensors["prompt"])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state} if state else {}})
            print(f"continues {out} from step {facts['step']:,}")
            return facts["step"], {"prompt": tensors["best"].to(prompt.device), **facts["best"]}, facts["log"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            print(f"{path} is broken: {first_line(error)}"
                  + ("; the one before it is used" if path != paths[-1] else ""))
            if path != paths[-1]:
                path.unlink(missing_ok=True)  # so that it never becomes the one before
    if paths:
        raise InputError(f"{out}: no whole checkpoint; --restart begins anew")
    return 0, None, []


def checksum(facts, tensors):
    digest = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def search(args):
    """Appendix A.3's search: a run for every α and β of the paper, each in a folder of its own in args.out; the prompt
    with the best validation becomes the one of args.out."""
    tried = {}
    for alpha, beta in itertools.product(SEARCH["alpha"], SEARCH["learning_rate"]):
        folder = Path(args.out) / f"alpha{alpha}-beta{beta}"
        tried[folder] = train(argparse.Namespace(**{**vars(args), "alpha": alpha, "learning_rate": beta,
                                                    "out": str(folder)}))
    best = max(tried, key=tried.get)
    if data.rank_and_world()[0] == 0:
        for name in ("adapter_model.safetensors", "adapter_config.json", "metapt.json"):
            write_beside(Path(args.out) / name, lambda beside: shutil.copy(best / name, beside))
        print(f"wrote {args.out}: the prompt of {best}, the best of {len(tried)} by its validation accuracy of "
              f"{100 * tried[best]:.1f} %")


def main(argv=None):
    parser = data.Parser(__doc__)
    parser.add_config_flag()
    parser.add("--source", "source data with clusters, as cluster.py writes it", metavar="FILE")
    parser.add("--out", "the prompt's folder", metavar="FOLDER")
    parser.add("--method", "MetaPT; without its second order; Reptile; or the PPT baseline", "maml",
               choices=list(SETTINGS))
    parser.add("--model", "a T5 by hub name or folder", data.MODEL)
    parser.add("--alpha", "the inner loop's learning rate", 0.08, type=float)
    parser.add_setting("--learning-rate", "AdamW's, the outer loop's β", SETTINGS, type=float)
    parser.add("--batch-size", "m, examples of a task to adapt on and another m to score (PPT: of a batch)", 4,
               type=int)
    parser.add_setting("--max-steps", "steps at most", SETTINGS, type=int)
    parser.add_setting("--eval-every", "steps between evaluations", SETTINGS, type=int)
    parser.add_setting("--patience", "evaluations without a better one until the run stops", SETTINGS, type=int)
    parser.add("--source-size", "learns from so many source examples, drawn once (default: all)", type=int)
    parser.add("--validation", "examples held out in all, evenly over the clusters", 640, type=int)
    parser.add("--init", "where the prompt starts: vocab, normal, or a prompt's folder", "vocab")
    parser.add("--tasks-per-pass", "meta-tasks in a forward pass, or auto, which measures (default: 4 on a CPU, auto "
               "on a GPU)", type=lambda text: text if text == "auto" else int(text))
    parser.add("--search", "tries Appendix A.3's learning rates and keeps the best by validation", False,
               action="store_true")
    parser.add("--seed", "of the random prompt, the split and every draw", 1, type=int)
    parser.add_model_flags()
    args = parser.parse(argv)
    if not args.source or not args.out:
        parser.error("--source FILE and --out FOLDER are needed")
    args.tasks_per_pass = args.tasks_per_pass or (4 if args.device == "cpu" else "auto")
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
