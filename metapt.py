"""
MetaPT: Learning a Better Initialization for Soft Prompts via Meta-Learning (Huang, Qian and Yu).

The method and nothing else; it needs torch and transformers (5.15 or newer), and can be copied alone
into another project. From top to bottom:

    Section 3             Task, PromptedT5: a frozen T5 reads [P; H(x)] and answers at the mask
    Equations 1 and 2     adapt, textbook_meta_gradient: the definition, as it is written
    The same, faster      meta_gradient, CrossAttention
    Appendix A            linear_schedule, best_of: what every training loop shares
    Files                 load_t5, save_prompt, load_prompt, JSON; errors of one line

    task = Task("sst5", "{text} It was {mask}", ["terrible", "bad", "okay", "good", "great"])
    model = PromptedT5(*load_t5("google-t5/t5-base"), task)
    prompt = model.init_prompt()
    supports = [model.encode(examples) for examples in m_examples_of_every_meta_task]
    queries = [model.encode(examples) for examples in m_others_of_every_meta_task]
    gradient, loss = meta_gradient(model, prompt, supports, queries, alpha=0.08)
    prompt = prompt - beta * gradient
"""

import json
import math
import os
import re
import string
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

MASK = "<extra_id_0>"  # T5's first sentinel stands for the paper's <X>
NEW_WORD = "\u2581"  # how a sentencepiece that begins a word begins


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, and how to mend it."""


class Diverged(InputError):
    """The losses of a training are not finite."""


# ------------------------------------------------------------- Section 3: the task as text, the T5


@dataclass(frozen=True)
class Task:
    """A classification task as text (Section 3): H(x) is `template` filled in, and the label y is
    the word z = words[y].

    `template` names {mask} once and any fields of an example: "{text} It was {mask}",
    "{premise}? {mask}. {hypothesis}". Raises InputError where it does not, or where two words are
    the same.
    """

    name: str
    template: str
    words: list[str]

    def __post_init__(self):
        are_words = isinstance(self.words, list) and all(isinstance(w, str) for w in self.words)
        if not are_words or not isinstance(self.name, str) or not isinstance(self.template, str):
            raise InputError(
                f"task {self.name}: name and template must be strings, and words a list of strings"
            )

        if "/" in self.name:
            raise InputError(f"task {self.name}: the name must not hold a slash")

        try:
            names = [name for _, name in self.parts() if name is not None]
        except ValueError as error:
            raise InputError(f"task {self.name}: template {self.template!r} is broken: {error}")

        if names.count("mask") != 1 or "" in names or len(names) < 2:
            raise InputError(
                f"task {self.name}: the template {self.template!r} must hold {{mask}} once and a "
                "field of the examples, as '{text} It was {mask}' does"
            )

        if len(self.words) < 2 or len(set(self.words)) < len(self.words):
            raise InputError(
                f"task {self.name}: the words {self.words} must be two or more, all different"
            )

    def parts(self):
        """The template in parts: (words, the name in braces behind them or None)."""
        parts = []
        for words, name, form, conversion in string.Formatter().parse(self.template):
            if form or conversion:
                raise ValueError(f"{name!r} takes no format")
            parts.append((words, name))
        return parts

    @property
    def fields(self):
        """The keys of an example that the template reads."""
        return [name for _, name in self.parts() if name not in ("mask", None)]

    @classmethod
    def load(cls, path):
        """The task in `path`, a task.json or a folder that holds one. Raises InputError."""
        path = Path(path) / "task.json" if Path(path).is_dir() else Path(path)
        mend = 'write {"name": ..., "template": ..., "words": [...]}'
        facts = read_json(path, mend)
        with blame(path, mend):
            arguments = facts["name"], facts["template"], facts["words"]
        try:
            return cls(*arguments)
        except InputError as error:
            raise InputError(f"{path}: {error}; {mend}")

    def save(self, folder):
        """Writes folder/task.json."""
        facts = {"name": self.name, "template": self.template, "words": self.words}
        write_json(Path(folder) / "task.json", facts)


class PromptedT5(torch.nn.Module):
    """A frozen T5 that reads a soft prompt P before the text, [P; H(x)], and answers at the mask
    (Section 3).

    t5: any T5ForConditionalGeneration. Its weights are frozen, its dropout is turned off (until
    someone calls train()), and its cross-attention is exchanged for one that multiplies in another
    order, where no adapter stands in it.
    tokenizer: its tokenizer. task: the Task.
    max_length: tokens of H(x) at most; the text is cut, never the template.
    Raises InputError where a word of the task is not one piece of the tokenizer, or where model or
    tokenizer is no T5's.
    """

    def __init__(self, t5, tokenizer, task, max_length=256):
        super().__init__()
        if not isinstance(t5, T5ForConditionalGeneration):
            raise InputError(f"{type(t5).__name__} is no T5ForConditionalGeneration; give a T5")

        self.t5 = t5.requires_grad_(False).eval()
        for block in t5.decoder.block:
            attention = block.layer[1].EncDecAttention
            if {type(attention.k), type(attention.v)} == {torch.nn.Linear}:
                attention.__class__ = CrossAttention

        self.tokenizer, self.task, self.max_length = tokenizer, task, max_length
        self.mask_id = tokenizer.convert_tokens_to_ids(MASK)
        known = self.mask_id not in (None, tokenizer.unk_token_id)
        complete = None not in (tokenizer.pad_token_id, tokenizer.eos_token_id)
        if not known or not complete or len(tokenizer) > t5.get_input_embeddings().num_embeddings:
            raise InputError(
                f"the tokenizer of {t5.config._name_or_path} has no {MASK}, no <pad> or no </s>, "
                "or more pieces than the model knows; give the model's own"
            )

        self.special_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        # T5's own tokenizer marks the beginning of any text as that of a word; a byte-level one
        # reads the space before it.
        first = tokenizer(task.words[0], add_special_tokens=False).input_ids[:1]
        self.marks_words = "".join(tokenizer.convert_ids_to_tokens(first)).startswith(NEW_WORD)

        pieces = self._tokenize([(" ", word) for word in task.words])
        problems = []
        for word, ids in zip(task.words, pieces):
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                shown = tokenizer.convert_ids_to_tokens(ids)
                problems.append(f"{word!r} is not one piece of the tokenizer, but {shown}")
            elif pieces.count(ids) > 1:
                problems.append(f"{word!r} is the same piece as another word")
        if problems:
            raise InputError(f"task {task.name}: {'; '.join(problems)}; choose other words")

        self._check_template()
        start_id = t5.config.decoder_start_token_id
        start_id = t5.config.pad_token_id if start_id is None else start_id
        word_ids = torch.tensor(pieces)[:, 0]
        decoder_ids = torch.tensor([[start_id, self.mask_id]])
        # Buffers, so that they lie beside the weights and no forward pass has to bring them there.
        self.register_buffer("word_ids", word_ids.to(t5.device), persistent=False)
        self.register_buffer("decoder_ids", decoder_ids.to(t5.device), persistent=False)

    @property
    def device(self):
        return self.t5.device

    def init_prompt(self, n_tokens=100, seed=1, init="vocab"):
        """A random prompt [n_tokens, d_model], float32: rows of the frozen embedding table
        (init="vocab"), or noise as large as they are (init="normal")."""
        generator = torch.Generator().manual_seed(seed)
        table = self.t5.get_input_embeddings().weight.detach().cpu()
        if init == "normal":
            noise = torch.randn(n_tokens, table.shape[1], generator=generator)
            return (noise * table.float().std()).to(self.device)

        special = self.special_ids | {self.tokenizer.unk_token_id}
        known = min(len(self.tokenizer), len(table))
        words = torch.tensor([i for i in range(known) if i not in special])
        rows = words[torch.randint(len(words), (n_tokens,), generator=generator)]
        return table[rows].float().to(self.device)

    def encode(self, examples):
        """Examples (dicts with the template's fields and, where known, a `label`) as a batch:
        input_ids [B, L], attention_mask [B, L] and, where every example has one, labels [B].
        It stays on the CPU until it is used. Raises InputError for a label without a word."""
        ids = [torch.tensor(row) for row in self._fill(examples)]
        batch = pad(ids, [torch.ones_like(row) for row in ids], self.tokenizer.pad_token_id)
        if all("label" in example for example in examples):
            labels = [example["label"] for example in examples]
            if not set(labels) <= set(range(len(self.task.words))):
                raise InputError(f"labels {labels} are not all indices of {self.task.words}")
            batch["labels"] = torch.tensor(labels, dtype=torch.long)

        return batch

    def _fill(self, examples):
        """H(x) (Section 3) of every example as token ids: the template around its fields, then
        </s>. Where that is longer than max_length, the longest field loses its end."""
        rows = []
        for parts, fields in self._parts_of(examples):
            too_long = sum(map(len, parts)) + 1 - self.max_length
            for _ in range(too_long):
                longest = max(fields, key=len, default=[])
                if not longest:
                    raise InputError(
                        f"the template of task {self.task.name} alone is longer than "
                        f"{self.max_length} tokens; raise --max-length"
                    )
                longest.pop()
            rows.append(sum(parts, []) + [self.tokenizer.eos_token_id])
        return rows

    def _parts_of(self, examples):
        """The token ids of every part of H(x), for each example, and those of its fields alone."""
        rows = [self._spans(example) for example in examples]
        # One call for all texts, each of them once, takes a fifth of the time of a call for each.
        texts = list(dict.fromkeys(span[:2] for row in rows for span in row))
        ids = dict(zip(texts, self._tokenize(texts)))
        for row in rows:
            parts, fields = [], []
            for space, text, is_field in row:
                parts.append(ids[space, text])
                if is_field:  # a text may spell </s>
                    parts[-1] = [i for i in parts[-1] if i not in self.special_ids]
                    fields.append(parts[-1])
            yield parts, fields

    def _spans(self, example):
        """H(x) as a list of (white space, the text behind it, whether that is a field). The white
        space is "" between two texts that touch, and None before the first."""
        spans, space = [], None
        for words, name in self.task.parts():
            texts = [(words, False)]
            if name == "mask":
                texts.append((MASK, False))
            elif name is not None:
                texts.append((example[name].strip(), True))

            for whole, is_field in texts:
                text = whole.strip()
                before, _, after = whole.partition(text) if text else (whole, "", "")
                space = (space or "") + before if space is not None or before else None
                if text == MASK and not is_field:  # a sentinel takes the space before it along
                    if (space or "").removesuffix(" "):
                        spans.append((space.removesuffix(" "), "", False))
                    space = ""
                if text:
                    spans.append((space, text, is_field))
                    space = after

        return spans

    def _tokenize(self, texts):
        """The token ids of (white space, the text behind it) pairs."""
        if not texts:
            return []
        if self.marks_words:
            written = [text for _, text in texts]
        else:
            written = [(space or "") + text for space, text in texts]
        rows = self.tokenizer(written, add_special_tokens=False, verbose=False).input_ids
        if self.marks_words:
            touching = [space == "" for space, _ in texts]
            rows = [self._unmarked(ids) if touches else ids for ids, touches in zip(rows, touching)]
        return rows

    def _unmarked(self, ids):
        """Token ids without the mark of a word's beginning, for a text that touches the one before,
        as the full stop in "{mask}." does."""
        first = self.tokenizer.convert_ids_to_tokens(ids[:1])
        if not first or not first[0].startswith(NEW_WORD):
            return ids
        piece = first[0].removeprefix(NEW_WORD)
        if not piece:
            return ids[1:]

        inner = self.tokenizer.convert_tokens_to_ids(piece)
        return ids if inner in (None, self.tokenizer.unk_token_id) else [inner] + ids[1:]

    def _check_template(self):
        """Raises InputError where the token ids of H(x) do not spell it: where spaces are lost, as
        with a tokenizer that reads them in neither of the two ways."""
        text = " ".join(self.task.words[:2])
        example = dict.fromkeys(self.task.fields, text)
        ((parts, _),) = self._parts_of([example])
        ids = sum(parts, [])
        normalizer = getattr(self.tokenizer, "backend_tokenizer", self.tokenizer).normalizer
        wanted = self.task.template.format(**example, mask=MASK)
        wanted = normalizer.normalize_str(wanted) if normalizer else wanted
        found = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        # No piece stands for the space before a special token; white space of any kind is a space.
        special = "|".join(map(re.escape, [MASK, *self.tokenizer.all_special_tokens]))
        wanted, found = (
            re.sub(rf" ({special})", r"\1", " ".join(s.split())) for s in (wanted, found)
        )
        if wanted.lower() != found.lower() and self.tokenizer.unk_token_id not in ids:
            raise InputError(
                f"task {self.task.name}: the tokenizer of {self.t5.config._name_or_path} reads "
                f"{wanted!r} as {found!r}; write another template or give another T5"
            )

    def forward(self, prompt, batch):
        """[P; H(x)] -> logits at <X>, [B, vocabulary], in float32 or float64.

        prompt: [n, d], or [B, n, d] with one for each example; an empty one, [0, d], is none.
        """
        text = self.t5.get_input_embeddings()(batch["input_ids"].to(self.device))
        P = prompt.to(text).expand(len(text), -1, -1)
        answer = self.t5(
            inputs_embeds=torch.cat([P, text], dim=1),
            attention_mask=self._padding(batch, P.shape[1], text.dtype),
            decoder_input_ids=self.decoder_ids.expand(len(text), -1),
            use_cache=False,
        )
        logits = answer.logits[:, 1]  # position 0 answers with <X> itself, 1 with its word
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # for a softmax

    def _padding(self, batch, n, dtype):
        """What to add to the attention scores, [B, 1, 1, n + L]: nothing for the prompt and the
        text, the lowest number for padding. None where nothing is padded. A mask of this form is
        taken as it is; transformers would wait for the device to look into one of ones and zeros.
        """
        if batch["attention_mask"].all():
            return None
        seen = F.pad(batch["attention_mask"], (n, 0), value=1)[:, None, None].to(self.device)
        return (1 - seen).to(dtype) * torch.finfo(dtype).min

    def loss(self, prompt, batch, reduction="mean"):
        """-log p(<X> = z | [P; H(x)]; P), the objective of Section 3, over the whole vocabulary:
        the mean over the batch, their "sum", or with reduction="none" each example's."""
        words = self.word_ids[batch["labels"].to(self.device)]
        return F.cross_entropy(self(prompt, batch), words, reduction=reduction)

    @torch.no_grad()
    def probabilities(self, prompt, batch):
        """Each example's distribution over the task's words, [B, classes]."""
        return self(prompt, batch)[:, self.word_ids].softmax(-1)

    def predict(self, prompt, batch):
        """The label of each example, [B]: the most probable of the task's words."""
        return self.probabilities(prompt, batch).argmax(-1)

    @torch.no_grad()
    def evaluate(self, prompt, batches):
        """Scores of labelled batches: `accuracy` (a share), mean `loss`, `in_words` (the share of
        examples whose most probable token of the whole vocabulary is a word of the task) and
        `confusion` (counts, [true][predicted])."""
        columns = []
        for batch in batches:
            logits, labels = self(prompt, batch), batch["labels"].to(self.device)
            predicted = logits[:, self.word_ids].argmax(-1)
            losses = F.cross_entropy(logits, self.word_ids[labels], reduction="none")
            in_words = torch.isin(logits.argmax(-1), self.word_ids)
            columns.append(torch.stack([labels, predicted, losses, in_words]))

        # All numbers in one transfer: the device is waited for once, not at every batch.
        labels, predicted, losses, in_words = torch.cat(columns, dim=1).cpu().double()
        classes = len(self.task.words)
        counts = torch.bincount((classes * labels + predicted).long(), minlength=classes**2)
        return {
            "accuracy": (labels == predicted).double().mean().item(),
            "loss": losses.mean().item(),
            "in_words": in_words.mean().item(),
            "confusion": counts.view(classes, classes).tolist(),
        }


# --------------------------------------------------------- Equations 1 and 2, as they are written


def adapt(model, prompt, support, alpha, create_graph=False):
    """Equation 1: one step of gradient descent on a meta-task's m support examples.

    prompt [n, d] and an encoded batch give P'_i [n, d]. With create_graph the step can itself be
    differentiated, which Equation 2 does.
    """
    P = prompt if prompt.requires_grad else prompt.detach().requires_grad_()
    with twice_differentiable(create_graph):
        loss = model.loss(P, support)
        (gradient,) = torch.autograd.grad(loss, P, create_graph=create_graph)
    return P - alpha * gradient  # P'_i = P - α ∇_P L_Ti(f_P)


def textbook_meta_gradient(model, prompt, supports, queries, alpha):
    """Equation 2's gradient ∇_P Σ_Ti L_Ti(f_P'_i), where every P'_i is a function of P: the
    definition. These arguments and the result are as in meta_gradient."""
    P = prompt.detach().clone().requires_grad_()
    total = 0
    for support, query in zip(supports, queries, strict=True):
        adapted = adapt(model, P, support, alpha, create_graph=True)  # P'_i
        total = total + model.loss(adapted, query)  # on another m examples
    (gradient,) = torch.autograd.grad(total, P)
    return gradient, total.detach()


def twice_differentiable(wanted):
    """Within it attention can be differentiated twice. PyTorch's fused attention cannot; its plain
    form can, and costs what transformers' own "eager" attention does."""
    return sdpa_kernel(SDPBackend.MATH) if wanted else nullcontext()


# ------------------------------------------------------------------------------- The same, faster


def meta_gradient(model, prompt, supports, queries, alpha, first_order=False, tasks_per_pass=None):
    """Equation 2's gradient, exact to the second order.

    prompt [n, d]; supports and queries: an encoded batch for each task. first_order treats
    ∇_P L_Ti(f_P) as a constant, which drops the Hessian. tasks_per_pass tasks are worked on at once
    (default: all), which bounds the memory and changes nothing else. Returns the gradient [n, d]
    and the summed query loss, both detached. Raises InputError where there are not as many supports
    as queries.
    """
    tasks = len(supports)
    if len(queries) != tasks:
        raise InputError(f"{tasks} supports and {len(queries)} queries: a task has one of each")

    tasks_per_pass = tasks_per_pass or max(1, tasks)
    gradient, total = torch.zeros_like(prompt), prompt.new_zeros(())
    for start in range(0, tasks, tasks_per_pass):
        some = slice(start, start + tasks_per_pass)
        # A copy of P for every task: gradients with respect to the copies are the tasks' own.
        P = prompt.detach().repeat(len(supports[some]), 1, 1).requires_grad_()
        adapted = adapt_all(model, P, supports[some], alpha, create_graph=not first_order)
        loss = summed_loss(model, adapted, queries[some])
        (per_task,) = torch.autograd.grad(loss, P)  # through P'_i, so through Equation 1's gradient
        gradient += per_task.sum(0)
        total += loss.detach()

    return gradient, total


def adapt_all(model, prompts, supports, alpha, create_graph=False):
    """Equation 1 for every task at once: prompts [T, n, d] and T batches give P'_1 to P'_T."""
    P = prompts if prompts.requires_grad else prompts.detach().requires_grad_()
    with twice_differentiable(create_graph):
        loss = summed_loss(model, P, supports)
        (gradient,) = torch.autograd.grad(loss, P, create_graph=create_graph)
    return P - alpha * gradient


# Elements (examples × length × d_model) that T5 reads at once: enough to keep the device busy, and
# few enough to stay in a CPU's caches. It is for speed alone: the graph holds all chunks.
CHUNK_SIZE = {"cpu": 2**19, "cuda": 2**23}


def summed_loss(model, prompts, batches):
    """Σ_i L_Ti(f_Pi): prompts [T, n, d], batches a list of T, every example with its own task's
    prompt. The mean is over a task's examples and the sum over tasks, so that no task's step
    depends on the others. Examples of about one length share a forward pass, whatever their task:
    padding is work that is thrown away. At t5-small's shape that takes a seventh off a step, and
    more where the T5 is smaller."""
    batch = batches[0] if len(batches) == 1 else join(batches, model.tokenizer.pad_token_id)
    sizes = torch.tensor([len(one["labels"]) for one in batches])
    task = torch.arange(len(batches)).repeat_interleave(sizes)  # of each example

    lengths, order = batch["attention_mask"].sum(1).cpu().sort(stable=True)
    elements = int(lengths.sum() + len(order) * prompts.shape[1]) * prompts.shape[2]
    chunks = max(1, round(elements / CHUNK_SIZE.get(prompts.device.type, 2**23)))
    P, total = prompts.unbind(), 0
    for rows in order.chunk(chunks):
        # Not prompts[owners]: on a CPU the gradient of that is summed in no fixed order.
        owners = task[rows]
        own = torch.stack([P[i] for i in owners])
        losses = model.loss(own, select(batch, rows), reduction="none")
        total = total + (losses / sizes[owners].to(losses.device)).sum()

    return total


def join(batches, pad_id):
    """Several batches as one, their rows in order, padded to the longest."""
    ids, masks, labels = [], [], []
    for batch in batches:
        ids += batch["input_ids"].unbind()
        masks += batch["attention_mask"].unbind()
        labels.append(batch["labels"])
    return {**pad(ids, masks, pad_id), "labels": torch.cat(labels)}


def pad(ids, masks, pad_id):
    """Rows of different lengths as one batch: input_ids [B, L] and attention_mask [B, L]."""
    padded = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": padded(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": padded(masks, batch_first=True),
    }


