"""The sanity checks of this folder: the demo, the small T5, the study on real text."""

import io
import json
import re
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import data
import demo
import inner_step
import metapt
import real
import small_t5
import study
import study_numbers
import train_meta
from metapt import InputError, PromptedT5, Task

SENTIMENT = Task("sentiment", data.TEMPLATE, data.WORDS[5])


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The demo, its T5 hardly trained, in a folder with a space in its name; and an eleventh of
    its corpus as a task."""
    folder = demo.demo(tmp_path_factory.mktemp("world") / "a demo", steps=3)
    corpus = read_lines(folder / "corpus" / "train.jsonl")[::11]  # of all grades: they come in turn
    data.write_task(folder / "few", SENTIMENT, {"train": corpus})
    return folder


# ----------------------------------------------------------------------------------------- The demo


def test_the_demos_meta_tasks_are_its_domains_and_its_tasks_other_ones(world):
    source = read_lines(world / "source" / "clustered.jsonl")
    pairs = {(example["domain"], example["cluster"]) for example in source}
    assert pairs == {(domain, i) for i, domain in enumerate(demo.SOURCE_DOMAINS)}
    for domain in demo.TASK_DOMAINS:
        test = read_lines(world / domain / "test.jsonl")
        assert {example["domain"] for example in test} == {domain}
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT)
    assert model.tokenizer.unk_token_id not in model.encode(source)["input_ids"]


def test_the_demo_stands_once_it_is_whole(world, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(demo, "write_demo", lambda *args: made.append(args))
    assert demo.demo(world) == world and not made
    demo.demo(tmp_path / "demo")
    demo.demo(world, restart=True)
    assert len(made) == 2 and not (world / "t5" / "arguments.json").exists()
    (world / "t5" / "arguments.json").write_text("{}")


def test_commands_at_once_end_with_the_one_that_failed(capfd):
    with pytest.raises(SystemExit, match="2"):
        demo.at_once(["data.py", "--help"], ["data.py", "nothing"])
    assert "usage: data.py" in capfd.readouterr().out


# -------------------------------------------------------------------------- A small T5 from nothing


def test_learn_tokenizer_keeps_words_whole_and_is_the_same_each_time():
    texts = ["an unforgettable film", "a forgettable plot", "the plot of a film"] * 3
    tokenizer = small_t5.learn_tokenizer(texts, ["Unforgettable", "okay"], 40)
    for word in ("unforgettable", "okay", " Okay"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    ids = tokenizer("The PLOT").input_ids
    assert ids == tokenizer("the plot").input_ids and ids[-1] == tokenizer.eos_token_id == 1
    again = small_t5.learn_tokenizer(texts, ["Unforgettable", "okay"], 40)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("length", [2, 3, 7, 64, 500, 3000])
def test_corrupted_spans_fit_back_into_the_text(length):
    rng, sentinels = np.random.default_rng(length), list(range(1000, 1100))
    ids = rng.integers(10, 900, length).tolist()
    source, target = small_t5.corrupt(ids, sentinels, 7, rng)
    assert source[-1] == target[-1] == 7
    spans = {}
    for i in target[:-1]:
        if i in sentinels:
            spans[i] = []
        else:
            spans[max(spans)].append(i)
    restored = []
    for i in source[:-1]:
        restored += spans.get(i, [i])
    assert restored == ids and list(spans) == sentinels[: len(spans)]
    assert sum(map(len, spans.values())) == max(1, round(0.15 * length))


def test_labelled_examples_are_drawn_from_every_class_alike_and_a_share_is_cut():
    many, one = [{"text": "One. Two! Three? Four.", "label": 0}] * 99, {"text": "x", "label": 1}
    by_class = small_t5.classes_of([*many, one])
    drawn = small_t5.draw_labelled(by_class, ["text"], 2000, 0.25, np.random.default_rng(0))
    sentences = [len(re.findall(r"[.!?]", example["text"])) for example in drawn]
    shares = np.bincount(sentences) / len(drawn)
    assert shares == pytest.approx([1 / 2, 1 / 24, 1 / 24, 1 / 24, 3 / 8], abs=0.03)


def make_t5(world, out, *flags):
    where = ["--corpus", f"{world}/few/train.jsonl", "--task", f"{world}/few", "--out", str(out)]
    words = "--d-model 16 --d-ff 16 --heads 2 --layers 1 --pieces 300 --validation 40 "
    words += "--max-steps 6 --eval-every 4 --batch-size 4 --labelled 4"
    small_t5.main([*where, *words.split(), *flags])
    return (out / "model.safetensors").read_bytes()


def test_a_t5_is_made_replaced_and_depends_on_its_seed(world, tmp_path):
    weights = make_t5(world, tmp_path / "t5")
    assert [line["step"] for line in read_lines(tmp_path / "t5" / "log.jsonl")] == [4, 6]
    PromptedT5(*metapt.load_t5(tmp_path / "t5"), SENTIMENT)
    with pytest.raises(InputError, match="t5: a T5 stands there already; give another --out"):
        make_t5(world, tmp_path / "t5")
    assert make_t5(world, tmp_path / "t5", "--restart", "--seed", "2") != weights
    assert make_t5(world, tmp_path / "t5", "--restart") == weights


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--pieces", "5"], "train.jsonl: .*; raise --pieces"),
        (["--learning-rate", "1e30"], "not finite; lower the learning rate"),
        (["--max-length", "5000"], "too little text to pre-train on; give more --corpus"),
    ],
)
def test_a_t5_that_cannot_be_made_leaves_nothing(world, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        make_t5(world, tmp_path / "t5", *flags)
    assert not (tmp_path / "t5").exists()


def test_pretraining_learns_both_of_its_objectives(world):
    examples = read_lines(world / "few" / "train.jsonl")[:200]
    t5, tokenizer = metapt.load_t5(world / "t5")
    model = PromptedT5(t5, tokenizer, SENTIMENT, 48)
    t5.requires_grad_(True)
    ids = tokenizer([example["text"] for example in examples], add_special_tokens=False).input_ids
    rng = np.random.default_rng(0)
    windows = small_t5.draw_windows(np.concatenate(ids), 16, tokenizer, 48, rng)
    assert (windows["labels"] == tokenizer.eos_token_id).sum() == 16
    draw = lambda step: (windows, model, model.encode(examples[:16]))
    optimizer = small_t5.Adafactor(t5.parameters(), 0.02, relative_step=False)
    steps = small_t5.pretrain(t5, draw, optimizer, range(40), lambda step: 0.02, torch.float32)
    losses = np.array(list(steps))
    assert (losses[-5:].mean(0) < 0.8 * losses[:5].mean(0)).all()


# ---------------------------------------------------------------------------- The study, real text


def test_what_the_inner_step_does_and_how_fast_a_prompt_adapts(world):
    model = PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT)
    prompt = model.init_prompt(4)
    examples = read_lines(world / "few" / "train.jsonl")[:16]
    supports, queries = list(model.batches(examples[:8], 4)), list(model.batches(examples[8:], 4))
    moved, before, after, cosine = inner_step.inner_step(model, prompt, supports, queries, 0.5)
    adapted = [metapt.adapt(model, prompt, support, 0.5).detach() for support in supports]
    assert 0 < cosine < 0.9999
    assert moved == pytest.approx(np.mean([(P - prompt).norm() / prompt.norm() for P in adapted]))
    assert before == pytest.approx(np.mean([model.loss(prompt, query) for query in queries]))
    losses = [model.loss(P, query).item() for P, query in zip(adapted, queries)]
    assert after == pytest.approx(np.mean(losses)) and after != pytest.approx(before)

    test, tuned = list(model.batches(examples)), torch.nn.Parameter(prompt.clone())
    optimizer = torch.optim.AdamW([tuned], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        (tuned.grad,) = torch.autograd.grad(model.loss(tuned, test[0]), tuned)
        optimizer.step()
    scores = inner_step.accuracies(model, prompt, examples, test, 0.1, updates=(0, 3))
    assert scores == [model.evaluate(P.detach(), test)["accuracy"] for P in (prompt, tuned)]


def test_a_download_is_read_and_so_is_the_tar_in_it(tmp_path):
    for path, name, file in [("in", "hutto/a.txt", b"na\xefve"), ("out", real.INNER, None)]:
        with tarfile.open(tmp_path / path, "w:gz") as archive:
            content = file or (tmp_path / "in").read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    ((match, text),) = real.download(tmp_path / "out", r"(a)\.txt$")
    assert (match[1], text) == ("a", "naïve")
    with pytest.raises(InputError, match="nothing: No such file .*; download it to the current"):
        list(real.download(tmp_path / "nothing", ""))


def test_the_inputs_are_what_the_downloads_hold_but_for_what_a_target_shares(tmp_path, monkeypatch):
    reviews = [(" ".join(f"w{i}x{j}" for j in range(9)), i % 5) for i in range(10)]
    two = "".join(f"{int(label > 2)}\t{text}\n" for text, label in reviews)
    rated = "".join(f"{i}\t{label - 2}\t{text}\n" for i, (text, label) in enumerate(reviews))
    part = "<review><rating>{}.0</rating>\n<review_text>\n{}\n</review_text></review>"
    files = {"acl/books/positive.review": ""}
    for i, (text, label) in enumerate(reviews):
        files[f"aclImdb/train/pos/{i}_{2 * label + 1}.txt"] = text
        files[f"aclImdb/train/unsup/{i}_0.txt"] = f"{text}<br />{text}"
        files["acl/books/positive.review"] += part.format(label + 1, text)
    for name in real.TARGETS:
        files[f"mtl/{name}.task.test"] = f"1\t{name}\n0\tno {name}\n"
    for name in ("MR.task.train", "video.task.train", "video.task.unlabel"):
        files[f"mtl/{name}"] = two
    for kind in ("amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
        files[f"hutto_ICWSM_2014/{kind}_GroundTruth.txt"] = rated

    def download(name, pattern):
        for file, text in files.items():
            if re.search(pattern, file):
                yield re.search(pattern, file), text

    monkeypatch.setattr(real, "download", download)
    monkeypatch.setattr(real, "TRAINING", 1)
    monkeypatch.chdir(tmp_path)
    shared = {"text": f"so {reviews[3][0].upper()} !", "label": 0}  # without case, punctuation
    data.write_task(Path("target"), SENTIMENT, {"test": [shared]})
    real.main(["--apart", "target"])
    del reviews[3]
    of = lambda name: [(row["text"], row["label"]) for row in read_lines(name)]
    assert of("tasks/snippets/train.jsonl") == of("tasks/stars/train.jsonl") == 2 * reviews
    assert of("source/examples.jsonl") == [(text, int(label > 2)) for text, label in reviews]
    texts = [text for text, _ in reviews]
    assert Path("imdb-unlabelled.txt").read_text().splitlines() == [f"{t} {t}" for t in texts]
    assert [row["text"] for row in read_lines("amazon-unlabelled.jsonl")] == texts
    both = of("tasks/baby/train.jsonl") + of("tasks/baby/test.jsonl")
    assert sorted(both) == [("baby", 1), ("no baby", 0)]


def test_every_arm_of_the_study_sees_as_many_examples_in_whole_blocks():
    stages = list(study.study())
    words = [command.split() for stage in stages for command in stage]
    runs = [train_meta.make_parser().parse_args(w[1:]) for w in words if w[0] == "train_meta.py"]
    for i, run in enumerate(runs):
        arm = list(study.ARMS)[i % 5]
        assert run.max_steps * study.ARMS[arm][1] == 40_000
        assert Path(run.out).name == f"{run.model[-1]}-{arm}-{run.seed}"
        sizes = {"ppt": run.batch_size, "plain": 8 * run.batch_size}
        assert sizes.get(arm, 8 * 2 * run.batch_size) == study.ARMS[arm][1]
    blocks = [(run.seed, run.model) for run in runs]
    assert blocks == sorted(blocks) and len(set(blocks)) == 12 and len(runs) == 60


def test_the_study_continues_where_it_was_stopped(tmp_path, monkeypatch):
    called = []

    def call(words):
        called.append(words[1].name)
        return SimpleNamespace(returncode=2 if called == ["a.py", "b.py"] else 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study.subprocess, "run", call)
    stages = [["a.py"], ["b.py --flag", "c.py"], ["d.py"]]
    with pytest.raises(SystemExit, match="2"):
        study.run(stages, 1)
    study.run(stages, 1)
    assert called == ["a.py", "b.py", "c.py", "b.py", "d.py"]


def test_differences_are_paired_by_training_and_blocked_by_t5():
    gains = [0.2, 0.5, -0.1, 0.4]
    mean, interval, p, equivalent = study_numbers.paired({"1": gains})
    test = stats.ttest_1samp(gains, 0)
    below = stats.ttest_1samp(gains, 1, alternative="less")
    assert (mean, p, equivalent) == pytest.approx((0.25, test.pvalue, below.pvalue))
    assert interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    mean, interval, *_ = study_numbers.paired({"1": [5.1, 4.9], "2": [-4.9, -5.1]})
    assert (mean, *interval) == pytest.approx((0, -0.304, 0.304), abs=1e-3)
    assert study_numbers.paired({"1": [1.0], "2": [2.0]}) == (1.5, None, None, None)
    assert study_numbers.holm([0.04, 0.03]) == [0.06, 0.06]


def test_only_trainings_that_every_arm_has_count():
    scores = {(arm, "1", seed): {"sst2": [50.0]} for arm in study_numbers.NAMES for seed in "12"}
    scores["ppt", "1", "2"] = {}
    assert study_numbers.whole(scores) == [("1", "1")]
    assert study_numbers.training_of("prompts/1-ppt-2") == ("ppt", "1", "2")
