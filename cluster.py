"""
Groups source data into meta-tasks (Section 4.2, Appendix B): sentence-BERT embeddings, then
K-means.

    python cluster.py --source source/examples.jsonl                  # the paper; kmeans10.jsonl
    python cluster.py --source source/examples.jsonl --method lda     # Table 2; also random, label
    python cluster.py --source source/examples.jsonl --k 3 6 10 --figure tsne.png   # Figure 4

The output holds the source's lines in their order, each with its "cluster". Where it is in another
folder than the source, the source's task.json is copied beside it. Embeddings are stored beside the
source and used again.
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    HELP = not {"-h", "--help"}.isdisjoint(sys.argv)

import json
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data

if not data.HELP:
    import faiss
    import torch
    from sentence_transformers import SentenceTransformer
    from sklearn.decomposition import LatentDirichletAllocation
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.manifold import TSNE

    from metapt import InputError, Task, blame, write_beside

# ------------------------------------------------ Section 4.2 and Appendix B.1: four clusterings


def kmeans(embeddings, k, seed):
    """FAISS K-means (Section 4.2), the best of five starts: each embedding's cluster [N], and its
    squared distance to the cluster's centroid [N]."""
    model = faiss.Kmeans(
        embeddings.shape[1],
        k,
        niter=50,
        nredo=5,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(embeddings),  # all of them, where FAISS would draw some
        gpu=faiss.get_num_gpus() > 0,
    )
    model.train(embeddings)
    distances, clusters = model.index.search(embeddings, 1)
    return clusters[:, 0], distances[:, 0]


def lda(counts, k, seed, size=512, updates=100):
    """Latent Dirichlet allocation (Appendix B.1) of word counts [N, words], online: as many passes
    over them as make 100 updates of 512 texts. Each text's most probable topic [N], and one minus
    that probability [N]."""
    passes = math.ceil(updates * size / max(counts.shape[0], size))
    model = LatentDirichletAllocation(
        k, learning_method="online", batch_size=size, max_iter=passes, random_state=seed
    )
    topics = model.fit_transform(counts)
    return topics.argmax(1), 1 - topics.max(1)


def random_clusters(count, k, seed):
    """Clusters of one size, drawn at random [N] (Appendix B.1)."""
    return np.random.default_rng(seed).permutation(count) % k


# ---------------------------------------------------- Appendix B.2: what is in a cluster, Figure 4


def nearest(clusters, distances, count=3):
    """Appendix B.2: {cluster: the numbers of the texts that are nearest to its centroid}."""
    found = {}
    for name in np.unique(clusters):
        members = np.flatnonzero(clusters == name)
        order = np.argsort(distances[members], kind="stable")
        found[int(name)] = members[order[:count]].tolist()
    return found


def telling_words(counts, clusters, words, count=8):
    """Appendix B.2: {cluster: the words that tell it from the others}, by the terms of the
    Kullback-Leibler divergence between the words' shares within and without. counts [N, words]:
    each text's."""
    names = np.unique(clusters)
    held = [counts[clusters == name].sign().sum(0) for name in names]  # texts that hold a word
    held = np.array([np.asarray(row).ravel() for row in held])
    within, without = held + 0.1, held.sum(0) - held + 0.1
    within /= within.sum(1, keepdims=True)
    without /= without.sum(1, keepdims=True)
    order = np.argsort(-within * np.log(within / without), 1)[:, :count]
    return {int(name): words[row].tolist() for name, row in zip(names, order)}


