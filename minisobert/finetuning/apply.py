"""A fine-tuned model on new posts: `finetune.py --predict FILE|- --model DIR`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from minisobert.corpus.packing import SPECIALS
from minisobert.corpus.texts import texts
from minisobert.finetuning import encoder, huggingface, marking
from minisobert.finetuning.loop import predict
from minisobert.tasks import TASKS
from minisobert.tasks.dataset import Example

SHOWN = 60  # characters of a post beside its class


def open_fine_tuned(model: str | Path) -> tuple[encoder.Network | huggingface.Network, dict, Callable[[str], str]]:
    """The network that a finetune.py kept, its task.json, and what the texts it was trained on were cleaned by. Raises
    ValueError where there is none."""
    folder = Path(model) / "model"
    try:
        task = json.loads((folder / "task.json").read_text())
    except OSError:
        raise ValueError(
            f"{model} holds no fine-tuned model; give the --out of a finetune.py that trained one (tfidf keeps none)"
        ) from None
    known = {"": str, **(TASKS[task["task"]].cleaning if task["task"] in TASKS else {})}
    if task["cleaning"] not in known:
        raise ValueError(
            f"{model} was trained on texts of {task['task']} cleaned by {task['cleaning']!r}, which this version of "
            "minisobert does not know; use the version that trained it"
        )
    network = (huggingface if task["format"] == "transformers" else encoder).open_network(folder, task)
    return network, task, known[task["cleaning"]]


def apply(model: str, source: str) -> None:
    """Prints a line for each post: its class, the probabilities of all and how it begins; for ner the post itself with
    its entities marked, in colour on a terminal. A post without text gives an empty line. Raises ValueError where there
    is no such model or file."""
    network, task, clean = open_fine_tuned(model)
    posts = list(map(clean, read(source)))
    spans = [marking.word_spans(post) for post in posts]
    examples = [
        Example(str(i), post, words=tuple(post[slice(*span)] for span in inside))
        for i, (post, inside) in enumerate(zip(posts, spans))
    ]
    labels, probabilities = task["labels"], predict(network, network.encode(examples))
    say_cut(network, len(posts))
    for post, inside, p in zip(posts, spans, probabilities):
        if not post.strip():
            print()
        elif task["kind"] == "token":
            tags = [labels[i] for i in p.argmax(1)]
            print(marking.mark(post, inside, tags, colour=sys.stdout.isatty()))
        else:
            shares = "  ".join(f"{label} {share:.1%}" for label, share in zip(labels, p[0]))
            print(f"{labels[p[0].argmax()]}\t{shares}\t{' '.join(post.split())[:SHOWN]}")


def say_cut(network: encoder.Network | huggingface.Network, count: int) -> None:
    """Says how many of `count` texts were too long for a network of ours, if any."""
    if cut := getattr(network, "cut", 0):
        longest = network.module.config.positions
        print(f"{cut:,} of {count:,} texts were cut to their first {longest - SPECIALS:,} tokens", file=sys.stderr)
        network.cut = 0


def read(source: str) -> list[str]:
    """The posts of a file, `text` of each line of a .jsonl or each line itself."""
    dropped: Counter = Counter()
    path = Path("/dev/stdin" if source == "-" else source)
    try:
        posts = [text for _, text in texts(path, dropped)]
    except OSError as error:
        raise ValueError(f"{source}: {error.strerror}") from None
    if malformed := sum(dropped.values()):
        raise ValueError(f'{source} has {malformed:,} lines that are not UTF-8, or in a .jsonl not {{"text": "…"}}')
    if not any(map(str.strip, posts)):
        raise ValueError(f"{source} has no text; give a post a line, or a .jsonl")
    return posts
