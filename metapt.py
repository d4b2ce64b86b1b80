"""
MetaPT: Learning a Better Initialization for Soft Prompts via Meta-Learning (Huang, Qian and Yu).

The method and nothing else; it needs torch and transformers, and can be copied alone into another project.
In the paper's order: a task's template and words (Section 3), the frozen T5 that reads [P; H(x)] (Section 3),
one step of adaptation to a meta-task (Equation 1), the meta-gradient over all meta-tasks (Equation 2), and the
prompt as a file.

    task = Task("sst5", "{text} It was {mask}", ["terrible", "bad", "okay", "good", "great"])
    model = PromptedT5(*load_t5("google-t5/t5-base"), task)
    prompt = model.init_prompt()
    supports = [model.encode(examples) for examples in m_examples_of_every_meta_task]
    queries = [model.encode(examples) for examples in m_others_of_every_meta_task]
    gradient, loss = meta_gradient(model, prompt, supports, queries, alpha=0.08)
    prompt = prompt - beta * gradient
"""

import json
import os
import string
from contextlib import nullcontext, suppress
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
PASS_SIZE = {"cpu": 2**19, "cuda": 2**23}  # elements (examples × length × d_model) that keep a device busy in one pass


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line that names it and says how to mend it."""


@dataclass(frozen=True)
class Task:
    """A classification task as text (Section 3): H(x) is `template` filled in, and label y is the word z = words[y].

    `template` names {mask} once and any fields: "{text} It was {mask}", "{premise}? {mask}. {hypothesis}".
    Raises InputError where it does not, or where two words are the same.
    """

    name: str
    template: str
    words: list[str]

    def __post_init__(self):
        texts = [self.name, self.template, *self.words] if isinstance(self.words, list) else [None]
        if not all(isinstance(text, str) for text in texts) or "/" in self.name:
            raise InputError(f"task {self.name}: the name (without a slash), the template and each of a list of words "
                             "must be strings")
        try:
            names = [name for _, name, *_ in string.Formatter().parse(self.template) if name is not None]
        except ValueError as error:
            raise InputError(f"task {self.name}: the template {self.template!r} cannot be read: {error}")
        if names.count("mask") != 1 or "" in names or len(names) < 2:
            raise InputError(f"task {self.name}: the template {self.template!r} must hold {{mask}} once and a field "
                             "of the examples, as '{text} It was {mask}' does")
        if len(self.words) < 2 or len(set(self.words)) < len(self.words):
            raise InputError(f"task {self.name}: the words {self.words} must be two or more, all different")

    @property
    def fields(self):
        """The keys of an example that the template reads."""
        return [name for _, name, *_ in string.Formatter().parse(self.template) if name and name != "mask"]

    @classmethod
    def load(cls, path):
        """The task in `path`, a task.json or a folder that holds one. Raises InputError."""
        path = Path(path) / "task.json" if Path(path).is_dir() else Path(path)
        form = '{"name": ..., "template": ..., "words": [...]}'
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; give a folder with a task.json, {form}")
        facts = read_json(path, f"write {form}")
        try:
            return cls(facts["name"], facts["template"], facts["words"])
        except (KeyError, InputError) as error:
            raise InputError(f"{path}: not a task: {error}; write {form}")

    def save(self, folder):
        """Writes folder/task.json."""
        write_json(Path(folder) / "task.json", {"name": self.name, "template": self.template, "words": self.words})


class PromptedT5(torch.nn.Module):
    """A frozen T5 that reads a soft prompt P before the text, [P; H(x)], and answers at the mask (Section 3).

    t5: any T5ForConditionalGeneration; its weights are frozen, its dropout is turned off and its cross-attention
    is exchanged for one that multiplies in another order.
    tokenizer: its tokenizer. task: the Task. max_length: tokens of H(x) at most; the text is cut, never the template.
    Raises InputError where a word of the task is not one piece of the tokenizer, or model or tokenizer is no T5's.
    """

    def __init__(self, t5, tokenizer, task, max_length=256):
        super().__init__()
        if not isinstance(t5, T5ForConditionalGeneration):
            raise InputError(f"{type(t5).__name__} is no T5ForConditionalGeneration; choose a T5 model")
        self.t5 = t5.requires_grad_(False).eval()
        for block in t5.decoder.block:
            block.layer[1].EncDecAttention.__class__ = CrossAttention
        self.tokenizer, self.task, self.max_length = tokenizer, task, max_length
        self.mask_id = tokenizer.convert_tokens_to_ids(MASK)
        if (self.mask_id in (None, tokenizer.unk_token_id) or None in (tokenizer.pad_token_id, tokenizer.eos_token_id)
                or len(tokenizer) > t5.get_input_embeddings().num_embeddings):
            raise InputError(f"the tokenizer of {t5.config._name_or_path} has no {MASK}, no <pad> or no </s>, or more "
                             "pieces than the model knows; choose the model's own")
        self.special_ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        pieces = [self._pieces(word) for word in task.words]
        for word, ids in zip(task.words, pieces):
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id or pieces.count(ids) > 1:
                raise InputError(f"task {task.name}: the word {word!r} is not one piece of the tokenizer, its own, but "
                                 f"{tokenizer.convert_ids_to_tokens(ids)}; choose another word")
        self.word_ids = torch.tensor(pieces)[:, 0]
        decoder_start = t5.config.decoder_start_token_id
        self.decoder_ids = torch.tensor([[t5.config.pad_token_id if decoder_start is None else decoder_start,
                                          self.mask_id]])

    @property
    def device(self):
        return self.t5.device

    def init_prompt(self, n_tokens=100, seed=1, init="vocab"):
        """A random prompt [n_tokens, d_model], float32: rows of the embedding table (`vocab`), or `normal` noise as
        large as they are."""
        generator = torch.Generator().manual_seed(seed)
        table = self.t5.get_input_embeddings().weight.detach().cpu()
        if init == "normal":
            prompt = torch.randn(n_tokens, table.shape[1], generator=generator) * table.float().std()
        else:
            special = self.special_ids | {self.tokenizer.unk_token_id}
            rows = torch.tensor([i for i in range(min(len(self.tokenizer), len(table))) if i not in special])
            prompt = table[rows[torch.randint(len(rows), (n_tokens,), generator=generator)]]
        return prompt.float().to(self.device)

    def _pieces(self, text, before=" "):
        """Token ids of `text`. Where no space parts it from what stands before it, as the full stop in "{mask}.", its
        first piece loses the mark of a new word, which the tokenizer puts before any text that it is given alone."""
        ids = self.tokenizer(text.strip(), add_special_tokens=False).input_ids
        ids = [i for i in ids if i not in self.special_ids]  # a text that spells </s> holds no such token
        if ids and not before[-1].isspace() and not text[0].isspace():
            piece = self.tokenizer.convert_ids_to_tokens(ids[0]).removeprefix(NEW_WORD)
            inner = self.tokenizer.convert_tokens_to_ids(piece) if piece else None
            ids = ids[1:] if inner is None else ids if inner == self.tokenizer.unk_token_id else [inner] + ids[1:]
        return ids

    def _fill(self, example):
        """H(x) (Section 3) as token ids: the template around the example's fields, then </s>. Where that is longer
        than max_length, the longest field loses its end, never the template."""
        parts, fields, before = [], [], " "
        for literal, name, *_ in string.Formatter().parse(self.task.template):
            if literal:
                parts.append(self._pieces(literal, before))
                before = literal
            if name == "mask":
                parts.append([self.mask_id])
                before = MASK
            elif name and example[name]:
                fields.append(self._pieces(example[name], before))
                parts.append(fields[-1])
                before = example[name]
        while sum(map(len, parts)) + 1 > self.max_length:
            if not any(fields):
                raise InputError(f"the template of task {self.task.name} alone is longer than {self.max_length} tokens")
            max(fields, key=len).pop()
        return sum(parts, []) + [self.tokenizer.eos_token_id]

    def encode(self, examples):
        """Examples (dicts with the template's fields and, where known, a `label`) as a batch: input_ids [B, L],
        attention_mask [B, L] and, where every example has one, labels [B]. Kept on the CPU until used. Raises
        InputError for a label that is no index into the task's words."""
        texts = [torch.tensor(self._fill(example)) for example in examples]
        batch = pad([(ids, torch.ones_like(ids)) for ids in texts], self.tokenizer.pad_token_id)
        if all("label" in example for example in examples):
            batch["labels"] = torch.tensor([example["label"] for example in examples])
            if not set(batch["labels"].tolist()) <= set(range(len(self.task.words))):
                raise InputError(f"labels {batch['labels'].tolist()} are not all indices of {self.task.words}")
        return batch

    def forward(self, prompt, batch):
        """[P; H(x)] -> logits at <X>, [B, vocabulary]. prompt: [n, d], or [B, n, d] with one for each example;
        an empty prompt [0, d] is none at all."""
        text = self.t5.get_input_embeddings()(batch["input_ids"].to(self.device))
        P = prompt.to(text.dtype).expand(len(text), -1, -1)
        mask = None  # where nothing is padded
        if not batch["attention_mask"].all():
            mask = F.pad(batch["attention_mask"], (P.shape[1], 0), value=1).to(self.device)
        answer = self.t5(inputs_embeds=torch.cat([P, text], dim=1), attention_mask=mask, use_cache=False,
                         decoder_input_ids=self.decoder_ids.expand(len(text), -1).to(self.device))
        return answer.logits[:, 1]  # position 0 answers with <X> itself, position 1 with what it stands for

    def loss(self, prompt, batch, reduction="mean"):
        """-log p(<X> = z | [P; H(x)]; P), the objective of Section 3: over the whole vocabulary, the mean over the
        batch, or each example's with reduction="none"."""
        words = self.word_ids[batch["labels"]].to(self.device)
        return F.cross_entropy(at_least_float32(self(prompt, batch)), words, reduction=reduction)

    def probabilities(self, prompt, batch):
        """Each example's distribution over the task's words, [B, classes]."""
        with torch.no_grad():
            return at_least_float32(self(prompt, batch))[:, self.word_ids.to(self.device)].softmax(-1)

    def predict(self, prompt, batch):
        """The label of each example, [B]: the most probable of the task's words."""
        return self.probabilities(prompt, batch).argmax(-1)

    @torch.no_grad()
    def evaluate(self, prompt, batches):
        """Scores of labelled batches: `accuracy` (a share), mean `loss`, `in_words` (the share of examples whose most
        probable token of the whole vocabulary is a word of the task) and `confusion` (counts, [true][predicted])."""
        classes = len(self.task.words)
        confusion, loss, in_words = torch.zeros(classes, classes, dtype=torch.long), 0.0, 0
        for batch in batches:
            logits = at_least_float32(self(prompt, batch)).cpu()
            pairs = batch["labels"] * classes + logits[:, self.word_ids].argmax(-1)
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
            loss += F.cross_entropy(logits, self.word_ids[batch["labels"]], reduction="sum").item()
            in_words += torch.isin(logits.argmax(-1), self.word_ids).sum().item()
        total = confusion.sum().item()
        return {"accuracy": confusion.trace().item() / total, "loss": loss / total, "in_words": in_words / total,
                "confusion": confusion.tolist()}


class CrossAttention(T5Attention):
    """T5's cross-attention, its products in another order: q (E K)ᵀ is (q Kᵀ) Eᵀ, and a (E V) is (a E) V. There are two
    queries q and more than a hundred states E of the encoder, so the projections cost next to nothing in this order;
    in the usual one they are a seventh of T5's work."""

    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, **kwargs):
        E = key_value_states
        K, V = (linear.weight.unflatten(0, (self.n_heads, -1)) for linear in (self.k, self.v))  # [heads, d_kv, d_model]
        q = torch.einsum("bqhk,hkd->bhqd", self.q(hidden_states).unflatten(-1, (self.n_heads, -1)), K)
        scores = (q.flatten(1, 2) @ E.mT).unflatten(1, (self.n_heads, -1))
        if mask is not None:  # of booleans, or under "eager" attention of numbers to add
            boolean = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if boolean else scores + mask
        a = F.dropout(scores.softmax(-1), self.dropout, self.training)
        a = (a.flatten(1, 2) @ E).unflatten(1, (self.n_heads, -1))
        return self.o(torch.einsum("bhqd,hkd->bqhk", a, V).flatten(2)), position_bias, None


