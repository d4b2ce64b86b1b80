"""
Groups source data into meta-tasks (Section 4.2, Appendix B): sentence-BERT embeddings, then
K-means.

    python cluster.py --source source/examples.jsonl                  # the paper; kmeans10.jsonl
    python cluster.py --source source/examples.jsonl --method lda     # Table 2; also random, label
    python cluster.py --source source/examples.jsonl --k 3 6 10 --figure tsne.png   # Figure 4

The output holds the source's lines in their order, each with its "cluster". Where it is in another
folder than the source, the source's task.json is copied beside it. Embeddings are stored beside the
source and used again. The source is read line by line, more than once, and never held in memory.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import array
import collections
import hashlib
import itertools
import json
import math
import sys
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
    """FAISS K-means, the best of five starts: each embedding's cluster [N], and its squared
    distance to the cluster's centroid [N]."""
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


def lda(texts, count, vectorizer, k, seed, size=512, updates=100):
    """Latent Dirichlet allocation, online: as many passes over the texts as make 100 updates of 512
    texts. `texts` is called for each pass. Each text's most probable topic [N], and one minus that
    probability [N]."""
    model = LatentDirichletAllocation(
        k, learning_method="online", total_samples=count, random_state=seed
    )
    passes = math.ceil(updates * size / max(count, size))
    for _ in range(passes):
        for block in blocks(texts(), size):
            model.partial_fit(vectorizer.transform(block))

    clusters, distances = [], []
    for block in blocks(texts(), size):
        topics = model.transform(vectorizer.transform(block))
        clusters.append(topics.argmax(1))
        distances.append(1 - topics.max(1))

    return np.concatenate(clusters), np.concatenate(distances)


def random_clusters(count, k, seed):
    """Clusters of one size, drawn at random [N]."""
    return np.random.default_rng(seed).permutation(count) % k


def blocks(texts, size):
    """Lists of `size` texts; the last is shorter."""
    texts = iter(texts)
    return iter(lambda: list(itertools.islice(texts, size)), [])


# ---------------------------------------------------- Appendix B.2: what is in a cluster, Figure 4


def nearest(clusters, distances, count=3):
    """{cluster: the numbers of the texts that are nearest to its centroid}."""
    found = {}
    for name in np.unique(clusters):
        members = np.flatnonzero(clusters == name)
        order = np.argsort(distances[members], kind="stable")
        found[int(name)] = members[order[:count]].tolist()
    return found


def telling_words(texts, clusters, vectorizer, count=8):
    """{cluster: the words that tell it from the others}, by the terms of the Kullback-Leibler
    divergence between the words' shares within and without."""
    names = np.unique(clusters)
    held = np.zeros((len(names), len(vectorizer.vocabulary)))  # texts of a cluster with a word
    start = 0
    for block in blocks(texts, 10_000):
        matrix, here = vectorizer.transform(block).sign(), clusters[start : start + len(block)]
        for row, name in enumerate(names):
            held[row] += np.asarray(matrix[here == name].sum(0))[0]
        start += len(block)

    within, without = held + 0.1, held.sum(0) - held + 0.1
    within /= within.sum(1, keepdims=True)
    without /= without.sum(1, keepdims=True)
    order = np.argsort(-within * np.log(within / without), 1)[:, :count]
    words = vectorizer.get_feature_names_out()
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


def read_texts(source, task):
    """Yields the texts of the source's examples."""
    for example in data.read_examples(source, task):
        yield data.text_of(example, task)


def survey(source, task, words):
    """One pass over the source: its labels [N], a digest of its texts, and the `words` words that
    most of them hold, without English stop words. Raises InputError, so that nothing later meets a
    broken line."""
    labels, digest, counts = array.array("q"), hashlib.sha256(), collections.Counter()
    analyze = CountVectorizer(stop_words="english").build_analyzer()
    for example in tqdm(data.read_examples(source, task), "reading", disable=None):
        text = data.text_of(example, task)
        labels.append(example["label"])
        digest.update(text.encode() + b"\n")
        counts.update(set(analyze(text)))
        if len(counts) > 100 * words:  # bounds the memory: rare words are not the most frequent
            counts = collections.Counter(dict(counts.most_common(50 * words)))

    frequent = [word for word, _ in counts.most_common(words)]
    return np.array(labels), digest, frequent or ["none"]


