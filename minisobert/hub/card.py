"""The model card of an exported folder: what the model is, how to load it, and how and on what it was trained.

Everything comes from the run's own files. What they do not say (the corpus of an older run, a price that was not given)
is left out.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minisobert.cli import table
from minisobert.corpus.tokenizer import Tokenizer
from minisobert.finetuning.evaluation import shown
from minisobert.model import Model
from minisobert.tasks.words import WORD
from minisobert.training import checkpoint
from minisobert.training.run import Trained, read_metrics


@dataclass
class Pretrained:
    """What a run's folder says about one of its checkpoints. {} means unknown."""

    recipe: dict  # the options of the run
    corpus: dict  # meta.json of its shards, without the files
    vocabulary: str  # in words
    history: list[dict]  # where the weights came from
    progress: dict  # counters of the checkpoint
    metrics: dict  # the last line of metrics.jsonl up to the checkpoint
    held_out: dict  # the last such line with a validation loss


@dataclass
class FineTuned:
    task: dict  # task.json
    results: dict  # metrics.json


def pretrained(run: Path, path: Path, trained: Trained) -> Pretrained:
    """path: the checkpoint from which `trained` was opened."""
    described, state = json.loads((run / "config.json").read_text()), checkpoint.read_state(path)
    lines = []
    with suppress(ValueError):  # no metrics: the card says less
        lines = [line for line in read_metrics(run) if line["step"] <= state["progress"]["step"]]
    tokenizer, has_begun = trained.tokenizer, state["progress"]["step"] > 0
    ours = isinstance(tokenizer, Tokenizer)
    whose = "pieces of a SentencePiece BPE with byte fallback" if ours else "ids of the tokenizer it came with"
    return Pretrained(
        recipe=described["train"] if has_begun else {},
        corpus=described.get("corpus", {}),
        vocabulary=f"{tokenizer.vocab_size:,} {whose}",
        history=trained.history[:-1] if has_begun else trained.history,
        progress=state["progress"],
        metrics=lines[-1] if lines else {},
        held_out=next((line for line in reversed(lines) if line.get("validation_loss") is not None), {}),
    )


def card(name: str, format: str, model: Model, about: Pretrained | FineTuned, picture: bool) -> str:
    """The content of README.md. name: that of the folder; picture: whether the folder holds loss.png."""
    sections = _pretrained(name, format, about, picture) if isinstance(about, Pretrained) else _fine_tuned(name, about)
    return "\n".join([*_front(format, about), f"# {name}\n", _model(format, model), *sections])


def _front(format: str, about: Pretrained | FineTuned) -> list[str]:
    """The YAML at the top, which the Hub reads."""
    if isinstance(about, Pretrained):
        pipeline, tags = "fill-mask", ["sentence-transformers", "feature-extraction"]
    elif about.task["kind"] == "pair":
        pipeline, tags = "sentence-similarity", ["sentence-transformers", "feature-extraction"]
    else:
        pipeline = "text-classification" if about.task["kind"] == "sequence" else "token-classification"
        tags = [f"task:{about.task['task']}"]
    library = "sentence-transformers" if pipeline == "sentence-similarity" else "transformers"
    front = {"library_name": library, "pipeline_tag": pipeline}
    if isinstance(about, Pretrained) and about.corpus.get("posts"):
        front = {"license": "cc-by-sa-4.0", **front}
    lines = [f"{key}: {value}" for key, value in front.items()]
    return ["---", *lines, "tags:", *(f"- {tag}" for tag in ["minisobert", format, *tags]), "---\n"]


def _model(format: str, model: Model) -> str:
    c, parameters = model.config, sum(p.numel() for p in model.parameters())
    if not c.is_modern:
        kind = "The blocks are Megatron-LM's: layer norms come first, positions are learnt"
    elif c.global_every == 1:
        kind = "All layers attend to the whole text"
    else:
        kind = (
            f"One layer in {c.global_every} attends to the whole text, the others to {c.window} tokens on either side"
        )
    return (
        f"A `{format}` with {parameters:,} parameters: {c.layers} layers, width {c.hidden:,}, {c.heads} heads, texts "
        f"of up to {c.positions:,} tokens. {kind}. Trained with minisobert.\n"
    )