def select(batch, rows):
    """Some rows of a batch, without the padding that only the others needed."""
    part = {name: values[rows] for name, values in batch.items()}
    length = int(part["attention_mask"].sum(1).max())
    for name in ("input_ids", "attention_mask"):
        part[name] = part[name][:, :length]
    return part


class CrossAttention(T5Attention):
    """T5's cross-attention, its products in another order: q (E K)ᵀ is (q Kᵀ) Eᵀ, and a (E V) is
    (a E) V. There are two queries q and more than a hundred states E of the encoder, so that the
    projections cost next to nothing in this order; in the usual one they are a seventh of T5's
    work. At t5-small's shape it takes a tenth off a step."""

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, **kwargs
    ):
        E = key_value_states
        K = self.k.weight.unflatten(0, (self.n_heads, -1))  # [heads, d_kv, d_model]
        V = self.v.weight.unflatten(0, (self.n_heads, -1))
        q = self.q(hidden_states).unflatten(-1, (self.n_heads, -1))
        q = torch.einsum("bqhk,hkd->bhqd", q, K)
        scores = (q.flatten(1, 2) @ E.mT).unflatten(1, (self.n_heads, -1))
        if mask is not None and mask.dtype == torch.bool:  # as transformers makes it for SDPA
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask

        a = F.dropout(scores.softmax(-1), self.dropout, self.training)
        a = (a.flatten(1, 2) @ E).unflatten(1, (self.n_heads, -1))
        return self.o(torch.einsum("bhqd,hkd->bqhk", a, V).flatten(2)), position_bias, None