def plot(embeddings, panels, seed, sample=2500):
    """Figure 4: t-SNE of a sample of the embeddings, with a panel for every (title, clusters [N],
    words of each cluster). Returns the figure."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = np.sort(np.random.default_rng(seed).permutation(len(embeddings))[:sample])
    tsne = TSNE(perplexity=min(30, len(rows) / 4), random_state=seed)
    points = tsne.fit_transform(embeddings[rows])
    figure = Figure(figsize=(6 * len(panels), 7.5))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, clusters, words) in zip(axes, panels):
        colours = colormaps["tab10" if len(words) <= 10 else "gist_ncar"]
        colours = colours.resampled(max(10, len(words)))
        for i, name in enumerate(words):
            x, y = points[clusters[rows] == name].T
            label = f"{name}: {', '.join(words[name][:3])}"
            marker = "os^DvPX*<>"[i % 10]  # so that clusters can be told apart without colour
            axis.scatter(x, y, s=9, marker=marker, color=colours(i), linewidths=0, label=label)
        axis.set(title=title, xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.05), "ncols": 2}
        axis.legend(**below, fontsize=9, markerscale=2.5, frameon=False)

    figure.suptitle(f"{len(rows):,} of {len(embeddings):,} embeddings", y=0.95)
    return figure


# ------------------------------------------------------------ The run: files, continuing, errors


def place_of_embeddings(source, texts, encoder):
    """Where embeddings are stored beside the source: by a name that other texts or another encoder
    would change."""
    files = [(str(file), file.stat().st_mtime_ns) for file in sorted(Path(encoder).glob("*"))]
    made_of = data.digest(*(text + "\n" for text in texts), json.dumps([encoder, files]))
    return source.with_name(f"{data.unpacked_name(source)}.{made_of}.npy")


def embed(texts, path, encoder, device, size=20_000):
    """Section 4.2's sentence embeddings of unit length, [N, d] float32, by a sentence-transformers
    model's name or folder; the folder of any transformer serves too, with the mean over its tokens.
    They are written to a file block after block, so that a stopped run continues, and stored at
    `path`. Raises InputError."""
    if not path.exists():
        with blame(encoder, "give a sentence-transformers model by hub name or folder", Exception):
            weights = {"use_safetensors": True, "dtype": torch.float32}
            model = SentenceTransformer(encoder, device=device, model_kwargs=weights)

        rows, width = path.with_suffix(".rows"), model.get_embedding_dimension()
        with open(rows, "ab") as file:
            done = file.tell() // (4 * width)
            file.truncate(4 * width * done)  # a row may have been written in part
            for start in tqdm(range(done, len(texts), size), "embedding", disable=None):
                try:
                    block = encode(model, texts[start : start + size], encoder)
                except InputError:
                    rows.unlink()
                    raise
                file.write(block.tobytes())
                file.flush()

        with blame(rows, "remove it and give the same command again"):
            embeddings = np.memmap(rows, np.float32, "r", shape=(len(texts), width))
        write_beside(path, lambda beside: write_array(beside, embeddings))
        rows.unlink()

    with blame(path, f"not the embeddings of {len(texts):,} texts: remove it"):
        embeddings = np.lib.format.open_memmap(path, "r")  # it refuses objects: nothing pickled
        if (embeddings.dtype, embeddings.ndim, len(embeddings)) != (np.float32, 2, len(texts)):
            raise ValueError(f"{embeddings.dtype} of shape {embeddings.shape}")

    return embeddings


def encode(model, texts, name):
    """The embeddings of a block of texts. Raises InputError where one is not finite."""
    shown = sys.stderr.isatty()
    how = {"batch_size": 128, "normalize_embeddings": True, "show_progress_bar": shown}
    rows = model.encode(texts, **how).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        text = texts[bad[0]][:60]
        raise InputError(f"{name}: the embedding of {text!r} is not finite; give another --encoder")
    return rows


def write_array(path, array):
    """NumPy's own form, at a path that does not end in .npy."""
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def describe(task, texts, labels, clusters, distances, telling):
    """Prints Appendix B.2's manual inspection: every cluster's size, labels, most telling words and
    the three texts nearest to its centroid (its first three, where there is no centroid)."""
    for name, rows in nearest(clusters, distances).items():
        histogram = np.bincount(labels[clusters == name], minlength=len(task.words))
        shares = [f"{count:,} {word}" for count, word in zip(histogram, task.words)]
        print(f"cluster {name}: {histogram.sum():,} examples: {', '.join(shares)}")
        print(f"    words: {' '.join(telling[name])}")
        for row in rows:
            print(f"    {' '.join(texts[row].split())[:110]}")