_LOAD = """## How to load it

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("NAME")
model = AutoModelForMaskedLM.from_pretrained("NAME")
pipeline("fill-mask", model=model, tokenizer=tokenizer)("How do I [MASK] a list in Python?")
```

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("NAME").encode(["a text", "another"])  # the mean of each text's final states
```

The vectors come from a masked language model. They are a start for fine-tuning and were not tuned for search.

- Write `I [MASK] a list`, with a space before `[MASK]`. The tokenizer removes that space, and any other white space
  there, because the piece that the model guesses begins with its own space.
- `AutoModel` has no head, so it reports the head's weights as unexpectedPOOLER. This is harmless.
- Pass `truncation=True` for texts that may be too long.
"""
_OUR_TOKENIZER = """\
- Newlines, tabs and runs of spaces are kept.
- The tokenizer gives the ids that the model was trained on, with two exceptions: it reads U+2581 as a space, and
  words such as `[MASK]` or `[SEP]` in a text as special tokens.
"""
_EAGER = """\
- transformers has only eager attention for this class. Exported as `xlm-roberta-xl`, the same model has SDPA and
  FlashAttention too.
"""


def _pretrained(name: str, format: str, about: Pretrained, picture: bool) -> list[str]:
    pooler = "" if format == "modernbert" else ", and a pooler, which nothing uses, as missing"
    text = _LOAD.replace("NAME", name).replace("POOLER", pooler)
    text += _OUR_TOKENIZER if "SentencePiece" in about.vocabulary else ""
    text += _EAGER if format == "megatron-bert" else ""
    return [text, *_data(about), *_training(about, picture)]


def _data(about: Pretrained) -> list[str]:
    meta = about.corpus
    if not meta:
        return []
    held_out = meta["validation_documents"][1] - meta["validation_documents"][0]
    rows = [
        ["sources", ", ".join(meta["sources"])],
        ["documents", f"{meta['documents']:,}, of which {held_out:,} are held out"],
        ["tokens", f"{meta['tokens']:,}"],
        ["vocabulary", about.vocabulary],
    ]
    licence = ""
    if meta["posts"]:
        rows.insert(1, ["posts of Stack Exchange", f"{meta['posts']:,}, with {meta['comments']:,} comments"])
        licence = "The posts and comments are by their authors and under CC BY-SA: 2.5, 3.0 or 4.0, by their date.\n"
    return ["## Data\n", *table(["", ""], rows), "", licence]


_RECIPE = {
    "optimizer": "optimizer", "learning_rate": "peak learning rate", "muon_learning_rate": "peak learning rate of Muon",
    "schedule": "schedule", "tokens_per_batch": "row positions per step", "row_tokens": "tokens in a row",
    "mask_rate": "share of tokens masked", "dropout": "dropout", "weight_decay": "weight decay", "seed": "seed",
}  # fmt: skip


def _training(about: Pretrained, picture: bool) -> list[str]:
    recipe, progress = about.recipe, about.progress
    if not recipe:
        return ["## Training\n", *_history(about)]
    rows = [["steps", f"{progress['step']:,}"], ["tokens seen", f"{progress['real_tokens']:,}"]]
    if (share := progress["consumed_tokens"] / recipe["train_tokens"]) < 1:
        rows.append(["part of the run", f"{share:.0%}: this is a checkpoint before the end"])
    for name, what in _RECIPE.items():
        if name in recipe and (name != "muon_learning_rate" or recipe["optimizer"] == "muon"):
            rows.append([what, recipe[name] if isinstance(recipe[name], str) else f"{recipe[name]:,}"])
    if loss := progress.get("loss"):
        rows.append(["training loss of the last step", f"{loss:.4f} nats"])
    if held_out := about.held_out:
        at = "" if held_out["step"] == progress["step"] else f" at step {held_out['step']:,}"
        rows.append([f"held-out loss{at}", f"{held_out['validation_loss']:.4f} nats"])
        rows.append([f"held-out tokens guessed right{at}", f"{held_out['validation_accuracy']:.1%}"])
    if dollars := about.metrics.get("dollars"):
        rows.append(["cost", f"${dollars:,.2f}"])
    return [
        "## Training\n",
        *_history(about),
        *table(["", ""], rows),
        "",
        *(["![loss](loss.png)\n"] if picture else []),
    ]