# ----------------------------------------------- Appendix A: what every training loop here shares


def linear_schedule(step, total, warmup=20):
    """The learning rate's factor at a step of Appendix A's linear scheduler: up over `warmup`
    steps, then down to 0 at `total`."""
    return min((step + 1) / warmup, (total - step) / max(1, total - warmup))


def best_of(scores):
    """The index of the best validation in a list of them: by accuracy, then by lower loss, then
    the earlier. One whose loss is not finite is never it; None where none is finite."""
    finite = [i for i, score in enumerate(scores) if math.isfinite(score["loss"])]
    # Means of the same accuracies may differ in their last digit, and are a tie all the same.
    merit = lambda i: (round(scores[i]["accuracy"], 9), -scores[i]["loss"])
    return max(finite, key=merit, default=None)


def out_of_patience(scores, patience, first=0):
    """Early stopping: whether `patience` validations have followed the best one, and the one of
    number `first`."""
    return len(scores) - 1 - max(best_of(scores) or 0, first) >= patience


# ----------------------------------------------------------------- Files, and errors of one line


def load_t5(name, device="cpu", dtype="float32"):
    """A T5, T5 v1.1, flan-t5 or LM-adapted T5 by hub name or folder, and its tokenizer. Reads
    safetensors only and runs no code that comes with a model. Raises InputError."""
    mend = "give a T5 by hub name or folder, with safetensors and tokenizer.json"
    with blame(name, mend, Exception):
        # A misspelt folder of one's own is not asked of the hub, which would take half a minute.
        parent = Path(name).parent
        own = str(name)[0] in "./" or (parent != Path() and parent.is_dir())
        if own and not Path(name).is_dir():
            raise ValueError("no such folder")
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "t5":
            raise ValueError(f"it is no T5 but {kind}")
        weights = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
        t5, found = T5ForConditionalGeneration.from_pretrained(name, **weights)
        check_complete(found)
        tokenizer = AutoTokenizer.from_pretrained(name)

    return t5.to(device), tokenizer