def adapt(model, prompt, support, alpha, create_graph=False):
    """Equation 1: one step of gradient descent on a meta-task's support examples.

    prompt [n, d] with support one batch gives P'_i [n, d]; stacked prompts [T, n, d] with support a list of T
    batches take every task's step in one pass. With create_graph the step can itself be differentiated.
    """
    if prompt.dim() == 2:
        return adapt(model, prompt[None], [support], alpha, create_graph)[0]
    P = prompt if prompt.requires_grad else prompt.detach().requires_grad_()
    # Fused attention has no second derivative; its plain form has, and costs what "eager" attention does.
    with sdpa_kernel(SDPBackend.MATH) if create_graph else nullcontext():
        gradient, = torch.autograd.grad(summed_loss(model, P, support), P, create_graph=create_graph)
    return P - alpha * gradient  # P'_i = P - α ∇_P L_Ti(f_P)


def meta_gradient(model, prompt, supports, queries, alpha, first_order=False, tasks_per_pass=None):
    """Equation 2's gradient, exact to the second order: ∇_P Σ_Ti L_Ti(f_P'_i), where every P'_i is a function of P.

    prompt [n, d]; supports and queries: one encoded batch a task. first_order treats ∇_P L_Ti(f_P) as a constant,
    which drops the Hessian. tasks_per_pass tasks share a forward pass (default: all), which bounds the memory and
    changes nothing else. Returns the gradient [n, d] and the summed query loss, both detached. Raises InputError where
    there are not as many supports as queries.
    """
    tasks = len(supports)
    if len(queries) != tasks:
        raise InputError(f"{tasks} supports and {len(queries)} queries: every task has one of each")
    gradient, total = torch.zeros_like(prompt), prompt.new_zeros(())
    for start in range(0, tasks, tasks_per_pass or tasks or 1):
        chunk = slice(start, start + (tasks_per_pass or tasks))
        # A copy of P for every task: gradients with respect to the copies are the tasks' own, never mixed.
        P = prompt.detach().repeat(len(supports[chunk]), 1, 1).requires_grad_()
        adapted = adapt(model, P, supports[chunk], alpha, create_graph=not first_order)
        loss = summed_loss(model, adapted, queries[chunk])
        per_task, = torch.autograd.grad(loss, P)  # through P'_i, so through the gradient in Equation 1
        gradient += per_task.sum(0)
        total = total + loss.detach()
    return gradient, total