def embed(texts, count, path, encoder, device, size=20_000):
    """Sentence embeddings of unit length, [N, d] float32, by a sentence-transformers model's name
    or folder; the folder of any transformer serves too, with the mean over its tokens. They are
    stored at `path`, block after block, so that a stopped run continues, and mapped into memory
    from there. Raises InputError."""
    if path.exists():
        return open_embeddings(path, "r", count)

    with blame(encoder, "give a sentence-transformers model by hub name or folder", Exception):
        weights = {"use_safetensors": True}
        model = SentenceTransformer(encoder, device=device, model_kwargs=weights)

    partial, shape = path.with_suffix(".partial"), (count, model.get_embedding_dimension())
    if not partial.exists():  # in full, not as a hole: a disk that fills up kills what is mapped
        write_beside(partial, lambda beside: write_zeros(beside, shape))

    embeddings = open_embeddings(partial, "r+", *shape)

    several = device == "cuda" and torch.cuda.device_count() > 1
    pool = model.start_multi_process_pool() if several else None
    bar = sys.stderr.isatty()
    start = 0
    for block in blocks(tqdm(texts, "embedding", count, disable=None), size):
        rows = slice(start, start + len(block))
        start += len(block)
        if not embeddings[rows][-1].any():  # rows that are not written yet are zeros
            how = {"batch_size": 128, "normalize_embeddings": True, "pool": pool}
            embeddings[rows] = model.encode(block, show_progress_bar=bar, **how)
            embeddings.flush()

    if pool:
        model.stop_multi_process_pool(pool)

    partial.rename(path)
    return open_embeddings(path, "r", count)


def write_zeros(path, shape):
    """Writes an array of zeros without holding it in memory."""
    with open(path, "wb") as file:
        np.save(file, np.broadcast_to(np.float32(0), shape), allow_pickle=False)


def open_embeddings(path, mode, *shape):
    """Stored embeddings, mapped into memory. Raises InputError where they are others."""
    with blame(path, f"not the embeddings of {shape[0]:,} texts: remove it"):
        embeddings = np.lib.format.open_memmap(path, mode)  # it refuses objects: nothing pickled
        kind = (embeddings.dtype, embeddings.ndim, embeddings.shape[: len(shape)])
        if kind != (np.float32, 2, shape):
            raise ValueError(f"{embeddings.dtype} of shape {embeddings.shape}")
    return embeddings


def check_sizes(source, clusters, least, drop_small):
    """Which examples are in clusters that are large enough, [N] bool: of `least` examples, or by
    default of what train_meta.py holds out of each and draws. Raises InputError where not all are,
    unless drop_small."""
    sizes = np.bincount(clusters)
    kept = sizes > 0
    while True:  # fewer clusters have to be larger, since more of each is held out
        needed = least or 640 // max(1, kept.sum()) + 8
        small = np.flatnonzero(kept & (sizes < needed))
        if len(small) == 0:
            return kept[clusters]
        if not drop_small or len(small) == kept.sum():
            raise InputError(
                f"{source}: cluster {small[0]} has {sizes[small[0]]} examples, fewer than the "
                f"{needed} that support, query and validation take: lower --k, or "
                "--min-size and train_meta.py's --validation, or drop it with --drop-small"
            )

        dropped = sizes[small].sum()
        print(
            f"dropped {len(small)} clusters of fewer than {needed} examples: {dropped:,} examples"
        )
        kept[small] = False


def describe(source, task, clusters, distances, labels, vectorizer):
    """Prints Appendix B.2's manual inspection: every cluster's size, labels, most telling words and
    the three texts nearest to its centroid (its first three, where there is no centroid). Returns
    each cluster's most telling words."""
    near = nearest(clusters, distances)
    wanted = set(itertools.chain.from_iterable(near.values()))
    found = {i: text for i, text in enumerate(read_texts(source, task)) if i in wanted}
    words = telling_words(read_texts(source, task), clusters, vectorizer)
    for name in near:
        histogram = np.bincount(labels[clusters == name], minlength=len(task.words))
        shares = [f"{count:,} {word}" for count, word in zip(histogram, task.words)]
        print(f"cluster {name}: {histogram.sum():,} examples: {', '.join(shares)}")
        print(f"    words: {' '.join(words[name])}")
        for index in near[name]:
            print(f"    {' '.join(found[index].split())[:110]}")

    return words


