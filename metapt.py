"""
MetaPT: Learning a Better Initialization for Soft Prompts via Meta-Learning (Huang, Qian and Yu).

The method and the files that it needs. It takes torch and transformers (5.15 or newer), and can be
copied alone into another project. From top to bottom:

    Section 3             Task, PromptedT5: a frozen T5 reads [P; H(x)] and answers at the mask
    Equations 1 and 2     adapt, textbook_meta_gradient: the definition, as it is written
    The same, faster      meta_gradient, CrossAttention
    Appendix A            linear_schedule, best_of, out_of_patience: what every training loop shares
    Files                 load_t5, save_prompt, load_prompt; errors of one line

    task = Task("sst5", "{text}. It was {mask}", ["terrible", "bad", "okay", "good", "great"])
    model = PromptedT5(*load_t5("google-t5/t5-base"), task)
    prompt = model.init_prompt()
    supports = [model.encode(examples) for examples in m_examples_of_every_meta_task]
    queries = [model.encode(examples) for examples in m_others_of_every_meta_task]
    gradient, loss = meta_gradient(model, prompt, supports, queries, alpha=0.08)
    prompt = prompt - beta * gradient
"""

import hashlib
import json
import os
import re
import string
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

MASK = "<extra_id_0>"  # T5's first sentinel stands for the paper's <X>
NEW_WORD = "\u2581"  # how a sentencepiece that begins a word begins


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: what, and how to mend it."""


class Diverged(InputError):
    """A loss or a probability is not finite."""


# ------------------------------------------------------------- Section 3: the task as text, the T5


@dataclass(frozen=True)
class Task:
    """A classification task as text (Section 3): H(x) is `template` filled in, and the label y is
    the word z = words[y].

    `template` names {mask} once and any fields of an example: "{text}. It was {mask}", whose full
    stop is left out behind a text that ends in . ! or ?, or "{premise}? {mask}. {hypothesis}".
    Raises InputError where it does not, or where two words are the same.
    """

    name: str
    template: str
    words: list[str]

    def __post_init__(self):
        names = []
        with suppress(TypeError, ValueError):  # of another type, or of braces that do not close
            names = [name for _, name in self.parts() if name is not None]
        fits = names.count("mask") == 1 and "" not in names and len(names) > 1
        fits = fits and isinstance(self.words, list) and isinstance(self.name, str)
        fits = fits and {*map(type, self.words)} == {str} and "/" not in self.name
        if not fits or not 1 < len(set(self.words)) == len(self.words):
            raise InputError(
                f"task {self.name!r}: it needs a name without a slash, a template that holds "
                "{mask} once and a field of the examples, as '{text}. It was {mask}' does, and a "
                "list of two or more words, all different"
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

    def fill(self, example):
        """H(x) as text, <X> in it."""
        text = ""
        for words, name in self.parts():
            # The paper's "I like this movie. It was <X>": none behind the text's own . ! or ?
            text += words[1:] if words[:1] == "." and text.endswith((".", "!", "?")) else words
            if name == "mask":
                text = text.removesuffix(" ") + MASK  # a sentinel takes the space before it along
            elif name is not None:
                text += example[name].strip()
        return text

    @classmethod
    def load(cls, path):
        """The task in `path`, a task.json or a folder that holds one. Raises InputError."""
        path = Path(path) / "task.json" if Path(path).is_dir() else Path(path)
        with input_errors(path, 'write {"name": ..., "template": ..., "words": [...]}'):
            facts = read_json(path)
            task = cls(facts["name"], facts["template"], facts["words"])
        return task

    def save(self, folder):
        """Writes folder/task.json."""
        write_json(Path(folder) / "task.json", asdict(self))


class PromptedT5(torch.nn.Module):
    """A frozen T5 that reads a soft prompt P before the text, [P; H(x)], and answers at the mask
    (Section 3).

    t5: any T5ForConditionalGeneration. It is changed in place: its weights are frozen, and its
    dropout is off until someone calls train().
    tokenizer: its tokenizer. task: the Task.
    max_length: tokens of H(x) at most; the text is cut, never the template.
    faster: gives T5's cross-attention the class CrossAttention, which multiplies the same weights
    in another order and takes a tenth off a meta-step; with faster=False the T5 stays as it is.
    Raises InputError where a word of the task is not one piece of the tokenizer, or where model or
    tokenizer is no T5's.
    """

    def __init__(self, t5, tokenizer, task, max_length=256, faster=True):
        super().__init__()
        if not isinstance(t5, T5ForConditionalGeneration):
            raise InputError(f"{type(t5).__name__} is no T5ForConditionalGeneration; give a T5")

        self.t5 = t5.requires_grad_(False).eval()
        for block in t5.decoder.block if faster else ():
            attention = block.layer[1].EncDecAttention
            if {type(attention.k), type(attention.v)} == {torch.nn.Linear}:  # and no adapter
                attention.__class__ = CrossAttention

        self.tokenizer = tokenizer
        self.task = task
        self.max_length = max_length
        self.mask_id = tokenizer.convert_tokens_to_ids(MASK)
        kind = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__
        known = {self.mask_id, tokenizer.pad_token_id, tokenizer.eos_token_id}
        fits = len(tokenizer) <= t5.get_input_embeddings().num_embeddings
        if kind != "Unigram" or not fits or known & {None, tokenizer.unk_token_id}:
            raise InputError(
                f"the tokenizer of {t5.config._name_or_path} is not its T5's: no sentencepiece "
                f"Unigram with {MASK}, <pad> and </s>, or larger than the model; give its own"
            )

        special = {MASK, *tokenizer.all_special_tokens} - {tokenizer.unk_token}
        self.special = re.compile("|".join(map(re.escape, special)))
        word_ids = torch.tensor(self._ids_of_words())
        start_id = t5.config.decoder_start_token_id
        start_id = t5.config.pad_token_id if start_id is None else start_id
        decoder_ids = torch.tensor([[start_id, self.mask_id]])
        # Buffers, so that they lie beside the weights and no forward pass has to bring them there.
        self.register_buffer("word_ids", word_ids.to(t5.device), persistent=False)
        self.register_buffer("decoder_ids", decoder_ids.to(t5.device), persistent=False)

    def _ids_of_words(self):
        """The token id of each of the task's words. Raises InputError."""
        pieces = self.tokenizer(self.task.words, add_special_tokens=False).input_ids
        for word, ids in zip(self.task.words, pieces):
            if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id or pieces.count(ids) > 1:
                names = self.tokenizer.convert_ids_to_tokens(ids)
                problem = f"{word!r} is not one piece of its own of the tokenizer, but {names}"
                raise InputError(f"task {self.task.name}: {problem}; choose another word")
        return [ids[0] for ids in pieces]

    @property
    def device(self):
        return self.t5.device

    def no_prompt(self):
        """A prompt of no vectors, [0, d_model]."""
        return torch.zeros(0, self.t5.config.d_model, device=self.device)

    def init_prompt(self, n_tokens=100, seed=1):
        """A random prompt [n_tokens, d_model], float32: rows of the frozen embedding table."""
        generator = torch.Generator().manual_seed(seed)
        table = self.t5.get_input_embeddings().weight.detach().cpu()
        special = set(self.tokenizer.all_special_ids)
        words = torch.tensor([i for i in range(len(self.tokenizer)) if i not in special])
        rows = words[torch.randint(len(words), (n_tokens,), generator=generator)]
        return table[rows].float().to(self.device)

    def encode(self, examples):
        """H(x) of Section 3: examples (dicts with the template's fields and, where known, a
        `label`) as a batch: input_ids [B, L], attention_mask [B, L] and, where every example has
        one, labels [B]. It stays on the CPU until it is used. Raises InputError for a label without
        a word."""
        ids = [torch.tensor(row) for row in self._ids_of(examples)]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        if all("label" in example for example in examples):
            labels = [example["label"] for example in examples]
            if not set(labels) <= set(range(len(self.task.words))):
                raise InputError(f"labels {labels} are not all indices of {self.task.words}")
            batch["labels"] = torch.tensor(labels, dtype=torch.long)

        return batch

    def batches(self, examples, size=64):
        """Yields examples as encoded batches."""
        for start in range(0, len(examples), size):
            yield self.encode(examples[start : start + size])

    def forward(self, prompt, batch):
        """Section 3: [P; H(x)] -> logits at <X>, [B, vocabulary], in float32 or float64.

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
        the mean over the batch, their "sum", or with reduction="none" each example's. Raises
        InputError where an example has no label."""
        words = self.word_ids[labels_of(batch).to(self.device)]
        return F.cross_entropy(self(prompt, batch), words, reduction=reduction)

    @torch.no_grad()
    def probabilities(self, prompt, batch):
        """Each example's distribution over the task's words, [B, classes]. Raises Diverged."""
        probabilities = self(prompt, batch)[:, self.word_ids].softmax(-1)
        check_finite("a probability", probabilities)
        return probabilities

    def predict(self, prompt, batch):
        """The label of each example, [B]: the most probable of the task's words."""
        return self.probabilities(prompt, batch).argmax(-1)

    @torch.no_grad()
    def evaluate(self, prompt, batches):
        """Scores of labelled batches: `accuracy` (a share), mean `loss`, `in_words` (the share of
        examples whose most probable token of the whole vocabulary is a word of the task) and
        `confusion` (counts, [true][predicted]). Raises Diverged where a loss is not finite."""
        columns = []
        for batch in batches:
            logits = self(prompt, batch)
            labels = batch["labels"].to(self.device)
            predicted = logits[:, self.word_ids].argmax(-1)
            losses = F.cross_entropy(logits, self.word_ids[labels], reduction="none")
            in_words = torch.isin(logits.argmax(-1), self.word_ids)
            columns.append(torch.stack([labels, predicted, losses, in_words]))

        # All numbers in one transfer: the device is waited for once, not at every batch.
        labels, predicted, losses, in_words = torch.cat(columns, dim=1).cpu().double()
        check_finite("a validation or test loss", losses)
        classes = len(self.task.words)
        counts = torch.bincount((classes * labels + predicted).long(), minlength=classes**2)
        return {
            "accuracy": (labels == predicted).double().mean().item(),
            "loss": losses.mean().item(),
            "in_words": in_words.mean().item(),
            "confusion": counts.view(classes, classes).tolist(),
        }

    # How H(x) becomes token ids.

    def _ids_of(self, examples):
        """H(x) (Section 3) of every example as token ids, </s> behind it. Where that is longer than
        max_length the fields are cut first and then filled in: what is left of the text decides
        about the template's full stop."""
        filled = [self._fields_of(example) for example in examples]
        rows = self._tokenize([self.task.fill(fields) for fields in filled])
        for i, fields in enumerate(filled):
            while len(rows[i]) + 1 > self.max_length:
                fields = self._cut(fields, len(rows[i]) + 1 - self.max_length)
                (rows[i],) = self._tokenize([self.task.fill(fields)])
            rows[i].append(self.tokenizer.eos_token_id)
        return rows

    def _fields_of(self, example):
        """The template's fields without what would be read as special tokens: a text may spell
        </s>."""
        fields = {name: example[name] for name in self.task.fields}
        for name in fields:
            while self.special.search(fields[name]):  # what is left may spell one again
                fields[name] = self.special.sub("", fields[name])
        return fields

    def _tokenize(self, texts):
        """The token ids of texts with <X> in them. T5's tokenizer marks what stands behind <X> as
        the beginning of a word; the mark is taken off what touches it, as in "{mask}."."""
        rows = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        for ids, text in zip(rows, texts):
            behind = text.partition(MASK)[2]
            if behind and not behind[0].isspace():
                at = ids.index(self.mask_id) + 1
                name = self.tokenizer.convert_ids_to_tokens(ids[at]).removeprefix(NEW_WORD)
                unmarked = self.tokenizer.convert_tokens_to_ids(name) if name else None
                if unmarked != self.tokenizer.unk_token_id:  # there is such a piece
                    ids[at : at + 1] = [unmarked] if name else []
        return rows

    def _cut(self, fields, count):
        """The fields without `count` of their last pieces, each taken off the longest field. Raises
        InputError where so many are not there."""
        offsets = {}
        for name, text in fields.items():
            tokens = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
            offsets[name] = [start for start, end in tokens.offset_mapping if end > start]

        fields = dict(fields)
        for _ in range(count):
            longest = max(offsets, key=lambda name: len(offsets[name]))
            if not offsets[longest]:
                raise InputError(
                    f"the template of task {self.task.name} alone is longer than "
                    f"{self.max_length} tokens; raise max_length"
                )
            fields[longest] = fields[longest][: offsets[longest].pop()]
        return fields