def _history(about: Pretrained) -> list[str]:
    """The models from which training continued, the oldest first."""
    lines = []
    for entry in about.history:
        if "imported" in entry:
            lines.append(f"- `{entry['from']}`, a `{entry['imported']}` that was imported")
        else:
            lines.append(f"- `{entry['run']}`, after {entry['row positions']:,} row positions")
    if not lines:
        return []
    return ["Continued from:\n" if about.recipe else "Imported, and not trained since:\n", *lines, ""]


_CLASSIFY = """## How to load it

```python
from transformers import pipeline

classify = pipeline("text-classification", "NAME", top_k=None)
classify("How do I sort a list?", truncation=True)
```
"""

_NUMBER = """## How to load it

```python
from transformers import pipeline

predict = pipeline("text-classification", "NAME", function_to_apply="none")
predict("How do I sort a list?", truncation=True)  # the score is the number
```
"""

_RETRIEVE = """## How to load it

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("NAME")
print(model.similarity(model.encode(["a query"]), model.encode(["a text", "another"])))
```

The vector of a text is the mean of its final states. Compare vectors by their cosine, as `similarity` does.
"""

_TAG = '''## How to load it

```python
import re
from transformers import pipeline

WORD = re.compile(r"""PATTERN""")
text = " ".join(WORD.findall("Use the foo() of numpy."))
tag = pipeline("token-classification", "NAME")
for piece in tag(text):
    if piece["start"] == 0 or text[piece["start"]] == " ":  # the first piece of a word has the word's tag
        print(text[piece["start"] :].split()[0], piece["entity"], piece["score"])
```

The model was trained on sentences of words with one space between them, where each sign is a word too (`foo ( )`), and
on the tag of each word's first piece, which begins with the space. Cut texts into words as above; with
`is_split_into_words` the spaces would be missing. `aggregation_strategy="first"` gives the same entities as long as no
word is so rare that the space before it is a piece by itself.
'''


def _fine_tuned(name: str, about: FineTuned) -> list[str]:
    task, results = about.task, about.results
    text = {"sequence": _CLASSIFY, "token": _TAG, "pair": _RETRIEVE}[task["kind"]]
    text = (_NUMBER if task.get("number") else text).replace("NAME", name)
    text = text.replace("PATTERN", WORD.pattern)
    if task["cleaning"]:
        text += (
            "\nThe texts were cleaned before training, and texts to classify must be too: by "
            f"`minisobert.tasks.TASKS[{task['task']!r}].cleaning[{task['cleaning']!r}]`.\n"
        )
    if task.get("long") == "windows":
        text += (
            "\nThe figures below are those of reading longer texts in overlapping windows. transformers does not do "
            "that: with `truncation=True` it reads their beginning alone.\n"
        )
    seeds, beside = len(results["seeds"]), results.get("beside", {})
    rows = [
        [figure, *(shown(figure, of[figure]) for of in (results["mean"], *beside.values()))]
        for figure in results["mean"]
    ]
    several = "These are means; the model is that of the seed that was best on dev.\n" if seeds > 1 else ""
    learnt = "to predict the number" if task.get("number") else "with the labels"
    labels = f", {learnt} {', '.join(f'`{label}`' for label in task['labels'])}" if task["labels"] else ""
    return [
        text,
        "## Task\n",
        f"`{task['task']}`{labels}. The model was fine-tuned from `{Path(results['model']).name}` on "
        f"{results['counts']['train']:,} examples.\n",
        *table(["on test", f"{seeds} seed{'s' * (seeds > 1)}", *beside], rows),
        "",
        several,
        *(f"- {note}" for note in results["notes"]),
        "",
    ]