def summed_loss(model, prompts, batches):
    """Σ_i L_Ti(f_Pi): prompts [T, n, d], batches a list of T, each example with its own task's prompt. The mean is over
    each task's examples and the sum over tasks: so no task's step depends on the others. Tasks share forward passes
    whose examples are of about one length, since padding is work thrown away."""
    batch = batches[0] if len(batches) == 1 else join(batches, model.tokenizer.pad_token_id)
    sizes = torch.tensor([len(batch["labels"]) for batch in batches])
    task = torch.arange(len(batches)).repeat_interleave(sizes)
    lengths, order = batch["attention_mask"].sum(1).sort(stable=True)
    width = (int(lengths[-1]) + prompts.shape[1]) * prompts.shape[2]
    P, total = prompts.unbind(), 0
    for rows in order.split(max(1, PASS_SIZE.get(prompts.device.type, 2**23) // width)):
        losses = model.loss(torch.stack([P[i] for i in task[rows]]), select(batch, rows), reduction="none")
        total = total + (losses / sizes[task[rows]].to(losses.device)).sum()
    return total


def pad(rows, pad_id):
    """[(token ids, mask)] of different lengths as one batch: input_ids [B, L] and attention_mask [B, L]."""
    ids, mask = zip(*rows)
    return {"input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_id),
            "attention_mask": torch.nn.utils.rnn.pad_sequence(mask, batch_first=True)}


def join(batches, pad_id):
    """Several batches as one, their rows in order, padded to the longest."""
    rows = [row for batch in batches for row in zip(batch["input_ids"], batch["attention_mask"])]
    return {**pad(rows, pad_id), "labels": torch.cat([batch["labels"] for batch in batches])}


def select(batch, rows):
    """Some rows of a batch, without the padding that only the others needed."""
    part = {name: values[rows] for name, values in batch.items()}
    length = int(part["attention_mask"].sum(1).max())
    return {name: values[:, :length] if values.dim() == 2 else values for name, values in part.items()}


def at_least_float32(logits):
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def load_t5(name, device="cpu", dtype="float32"):
    """A T5, T5 v1.1, flan-t5 or LM-adapted T5 by hub name or folder, and its tokenizer. Reads safetensors only and
    runs no code that comes with a model. Raises InputError."""
    try:
        if str(name)[0] in "./" and not Path(name).is_dir():
            raise ValueError("no such folder")
        kind = AutoConfig.from_pretrained(name).model_type
        if kind != "t5":
            raise ValueError(f"it is no T5 but {kind}; choose one, as google-t5/t5-base")
        t5 = T5ForConditionalGeneration.from_pretrained(name, use_safetensors=True, dtype=getattr(torch, dtype))
        return t5.to(device), AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises all kinds
        raise InputError(f"{name}: cannot be loaded as a T5: {first_line(error)}")


def save_prompt(folder, prompt, base_model, /, **facts):
    """Writes a prompt [n, d_model] as a folder in PEFT's layout, and `facts` beside it as metapt.json. base_model is
    the T5 it belongs to."""
    folder, config = Path(folder), base_model.config
    folder.mkdir(parents=True, exist_ok=True)
    weights = {"prompt_embeddings": prompt.detach().float().cpu().contiguous()}
    write_beside(folder / "adapter_model.safetensors", lambda path: save_file(weights, path, {"format": "pt"}))
    write_json(folder / "adapter_config.json", {
        "peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM", "base_model_name_or_path": config._name_or_path,
        "num_virtual_tokens": len(prompt), "token_dim": prompt.shape[1], "num_transformer_submodules": 1,
        "num_layers": config.num_layers, "num_attention_heads": config.num_heads, "inference_mode": True})
    write_json(folder / "metapt.json", facts)


def load_prompt(folder, width=None):
    """The prompt [n, d_model] in a folder that save_prompt or PEFT wrote, and its facts: those of metapt.json where
    there is one, and `base_model`. Raises InputError, also where d_model is not `width`."""
    folder, mend = Path(folder), "give a folder that train_meta.py or PEFT wrote"
    config = read_json(folder / "adapter_config.json", mend)
    facts = read_json(folder / "metapt.json", mend) if (folder / "metapt.json").exists() else {}
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            prompt = file.get_tensor("prompt_embeddings")
        if (config.get("peft_type") != "PROMPT_TUNING" or prompt.dim() != 2 or not prompt.numel()
                or not prompt.is_floating_point() or not prompt.isfinite().all()
                or not isinstance(facts.get("arguments", {}), dict)):
            raise ValueError("no soft prompt of shape [n, d_model] with finite numbers")
        if config.get("num_transformer_submodules", 1) != 1:
            raise ValueError("it has a part for the decoder; train it with num_transformer_submodules=1")
    except Exception as error:  # safetensors raises all kinds
        raise InputError(f"{folder}: not a prompt: {first_line(error)}; {mend}")
    if width and prompt.shape[1] != width:
        raise InputError(f"{folder}: a prompt of width {prompt.shape[1]} for {config.get('base_model_name_or_path')}; "
                         f"this model needs {width}")
    return prompt.float(), {**facts, "base_model": config.get("base_model_name_or_path")}


def write_beside(path, write):
    """Has `write` fill a file beside `path` and renames it, so that `path` is never half-written. Raises OSError."""
    beside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {first_line(error)}; mend that and give the same command again")
    finally:
        with suppress(OSError):
            beside.unlink()


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_json(text):
    """The value of a JSON text that need not be trusted. Raises ValueError."""
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:  # half of such a pair is no character, and could not be written again
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("nested too deeply")


def read_json(path, mend):
    """The object in a JSON file. Raises InputError, which ends in `mend`."""
    try:
        value = parse_json(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, dict):
            raise ValueError(f"it is a {type(value).__name__}")
        return value
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a JSON object: {error}; {mend}")


def write_json(path, value):
    """Writes `value` as an indented JSON file."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_beside(path, lambda beside: beside.write_text(text, encoding="utf-8"))