def labels_of(batch):
    """The labels of an encoded batch, [B]. Raises InputError where an example has none."""
    if "labels" not in batch:
        raise InputError("an example of this batch has no label: give each one")
    return batch["labels"]


def check_finite(what, *tensors):
    """Raises Diverged where a number of the tensors is not finite."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise Diverged(
            f"{what} is not finite; lower the learning rate, or give another model or precision"
        )


# --------------------------------------------------------- Equations 1 and 2, as they are written


def adapt(model, prompt, support, alpha, create_graph=False):
    """Equation 1: one step of gradient descent on a meta-task's m support examples.

    prompt [n, d] and an encoded batch give P'_i [n, d]. With create_graph the step can itself be
    differentiated, which Equation 2 does. adapt_all is the same for several tasks at once.
    """
    P = prompt if prompt.requires_grad else prompt.detach().requires_grad_()
    with twice_differentiable(create_graph):
        loss = model.loss(P, support)
        (gradient,) = torch.autograd.grad(loss, P, create_graph=create_graph)
    return P - alpha * gradient  # P'_i = P - α ∇_P L_Ti(f_P)


def textbook_meta_gradient(model, prompt, supports, queries, alpha):
    """Equation 2's gradient ∇_P Σ_Ti L_Ti(f_P'_i), where every P'_i is a function of P: the
    definition.

    prompt [n, d]; supports and queries: an encoded batch for each task. Returns the gradient [n, d]
    and the summed query loss, both detached.
    """
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


def meta_gradient(model, prompt, supports, queries, alpha, first_order=False, tasks_per_pass=4):
    """Equation 2's gradient, exact to the second order: what textbook_meta_gradient gives.

    first_order treats ∇_P L_Ti(f_P) as a constant, which drops the Hessian. tasks_per_pass tasks
    are worked on at once, which bounds the memory, and moves the result by rounding alone. Raises
    InputError where there are not as many supports as queries.
    """
    tasks = len(supports)
    if len(queries) != tasks:
        raise InputError(f"{tasks} supports and {len(queries)} queries: a task has one of each")

    gradient = torch.zeros_like(prompt)
    total = prompt.new_zeros(())
    for start in range(0, tasks, tasks_per_pass):
        in_pass = slice(start, start + tasks_per_pass)
        # A copy of P for every task: gradients with respect to the copies are the tasks' own.
        P = prompt.detach().repeat(len(supports[in_pass]), 1, 1).requires_grad_()
        adapted = adapt_all(model, P, supports[in_pass], alpha, create_graph=not first_order)
        loss = summed_loss(model, adapted, queries[in_pass])
        (per_task,) = torch.autograd.grad(loss, P)  # through P'_i, and Equation 1's gradient in it
        gradient += per_task.sum(0)
        total += loss.detach()

    return gradient, total


def adapt_all(model, prompts, supports, alpha, create_graph=False):
    """Equation 1 for every task at once: prompts [T, n, d] and T batches give P'_1 to P'_T."""
    if alpha == 0:  # no inner step
        return prompts
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
    batch = join(batches)
    sizes = torch.tensor([len(labels_of(one)) for one in batches])
    task = torch.arange(len(batches)).repeat_interleave(sizes)  # of each example

    lengths, order = batch["attention_mask"].sum(1).cpu().sort(stable=True)
    elements = int(lengths.sum() + len(order) * prompts.shape[1]) * prompts.shape[2]
    chunks = max(1, round(elements / CHUNK_SIZE.get(prompts.device.type, 2**23)))
    prompt_of = prompts.unbind()
    total = 0
    for rows in order.chunk(chunks):
        # Not prompts[owners]: on a CPU the gradient of that is summed in no fixed order.
        owners = task[rows]
        own = torch.stack([prompt_of[i] for i in owners])
        losses = model.loss(own, select(batch, rows), reduction="none")
        total = total + (losses / sizes[owners].to(losses.device)).sum()

    return total


def join(batches):
    """Several batches as one, their rows in order, padded to the longest."""
    joined = {"labels": torch.cat([labels_of(batch) for batch in batches])}
    for name in ("input_ids", "attention_mask"):
        rows = []
        for batch in batches:
            rows += batch[name].unbind()
        joined[name] = pad_sequence(rows, batch_first=True)
    return joined


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
        """What T5Attention's gives: the output [B, 2, d_model], the position bias, no weights."""
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
    """The index of the best validation (Appendix A) in a list of them: by accuracy, then by lower
    loss, then the earlier; None where there is none."""
    # Means of the same accuracies may differ in their last digit, and are a tie all the same.
    merit = lambda i: (round(scores[i]["accuracy"], 9), -scores[i]["loss"])
    return max(range(len(scores)), key=merit, default=None)


