"""The sanity checks of this folder: the demo, the small T5, the study on real text."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

sys.path[:0] = map(str, Path(__file__).parents[:2])
import data
import demo
import inner_step
import metapt
import real
import small_t5
import study
import study_numbers
import train_meta

SENTIMENT = metapt.Task("sentiment", data.TEMPLATE, data.WORDS[5])


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The demo, its T5 hardly trained, in a folder with a space in its name."""
    return demo.demo(tmp_path_factory.mktemp("world") / "a demo", steps=3)


def test_the_demos_meta_tasks_are_its_domains_and_its_tasks_other_ones(world):
    source = read_lines(world / "source" / "clustered.jsonl")
    pairs = {(example["domain"], example["cluster"]) for example in source}
    assert pairs == {(domain, i) for i, domain in enumerate(demo.SOURCE_DOMAINS)}
    for domain in demo.TASK_DOMAINS:
        test = read_lines(world / domain / "test.jsonl")
        assert {example["domain"] for example in test} == {domain}
    model = metapt.PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT)
    assert model.tokenizer.unk_token_id not in model.encode(source)["input_ids"]


def test_the_demo_stands_once_it_is_whole(world, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(demo, "write_demo", lambda *args: made.append(args))
    assert demo.demo(world) == world and not made
    demo.demo(tmp_path / "demo")
    demo.demo(world, restart=True)
    assert len(made) == 2 and not (world / "t5" / "arguments.json").exists()


def test_commands_at_once_end_with_the_one_that_failed(tmp_path, capfd):
    # One write each: an unbuffered print is two, between which the other's may come.
    end = r"import sys; sys.stdout.write('end\n'); sys.exit(int(sys.argv[1]))"
    (tmp_path / "end.py").write_text(end)
    with pytest.raises(SystemExit, match="3"):
        demo.at_once([tmp_path / "end.py", 0], [tmp_path / "end.py", 3])
    assert capfd.readouterr().out.count("\nend") == 2


def test_learn_tokenizer_keeps_words_whole_and_is_the_same_each_time():
    texts = ["an unforgettable film", "a forgettable plot", "the plot of a film"] * 3
    tokenizer = small_t5.learn_tokenizer(texts, ["Unforgettable", "okay"], 40)
    for word in ("unforgettable", "okay", " Okay"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    ids = tokenizer("The PLOT").input_ids
    assert ids == tokenizer("the plot").input_ids and ids[-1] == tokenizer.eos_token_id == 1
    again = small_t5.learn_tokenizer(texts, ["Unforgettable", "okay"], 40)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize("length", [2, 7, 500, 3000])
def test_corrupted_spans_fit_back_into_the_text(length):
    rng = np.random.default_rng(length)
    sentinels = list(range(1000, 1100))
    ids = rng.integers(10, 900, length).tolist()
    source, target = small_t5.corrupt(ids, sentinels, 7, rng)
    assert source[-1] == target[-1] == 7
    spans = {}
    for i in target[:-1]:
        if i in sentinels:
            spans[i] = []
        else:
            spans[max(spans)].append(i)
    assert [i for token in source[:-1] for i in spans.get(token, [token])] == ids
    assert list(spans) == sentinels[: len(spans)]
    assert sum(map(len, spans.values())) == max(1, round(0.15 * length))


def test_labelled_examples_are_drawn_from_every_class_alike_and_a_share_is_cut():
    many = [{"text": "One. Two! Three? Four.", "label": 0}] * 99
    by_class = small_t5.classes_of([*many, {"text": "x", "label": 1}])
    drawn = small_t5.draw_labelled(by_class, ["text"], 2000, 0.25, np.random.default_rng(0))
    sentences = [len(re.findall(r"[.!?]", example["text"])) for example in drawn]
    shares = np.bincount(sentences) / len(drawn)
    assert shares == pytest.approx([1 / 2, 1 / 24, 1 / 24, 1 / 24, 3 / 8], abs=0.03)


def make_t5(world, out, *flags):
    small = "--d-model 16 --d-ff 16 --heads 2 --layers 1 --pieces 300 --batch-size 4 --labelled 4"
    short = "--validation 40 --max-steps 6 --eval-every 4"
    where = ["--corpus", world / "books" / "train.jsonl", "--task", world / "books", "--out", out]
    small_t5.main([*where, *small.split(), *short.split(), *flags])
    return (out / "model.safetensors").read_bytes()


def test_a_t5_is_made_replaced_and_depends_on_its_seed(world, tmp_path):
    weights = make_t5(world, tmp_path / "t5")
    assert [line["step"] for line in read_lines(tmp_path / "t5" / "log.jsonl")] == [4, 6]
    metapt.PromptedT5(*metapt.load_t5(tmp_path / "t5"), SENTIMENT)
    with pytest.raises(metapt.InputError, match="t5: a T5 stands there already; give another"):
        make_t5(world, tmp_path / "t5")
    assert make_t5(world, tmp_path / "t5", "--restart", "--seed", "2") != weights
    assert make_t5(world, tmp_path / "t5", "--restart") == weights


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--pieces", "5"], "train.jsonl: .*; raise --pieces"),
        (["--learning-rate", "1e15"], "not finite; lower the learning rate"),
        (["--max-length", "5000"], "too little text to pre-train on; give more --corpus"),
    ],
)
def test_a_t5_that_cannot_be_made_leaves_nothing(world, tmp_path, flags, message):
    with pytest.raises(metapt.InputError, match=message):
        make_t5(world, tmp_path / "t5", *flags)
    assert not (tmp_path / "t5").exists()


