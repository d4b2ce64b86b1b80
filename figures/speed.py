"""
How fast the meta-gradient and prompt tuning are, beside the textbook loop and other libraries. The
T5 has random weights of a public T5's shape; nothing is downloaded. The README.md beside this file
has the numbers and their commands.

    python figures/speed.py                                                    # a tiny T5
    python figures/speed.py --shape small --sst --rounds 3 --compare loop higher
    python figures/speed.py --shape small --only step --exact --dtype bfloat16   # its error
"""

import ctypes
import random
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import script
from data import TEMPLATE, WORDS
from metapt import NEW_WORD, PromptedT5, Task, input_errors, meta_gradient, textbook_meta_gradient
from metapt import twice_differentiable
from train_meta import ALPHA, M

# ----------------------------------------------------------- Equation 2 and prompt tuning by others


def with_higher(model, prompt, supports, queries, alpha):
    """Equation 2's gradient by the higher library's differentiable optimizer, and the loss."""
    with input_errors("--compare higher", "pip install higher"):
        import higher

    module = torch.nn.ParameterList([torch.nn.Parameter(prompt.clone())])
    optimizer = torch.optim.SGD(module.parameters(), alpha)
    total = 0
    for support, query in zip(supports, queries):
        inner = higher.innerloop_ctx(module, optimizer, copy_initial_weights=False)
        with inner as (adapted, differentiable):
            with twice_differentiable(True):
                differentiable.step(model.loss(adapted[0], support))
            total = total + model.loss(adapted[0], query)
    return torch.autograd.grad(total, module[0])[0], total.detach()


OTHERS = {"loop": textbook_meta_gradient, "higher": with_higher}  # by their names for --compare


def with_peft(model, prompt):
    """The same model and prompt by the peft library: its parameter, and batch -> logits at <X>."""
    with input_errors("--only downstream", "pip install peft"):
        import peft

    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=len(prompt), num_transformer_submodules=1
    )
    theirs = peft.get_peft_model(model.t5, config).eval()
    weight = theirs.prompt_encoder.default.embedding.weight
    weight.data.copy_(prompt)

    def logits(batch):
        inputs = {name: batch[name].to(prompt.device) for name in ("input_ids", "attention_mask")}
        decoder_ids = model.decoder_ids.repeat(len(batch["input_ids"]), 1)
        return theirs(**inputs, decoder_input_ids=decoder_ids).logits[:, 1]

    return weight, logits


# ----------------------------------------------------------------- The T5s and texts that are timed

SHAPES = {
    "tiny": dict(d_model=16, d_ff=32, num_heads=2, num_layers=2, d_kv=8, vocab_size=1100),
    "small": dict(d_model=512, d_ff=2048, num_heads=8, num_layers=6),
    "base": dict(d_model=768, d_ff=3072, num_heads=12, num_layers=12),
    "large": dict(d_model=1024, d_ff=4096, num_heads=16, num_layers=24),
}
TASK = Task("speed", TEMPLATE, WORDS[5])
VOCABULARY = [f"w{i}" for i in range(1000)]
# Tokens of H(x) of the first 80 sentences of SST's dev split, by T5's own tokenizer.
SST = """25 22 38 15 39 23 16 43 51 42 44 50 36 44 22 36 50 27 46 48 35 27 30 51 11 44 26
18 18 42 59 32 36 23 53 35 55 43 48 34 35 22 22 55 28 21 16 36 56 16 34 25 36 23
27 49 30 30 30 37 47 30 23 36 33 30 24 32 24 31 35 32 29 24 20 55 37 24 36 18"""


def make_model(shape, device, dtype="float32", faster=True):
    """A T5 of random weights, always the same, with a tokenizer of T5's kind to which every word is
    one piece. With faster=False it is as transformers has it."""
    words = [NEW_WORD + word for word in (*VOCABULARY, *TASK.words, "It", "was")]
    pieces = ["<pad>", "</s>", "<unk>", *words]
    tokenizer = T5Tokenizer([(piece, -1.0) for piece in pieces], extra_ids=1)
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **SHAPES[shape]))
    t5 = t5.to(device, getattr(torch, dtype))
    return PromptedT5(t5, tokenizer, TASK, max_length=10_000, faster=faster)


def make_examples(count, length, sst=False):
    """Random examples whose H(x) has `length` tokens each, or as many as SST's sentences."""
    rng = random.Random(0)
    lengths = list(map(int, SST.split())) if sst else [length]
    template = 5  # tokens: a stop, It, was, <X>, </s>
    examples = []
    for i in range(count):
        words = rng.choices(VOCABULARY, k=lengths[i % len(lengths)] - template)
        examples.append({"text": " ".join(words), "label": rng.randrange(len(TASK.words))})
    return examples


# ----------------------------------------------------------------- Seconds, memory and agreement