def check_complete(found, may_lack=lambda name: False):
    """Raises ValueError where transformers' loading info of a checkpoint names weights that it had
    to make up, but for those that `may_lack` allows, or that it had no use for."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [key[0] if isinstance(key, tuple) else key for key in found[kind]]
        names = sorted(name for name in names if not may_lack(name))
        if names:
            raise ValueError(f"{kind.split('_')[0]} weights: {names[0]}, {len(names)} in all")


def save_prompt(folder, prompt, base_model, /, **facts):
    """Writes a prompt [n, d_model] as a folder in PEFT's layout, and `facts` beside it as
    metapt.json. base_model is the T5 that it belongs to."""
    folder, config = Path(folder), base_model.config
    # A folder is recorded so that it is found from any other.
    name = config._name_or_path
    name = str(Path(name).resolve()) if name and Path(name).is_dir() else name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"prompt_embeddings": prompt.detach().float().cpu().contiguous()}
    write_beside(
        folder / "adapter_model.safetensors",
        lambda path: save_file(weights, path, {"format": "pt"}),
    )
    adapter = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": name,
        "num_virtual_tokens": len(prompt),
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,  # PEFT's own default is a prompt for the decoder too
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", adapter)
    write_json(folder / "metapt.json", facts)


def load_prompt(folder, width=None):
    """The prompt [n, d_model] in a folder that save_prompt or PEFT wrote, and its facts: those of
    metapt.json where there is one, and `base_model`. Raises InputError, also where d_model is not
    `width`."""
    folder, mend = Path(folder), "give a folder that train_meta.py or PEFT wrote"
    if not (folder / "adapter_model.safetensors").exists() and any(folder.glob("adapter_model.*")):
        mend = "save it again with safe_serialization=True: no pickle is read"
        raise InputError(f"{folder}: it has no adapter_model.safetensors; {mend}")
    config = read_json(folder / "adapter_config.json", mend)
    has_facts = (folder / "metapt.json").exists()
    facts = read_json(folder / "metapt.json", mend) if has_facts else {}

    with blame(folder, mend, Exception):  # safetensors raises all kinds
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            prompt = file.get_tensor("prompt_embeddings")
        shaped = prompt.dim() == 2 and prompt.numel() > 0 and prompt.is_floating_point()
        if config.get("peft_type") != "PROMPT_TUNING" or not shaped:
            raise ValueError("not a soft prompt of shape [n, d_model]")
        if not prompt.isfinite().all():
            raise ValueError("its numbers are not finite")
        for name in ("arguments", "settings", "digests"):
            if not isinstance(facts.get(name, {}), dict):
                raise ValueError(f"its metapt.json holds no {name}")
        if config.get("num_transformer_submodules", 1) != 1:
            raise ValueError("it has a part for the decoder: train it without")
        if config.get("num_virtual_tokens", len(prompt)) != len(prompt):
            vectors = f"{config['num_virtual_tokens']} vectors, and {len(prompt)} are there"
            raise ValueError(f"its adapter_config.json says {vectors}")

    base = config.get("base_model_name_or_path")
    if width and prompt.shape[1] != width:
        raise InputError(
            f"{folder}: a prompt of width {prompt.shape[1]} for {base}; this model needs {width}"
        )

    return prompt.float(), {**facts, "base_model": base}


@contextmanager
def blame(what, mend, *also):
    """Turns what a broken `what` (a file, say, or a function that names it at the time) makes a
    reader raise into an InputError of one line that names it and ends in `mend`. Our own mistakes,
    a TypeError say, stay what they are, unless `also` lists them, as where a library may raise
    anything."""
    try:
        yield
    except InputError:  # which names its file already
        raise
    except (OSError, ValueError, LookupError, EOFError, SafetensorError, *also) as error:
        name = what() if callable(what) else what
        raise InputError(f"{name}: {first_line(error)}; {mend}") from error


def first_line(error):
    """What an exception says, without the file's name that an OSError repeats."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    return text.splitlines()[0]


def write_beside(path, write):
    """Has `write` fill a file beside `path`, and renames it once it is on the disk: `path` is
    whole or not there, however the process ends. Raises InputError where it cannot be written."""
    beside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        write(beside)
        with open(beside, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        mend = "mend that and give the same command again"
        raise InputError(f"{path}: cannot be written: {first_line(error)}; {mend}")
    finally:
        with suppress(OSError):
            beside.unlink()


def parse_json(text):
    """The value of a JSON text that need not be trusted. Raises ValueError."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply")
    # Half of a pair of surrogates is no character, and could not be written again.
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path, mend):
    """The object in a JSON file. Raises InputError, which ends in `mend`."""
    with blame(path, mend):
        value = parse_json(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"not a JSON object but a {type(value).__name__}")
    return value


def write_json(path, value):
    """Writes `value` as an indented JSON file."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8"))