def test_pretraining_learns_both_of_its_objectives(world, tmp_path):
    flags = "--max-steps 40 --eval-every 20 --learning-rate 0.3 --batch-size 16 --labelled 32"
    make_t5(world, tmp_path / "t5", *flags.split(), "--d-model", "32", "--max-length", "24")
    first, last = read_lines(tmp_path / "t5" / "log.jsonl")
    assert last["loss"] < 0.8 * first["loss"] and last["label_loss"] < 0.8 * first["label_loss"]


def test_what_the_inner_step_does_and_how_fast_a_prompt_adapts(world):
    model = metapt.PromptedT5(*metapt.load_t5(world / "t5"), SENTIMENT)
    prompt = model.init_prompt(4)
    examples = read_lines(world / "books" / "train.jsonl")[:16]
    supports = list(model.batches(examples[:8], 4))
    queries = list(model.batches(examples[8:], 4))
    moved, before, after, cosine = inner_step.inner_step(model, prompt, supports, queries, 0.5)
    adapted = [metapt.adapt(model, prompt, support, 0.5).detach() for support in supports]
    assert 0 < cosine < 0.9999
    assert moved == pytest.approx(np.mean([(P - prompt).norm() / prompt.norm() for P in adapted]))
    assert before == pytest.approx(np.mean([model.loss(prompt, query) for query in queries]))
    assert after == pytest.approx(np.mean([*map(model.loss, adapted, queries)]))

    test = list(model.batches(read_lines(world / "books" / "test.jsonl")[:400]))
    tuned = torch.nn.Parameter(prompt.clone())
    optimizer = torch.optim.AdamW([tuned], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        (tuned.grad,) = torch.autograd.grad(model.loss(tuned, model.encode(examples)), tuned)
        optimizer.step()
    scores = inner_step.accuracies(model, prompt, examples, test, 0.1, updates=(0, 3))
    assert scores == [model.evaluate(P.detach(), test)["accuracy"] for P in (prompt, tuned)]
    assert scores[0] != scores[1]


def test_the_inputs_are_what_the_downloads_hold_but_for_what_a_target_shares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "TRAINING", 1)
    reviews = [(f"é{i} b{i} c{i} d{i} e{i} f{i} g{i} h{i} i{i}", i % 5) for i in range(10)]
    two = "".join(f"{int(label > 2)}\t{text}\n" for text, label in reviews)
    rated = "".join(f"{i}\t{label - 2}\t{text}\n" for i, (text, label) in enumerate(reviews))
    part = "<review><rating>{}.0</rating>\n<review_text>\n{}\n</review_text></review>"
    files = {f"mtl/{name}.task.test": f"1\t{name}\n0\tno {name}\n" for name in real.TARGETS}
    files |= {"mtl/MR.task.train": two, "mtl/video.task.train": two, "mtl/video.task.unlabel": two}
    files["acl/books/positive.review"] = "".join(part.format(y + 1, text) for text, y in reviews)
    for i, (text, label) in enumerate(reviews):
        files[f"aclImdb/train/pos/{i}_{2 * label + 1}.txt"] = text
        files[f"aclImdb/train/unsup/{i}_0.txt"] = f"{text}<br />{text}"
    for kind in ("amazonReviewSnippets", "nytEditorialSnippets", "tweets"):
        files[f"hutto_ICWSM_2014/{kind}_GroundTruth.txt"] = rated
    for name, text in files.items():
        content = text.encode("latin-1" if name.endswith("unlabel") else "utf-8")  # as they are
        metapt.write_atomically(Path("files", name), lambda file: file.write(content))

    # One folder is all four downloads: each reader takes what is its own, VADER's from a tar in it.
    shutil.make_archive("files/hutto_ICWSM_2014", "gztar", "files", "hutto_ICWSM_2014")
    for name in "aclImdb_v1 domain_sentiment_data fudan-mtl-dataset vaderSentiment-3.3.2".split():
        with pytest.raises(metapt.InputError, match="No such file .*; download it"):
            real.main([])
        shutil.make_archive(name, "gztar", "files")

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
    words = [command.split() for stage in study.study() for command in stage]
    runs = [train_meta.make_parser().parse_args(w[1:]) for w in words if w[0] == "train_meta.py"]
    arms = study.ARMS | study.ADDED
    for i, run in enumerate(runs):
        arm = list(study.ARMS)[i % 5] if i < 60 else "matched"
        assert run.max_steps * arms[arm][1] == 40_000
        assert Path(run.out).name == f"{run.model[-1]}-{arm}-{run.seed}"
        sizes = {"ppt": run.batch_size, "plain": 8 * run.batch_size}
        assert sizes.get(arm, 8 * 2 * run.batch_size) == arms[arm][1]
    blocks = [(run.seed, run.model) for run in runs]
    assert blocks[:60] == sorted(blocks[60:] * 5) and len(set(blocks)) == 12 and len(runs) == 72