def make_meta_tasks(args):
    """Clusters args.source by args.method, for every number of clusters in args.k."""
    source, task = Path(args.source), Task.load(Path(args.source).parent)
    labels, digest, words = survey(source, task, args.vocabulary)
    if not all(2 <= k <= len(labels) for k in args.k):
        raise InputError(f"{source}: {len(labels):,} examples cannot make {args.k} clusters")

    outs = {}
    for k in args.k:
        name = f"{args.method}{'' if args.method == 'label' else k}.jsonl"
        outs[k] = Path(args.out or source.with_name(name))
        data.try_place(outs[k])

    if args.figure:
        data.try_place(args.figure)

    vectorizer = CountVectorizer(vocabulary=words)
    if args.method == "kmeans" or args.figure:
        files = sorted(Path(args.encoder).glob("*"))
        files = [(str(file), file.stat().st_mtime_ns) for file in files]
        digest.update(json.dumps([args.encoder, files]).encode())
        stored = f"{data.unpacked_name(source)}.{digest.hexdigest()[:12]}.npy"
        texts = read_texts(source, task)
        place = source.with_name(stored)
        embeddings = embed(texts, len(labels), place, args.encoder, args.device)

    panels = []
    for k, out in outs.items():
        distances = np.zeros(len(labels))
        if args.method == "kmeans":
            clusters, distances = kmeans(embeddings, k, args.seed)
        elif args.method == "lda":
            again = lambda: read_texts(source, task)
            clusters, distances = lda(again, len(labels), vectorizer, k, args.seed)
        elif args.method == "random":
            clusters = random_clusters(len(labels), k, args.seed)
        else:
            clusters = labels

        kept = check_sizes(source, clusters, args.min_size, args.drop_small)
        telling = describe(source, task, clusters, distances, labels, vectorizer)
        panels.append((f"{args.method}, {len(telling)} clusters", clusters, telling))
        write_clusters(out, source, task, clusters, kept)
        data.save_arguments(out.with_suffix(".json"), args)
        print(f"wrote {out}: {kept.sum():,} examples in {len(np.unique(clusters[kept]))} clusters")

    if args.figure:
        data.save_figure(args.figure, plot(embeddings, panels, args.seed))


def write_clusters(out, source, task, clusters, kept):
    """Writes the source's lines that are kept, each with its cluster, and their task."""

    def examples():
        for example, name, keep in zip(data.read_examples(source, task), clusters, kept):
            if keep:
                yield {**example, "cluster": int(name)}

    out.parent.mkdir(parents=True, exist_ok=True)
    data.write_examples(out, examples())
    if out.parent != source.parent:
        task.save(out.parent)


def main(argv=None):
    """Reads the flags and makes the meta-tasks."""
    parser = data.Parser(__doc__)
    parser.add_config_flag()
    source = "the examples to cluster, JSON lines with a task.json beside them"
    figure = "draws the clusters by t-SNE of the embeddings, a panel for each k"
    size = (
        "examples that a cluster must have (default: 640 / clusters + 8, which train_meta.py holds "
        "out and draws by default)"
    )
    out = "the file to write (default: METHOD and K.jsonl beside the source)"
    encoder = "sentence-transformers/all-MiniLM-L6-v2"
    whole = data.whole
    parser.add("--source", source, required=True, type=data.file, metavar="FILE")
    parser.add("--method", "how to cluster", "kmeans", choices=["kmeans", "lda", "random", "label"])
    parser.add("--k", "clusters; several write a file each", [10], type=whole(2), nargs="+")
    parser.add("--encoder", "a sentence-BERT by hub name or folder", encoder)
    parser.add("--figure", figure, type=data.picture, metavar="FILE")
    parser.add("--min-size", size, type=whole(1))
    parser.add_switch("--drop-small", "leaves smaller clusters out")
    parser.add("--vocabulary", "words that LDA and the report count", 10_000, type=whole(1))
    parser.add("--seed", "of K-means, LDA, random clusters and t-SNE", 1, type=whole(0))
    parser.add_device_flag()
    parser.add("--out", out, metavar="FILE")
    args = parser.parse(argv)
    if args.out and len(args.k) > 1:
        parser.error("--out goes with one --k")

    make_meta_tasks(args)


if __name__ == "__main__":
    data.run(main)