def make_meta_tasks(args):
    """Section 4.2: clusters args.source by args.method, for every number of clusters in args.k."""
    source, task = Path(args.source), Task.load(Path(args.source).parent)
    examples = list(data.read_examples(source, task))
    texts = [data.text_of(example, task) for example in examples]
    labels = np.array([example["label"] for example in examples])
    if not all(2 <= k <= len(examples) for k in args.k):
        raise InputError(f"{source}: {len(examples):,} examples cannot make {args.k} clusters")

    outs = {}
    for k in args.k:
        name = f"{args.method}{'' if args.method == 'label' else k}.jsonl"
        outs[k] = Path(args.out or source.with_name(name))

    vectorizer = CountVectorizer(stop_words="english", max_features=args.vocabulary)
    with blame(source, "give texts of other words"):
        counts = vectorizer.fit_transform(texts)  # [N, words]

    words = vectorizer.get_feature_names_out()
    if args.method == "kmeans" or args.figure:
        place = place_of_embeddings(source, texts, args.encoder)
        embeddings = embed(texts, place, args.encoder, args.device)

    panels = []
    for k, out in outs.items():
        distances = np.zeros(len(examples))
        if args.method == "kmeans":
            clusters, distances = kmeans(embeddings, k, args.seed)
        elif args.method == "lda":
            clusters, distances = lda(counts, k, args.seed)
        elif args.method == "random":
            clusters = random_clusters(len(examples), k, args.seed)
        else:
            clusters = labels

        write_clusters(out, source, task, examples, clusters)
        data.save_arguments(out.with_suffix(".json"), args)
        telling = telling_words(counts, clusters, words)
        describe(task, texts, labels, clusters, distances, telling)
        panels.append((f"{args.method}, {len(telling)} clusters", clusters, telling))
        print(f"wrote {out}: {len(examples):,} examples in {len(telling)} clusters")

    if args.figure:
        data.save_figure(args.figure, plot(embeddings, panels, args.seed))


def write_clusters(out, source, task, examples, clusters):
    """Writes the examples, each with its cluster, and their task."""
    out.parent.mkdir(parents=True, exist_ok=True)
    pairs = zip(examples, clusters.tolist())
    data.write_lines(out, ({**example, "cluster": name} for example, name in pairs))
    if out.parent != source.parent:
        task.save(out.parent)


def main(argv=None):
    """Reads the flags and makes the meta-tasks."""
    parser = data.Parser(__doc__)
    parser.add_config()
    add, number, file = parser.add_argument, data.number, data.existing("file")
    methods = ["kmeans", "lda", "random", "label"]
    encoder = "sentence-transformers/all-MiniLM-L6-v2"
    picture = "draws the clusters by t-SNE of the embeddings, a panel for each k"
    add("--source", required=True, type=file, metavar="FILE", help="examples, a task.json beside")
    add("--out", metavar="FILE", help="to write (default: METHOD and K.jsonl beside the source)")
    add("--method", default="kmeans", choices=methods, help="how to cluster")
    add("--k", type=number(2), default=[10], nargs="+", help="clusters; several: a file each")
    add("--encoder", default=encoder, help="a sentence-BERT by hub name or folder")
    add("--figure", type=data.picture, metavar="FILE", help=picture)
    add("--vocabulary", type=number(1), default=10_000, help="words that LDA and the report count")
    seed = number(0, 2**31 - 1)  # FAISS takes no larger one
    add("--seed", type=seed, default=1, help="of K-means, LDA, random clusters and t-SNE")
    parser.add_machine()
    args = parser.parse(argv)
    if len(args.k) > 1 and (args.out or args.method == "label"):
        parser.error("--out and --method label go with one --k")
    if args.out and (not args.out.endswith(".jsonl") or Path(args.out).name == "task.jsonl"):
        parser.error("--out must end in .jsonl; its arguments go into a .json of the same name")

    data.set_machine(args)
    make_meta_tasks(args)


if __name__ == "__main__":
    data.run(main)