def test_the_study_continues_where_it_was_stopped(tmp_path, monkeypatch):
    called = []

    def call(words):
        called.append(words[1].name)
        return subprocess.CompletedProcess(words, 2 if called == ["a.py", "b.py"] else 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", call)
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


def test_trainings_count_that_every_arm_has_whole_and_of_a_run_the_later(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = []
    names = itertools.product(study.ARMS, "12", study_numbers.EXPECTED, range(5), (0, 40))
    for i, (arm, seed, task, draw, shots) in enumerate(names):
        row = {"prompt": f"prompts/1-{arm}-{seed}", "task": task, "seed": draw, "shots": shots}
        row |= {"model": "t5-1", "method": arm, "accuracy": 0.5 + 0.01 * (arm == "kmeans")}
        rows.append({**row, "identity": i})
    for prompt in {row["prompt"] for row in rows}:
        metapt.write_json(f"{prompt}/metapt.json", {"accuracy": 0.7})
    again = {**rows[1], "accuracy": 0.59, "identity": "again"}
    for count, expected in (len(rows), "+1.20 +1.00"), (len(rows) - 1, "+1.20"):
        data.write_lines("results.jsonl", [*rows[:count], again])
        study_numbers.main([])
        assert f"| {expected} |" in re.sub(" +", " ", capsys.readouterr().out)