def out_of_patience(scores, patience, first=0):
    """Appendix A's early stopping: whether `patience` validations have come since the best one, or
    since that of number `first`, if that is later."""
    return len(scores) - 1 - max(best_of(scores) or 0, first) >= patience


# ----------------------------------------------------------------- Files, and errors of one line


def load_t5(name, device="cpu", dtype="float32"):
    """A T5, T5 v1.1, flan-t5 or LM-adapted T5 by hub name or folder, and its tokenizer. Reads
    safetensors only and runs no code that comes with a model. Raises InputError."""
    hint = "give a T5 by hub name or folder, with safetensors and tokenizer.json"
    with input_errors(name, hint):
        # A misspelt folder of one's own is not asked of the hub, which would take half a minute.
        if "/" in str(name) and Path(name).parent.is_dir() and not Path(name).is_dir():
            raise ValueError("no such folder")
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "t5":
            raise ValueError(f"it is no T5 but {kind}")
        options = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
        t5, loading_info = T5ForConditionalGeneration.from_pretrained(name, **options)
        check_complete(loading_info)
        tokenizer = AutoTokenizer.from_pretrained(name)

    return t5.to(device), tokenizer


def check_complete(loading_info, may_lack=lambda name: False):
    """Raises ValueError where transformers' loading info of a checkpoint names weights that it had
    to make up, but for those that `may_lack` allows, or that it had no use for."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [key[0] if isinstance(key, tuple) else key for key in loading_info[kind]]
        names = sorted(name for name in names if not may_lack(name))
        if names:
            raise ValueError(f"{kind.split('_')[0]} weights: {names[0]}, {len(names)} in all")


def save_prompt(folder, prompt, base_model, /, **facts):
    """Writes a prompt [n, d_model] as a folder in PEFT's layout, and last `facts` beside it as
    metapt.json. base_model is the T5 that it belongs to."""
    folder = Path(folder)
    config = base_model.config
    # A folder is recorded so that it is found from any other.
    name = config._name_or_path
    name = str(Path(name).resolve()) if name and Path(name).is_dir() else name
    weights = save(
        {"prompt_embeddings": prompt.detach().float().cpu().contiguous()}, {"format": "pt"}
    )
    write_atomically(folder / "adapter_model.safetensors", lambda file: file.write(weights))
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
    write_json(folder / "metapt.json", {**facts, "weights": digest(weights)})


def load_prompt(folder, width=None):
    """The prompt [n, d_model] in a folder that save_prompt or PEFT wrote, and its facts: those of
    metapt.json where there is one, `weights`, the digest of the prompt's file, and `base_model`.
    Raises InputError, also where d_model is not `width`."""
    folder = Path(folder)
    with input_errors(folder, "give a folder that save_prompt or PEFT wrote, as safetensors"):
        config = read_json(folder / "adapter_config.json")
        content = (folder / "adapter_model.safetensors").read_bytes()
        prompt = load(content)["prompt_embeddings"]
        if config.get("peft_type") != "PROMPT_TUNING" or prompt.dim() != 2 or not prompt.numel():
            raise ValueError("not a soft prompt of shape [n, d_model]")
        if config.get("num_transformer_submodules", 1) != 1:
            raise ValueError("num_transformer_submodules must be 1 in its adapter_config.json")
        if not prompt.isfinite().all():
            raise ValueError("its numbers are not finite")

    facts = {"weights": digest(content)}
    if (folder / "metapt.json").exists():
        facts = read_json(folder / "metapt.json")
        if facts.get("weights") != digest(content):
            raise InputError(
                f"{folder}: its metapt.json is of other weights, or of an earlier version; make "
                "the prompt again, or remove metapt.json to take it for one of PEFT's"
            )

    base = config.get("base_model_name_or_path")
    if width and prompt.shape[1] != width:
        raise InputError(
            f"{folder}: a prompt of width {prompt.shape[1]} for {base}; this model needs {width}"
        )
    return prompt.float(), {**facts, "base_model": base}


def digest(value):
    """The first 16 digits of the SHA-256 of bytes, of a file (a Path), or of any other value's JSON
    in its canonical form, the keys sorted."""
    if isinstance(value, Path):
        with open(value, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


@contextmanager
def input_errors(source, hint):
    """Turns whatever a broken `source`, a file, say, makes its reader raise into an InputError of
    one line that names it and ends in the hint."""
    try:
        yield
    except InputError as error:
        prefix = "" if str(source) in str(error) else f"{source}: "
        raise type(error)(f"{prefix}{error}") from error
    except Exception as error:  # the libraries that read it raise all kinds
        raise InputError(f"{source}: {first_line(error)}; {hint}") from error


def first_line(error):
    """What an exception says, without the file's name that an OSError repeats."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    return text.splitlines()[0]


def write_atomically(path, write):
    """Has `write` fill an open binary file beside `path`, and renames it once it is on the disk:
    `path` is whole or not there, however the process ends. Makes its folder; follows a link. Raises
    InputError where it cannot be written."""
    place = Path(path).resolve()
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, place)
    except OSError as error:
        hint = "mend that and give the same command again"
        raise InputError(f"{path}: cannot be written: {first_line(error)}; {hint}") from error
    finally:
        with suppress(OSError):
            beside.unlink()


def read_json(path):
    """The object in a JSON file. Raises InputError."""
    with input_errors(path, "give a whole file of JSON"):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"not a JSON object but a {type(value).__name__}")
    return value


def write_json(path, value):
    """Writes `value` as an indented JSON file."""
    content = json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
    write_atomically(path, lambda file: file.write(content))