def peak_memory(function, device):
    """What a function returns, and the most memory that it had in use at once, in GiB above what
    was in use before: the GPU's, or under Linux the process's."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - start) / 2**30

    def peak():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20

    ctypes.CDLL(None).malloc_trim(0)  # hands back what earlier calls have freed
    Path("/proc/self/clear_refs").write_text("5")  # a new peak begins here
    start = peak()
    result = function()
    return result, peak() - start


def compare(title, ways, args, exact=None):
    """Times functions in turn, round by round. Prints of each the median and the spread of its
    seconds, the median as a multiple of the first one's, its peak of memory, and where it returns
    (gradient, ...) that one's error against the exact gradient, or the first, and their cosine."""
    peaks = {}
    errors = {}
    for name, way in ways.items():  # which warms up, too
        result, peaks[name] = peak_memory(way, args.device)
        errors[name] = ""
        if isinstance(result, tuple):
            gradient = result[0].cpu().double().flatten()
            exact = gradient if exact is None else exact.flatten()
            error = (gradient - exact).norm() / exact.norm()
            cosine = F.cosine_similarity(gradient, exact, dim=0)
            errors[name] = f"{error:10.1e}{cosine:10.5f}"

    seconds = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    print(f"\n{title:32}  seconds            (spread)  of first  peak GiB     error    cosine")
    for name, median in medians.items():
        spread = f"({min(seconds[name]):.4f} to {max(seconds[name]):.4f})"
        columns = f"{median:9.4f}{spread:>20}{median / first:10.2f}{peaks[name]:10.3f}"
        print(f"{name:32}{columns}{errors[name]}", flush=True)


# ------------------------------------------------------------------ The two parts of the benchmark


def time_meta_steps(model, plain, prompt, supports, queries, args):
    """Equation 2's gradient by us, and by others with T5 as transformers has it. Errors are against
    the first of these, or with --exact against float64 on the CPU."""
    step = (prompt, supports, queries, ALPHA)
    ways = {"forward pass F of the supports": partial(model.evaluate, prompt, supports)}
    for name in args.compare:
        ways[f"{name}, plain T5"] = partial(OTHERS[name], plain, *step)
    for n in args.tasks_per_pass:
        ways[f"ours, {n} tasks a pass"] = partial(meta_gradient, model, *step, tasks_per_pass=n)
    exact = None
    if args.exact:  # to 1e-7: T5's layer norm squares in float32 whatever the model's precision
        reference = make_model(args.shape, "cpu", "float64")
        exact, _ = meta_gradient(reference, prompt.cpu().double(), supports, queries, ALPHA)
    compare("a meta-step", ways, args, exact)


def time_downstream(model, plain, prompt, examples, args):
    """Prompt tuning's step (A.4) and an evaluation, from the texts on, by us and through peft."""
    P = prompt.clone().requires_grad_()
    sides = {"ours": (P, partial(model, P)), "peft": with_peft(plain, prompt)}

    def step(P, logits):
        batch = model.encode(examples[:32])
        words = model.word_ids[batch["labels"].to(model.device)]
        return torch.autograd.grad(F.cross_entropy(logits(batch), words), P)

    @torch.no_grad()
    def evaluation(P, logits):
        batches = model.batches(examples)
        return [logits(batch)[:, model.word_ids].argmax(-1).tolist() for batch in batches]

    parts = {"prompt tuning's step, 32 texts": step, "an evaluation": evaluation}
    for title, part in parts.items():
        compare(title, {name: partial(part, *side) for name, side in sides.items()}, args)


def main(argv=None):
    """Prints the parts of the benchmark that the flags name."""
    parser = script.Parser(__doc__)
    whole = script.number(1)
    add = parser.add_argument
    parts = ["step", "downstream"]
    add("--only", nargs="+", choices=parts, default=parts, help="parts of the benchmark")
    add("--shape", choices=SHAPES, default="tiny", help="the public T5 whose shape it is")
    add("--tasks", type=whole, default=10, help="meta-tasks of a step, of 4 + 4 examples each")
    add("--length", type=script.number(5), default=40, help="tokens of an example")
    add("--sst", action="store_true", help="examples of as many tokens as SST's sentences have")
    add("--prompt-length", type=whole, default=100, help="vectors of the prompt")
    add("--rounds", type=whole, default=5, help="timed rounds")
    add("--tasks-per-pass", nargs="+", type=whole, default=[4, 10], help="of our meta-step")
    add("--compare", nargs="*", choices=OTHERS, default=["loop"], help="meta-steps beside ours")
    add("--exact", action="store_true", help="a meta-step's error against float64 on the CPU")
    script.add_precision(parser.add_machine())
    args = parser.parse(argv)
    script.set_machine(args)

    model = make_model(args.shape, args.device, args.dtype)
    plain = None  # which takes the memory of a second T5
    if "downstream" in args.only or args.compare:
        plain = make_model(args.shape, args.device, args.dtype, faster=False)
    prompt = model.init_prompt(args.prompt_length)
    examples = make_examples(max(2 * args.tasks * M, 64), args.length, args.sst)
    batches = list(model.batches(examples[: 2 * args.tasks * M], M))
    supports, queries = batches[::2], batches[1::2]
    print(f"T5 {args.shape}, {args.device}, {torch.get_num_threads()} threads, {args.tasks} tasks")
    if "step" in args.only:
        time_meta_steps(model, plain, prompt, supports, queries, args)
    if "downstream" in args.only:
        time_downstream(model, plain, prompt, examples, args)


if __name__ == "__main__":
    script.run(main)
