"""Our models on a task: whole documents in a row, without padding.

A document with more tokens than the model has positions is cut there, or read in overlapping windows of that length.
Then the logits of the document are the mean over its windows, and those of a word come from the window in which the
word is furthest from an edge.

`save` writes a folder with

    model.safetensors    the weights, under the model's own names
    config.json          the model's sizes
    tokenizer.model      the tokenizer of the run; tokenizer.json for an imported model
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minisobert.cli import words
from minisobert.config import PRESETS, ModelConfig, padded_vocabulary
from minisobert.corpus.packing import SPECIALS
from minisobert.corpus.tokenizer import Tokenizer, open_tokenizer
from minisobert.corpus.tokenizer_json import JsonTokenizer
from minisobert.files import read_safetensors, write_json, write_safetensors
from minisobert.finetuning.config import FineTuneConfig
from minisobert.finetuning.loop import EVAL_TOKENS, Encoded, Outcome, batches, fit
from minisobert.hub.importing import open_model
from minisobert.model import Classifier, Model
from minisobert.ops import Documents, Dropout
from minisobert.tasks.dataset import Dataset, Example

# A share of a window. In one window at least, a word is an eighth of a window away from both edges (unless the text
# begins or ends there); it costs a third more tokens.
OVERLAP = 0.25


class Network:
    """A Classifier with its tokenizer, as `loop.fit` takes it."""

    format = "minisobert"

    def __init__(
        self, model: Classifier, tokenizer: Tokenizer | JsonTokenizer, kind: str, dropout: float = 0.0, seed: int = 0,
        several: bool = False, number: bool = False, long: str = "cut",
    ):  # fmt: skip
        """long: what to do with texts that are longer than the model reads: "cut" or "windows"."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module, self.tokenizer, self.kind = model.to(device), tokenizer, kind
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.device, self.dropout, self.seed = device, dropout, seed
        self.several = len(model.classifier.weight) if several else 0
        self.number, self.in_windows = number, long == "windows"
        self.cut = self.windows = 0  # examples longer than the model reads, and windows into which they were cut

    def encode(self, examples: list[Example]) -> list[Encoded]:
        return [self._document(e) if self.kind == "sequence" else self._sentence(e) for e in examples]

    def _document(self, example: Example) -> Encoded:
        ids = self.tokenizer.encode(example.text)
        return Encoded.document(example, *self._read(ids, self._spans(len(ids))), self.several, self.number)

    def _sentence(self, example: Example) -> Encoded:
        """Reads the words with a space between them. No piece spans two words; a word's first piece has the space."""
        pieces = [self.tokenizer.encode(f" {word}" if i else word) for i, word in enumerate(example.words)]
        lengths = np.array([len(p) for p in pieces], dtype=np.int64)  # int64 also if there are no words
        stop = np.cumsum(lengths)
        spans = self._spans(int(lengths.sum()))
        ids, seams = self._read(np.concatenate([np.empty(0, np.int64), *pieces]), spans)
        places = places_in_windows(stop - lengths, stop, spans)
        kept = np.flatnonzero((places >= 0) & (lengths > 0))
        return Encoded.sentence(example, ids, places[kept], kept, seams)

    def _spans(self, n: int) -> list[tuple[int, int]]:
        """(begin, end) of each window of n ids."""
        longest = self.module.config.positions - SPECIALS
        if n <= longest:
            return [(0, n)]
        self.cut += 1
        spans = window_spans(n, longest) if self.in_windows else [(0, longest)]
        self.windows += len(spans) if self.in_windows else 0
        return spans

    def _read(self, ids: np.ndarray, spans: list[tuple[int, int]]) -> tuple[np.ndarray, tuple[int, ...]]:
        """`ids` and `seams` of an Encoded."""
        windows = [with_specials(ids[start:stop], self.tokenizer) for start, stop in spans]
        return np.concatenate(windows), tuple(np.cumsum([len(each) for each in windows[:-1]], dtype=int).tolist())

    def parts(self, items: list[Encoded], tokens: int) -> list[list[Encoded]]:
        return [items]  # nothing is padded

    def logits(self, items: list[Encoded], step: int | None) -> Tensor:
        windows = [window for item in items for window in np.split(item.ids, item.seams)]
        begins = np.cumsum([0] + [len(item.ids) for item in items])
        places = np.concatenate([item.places + begin for item, begin in zip(items, begins)])
        dropout = None
        if step is not None:  # keys for one more layer than there are: the classifier
            layers = self.module.config.layers + 1
            dropout = Dropout.for_step(self.dropout, self.seed, step, layers, self.device)
        lengths = np.array([len(window) for window in windows])
        # without gradients, the windows of one long text need not be in memory together
        together = EVAL_TOKENS if step is None else int(lengths.sum())
        stops, logits = np.cumsum(lengths), []  # places increase, since later words are in later windows
        for part in batches(lengths, together, np.arange(len(windows))):
            start, stop = stops[part[0]] - lengths[part[0]], stops[part[-1]]
            inside = places[(places >= start) & (places < stop)] - start
            row = packed([windows[i] for i in part], self.device)
            logits.append(self.module(*row, torch.from_numpy(inside).to(self.device), dropout))
        if self.kind == "sequence" and len(windows) > len(items):
            counts = torch.tensor([len(item.places) for item in items], device=self.device)
            return torch.segment_reduce(torch.cat(logits).float(), "mean", lengths=counts, axis=0)
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def save(self, folder: Path) -> None:
        save(folder, self.module, self.tokenizer)


def save(folder: Path, model: Model, tokenizer: Tokenizer | JsonTokenizer) -> None:
    """Writes the files that the head of this file lists."""
    weights = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    write_safetensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", dataclasses.asdict(model.config))
    (folder / tokenizer.file_name).write_bytes(tokenizer.content)


def with_specials(ids: np.ndarray, tokenizer: Tokenizer | JsonTokenizer) -> np.ndarray:
    """A document as a model reads it, int64: [CLS] … [SEP]."""
    special = tokenizer.vocabulary
    return np.concatenate([[special.cls], ids, [special.sep]]).astype(np.int64)


def window_spans(n: int, longest: int) -> list[tuple[int, int]]:
    """(begin, end) of each window: the fewest that cover n > longest tokens and overlap by at least OVERLAP. All are as
    long as the model reads, and evenly spaced, so that no short window counts as much as a whole one."""
    apart = longest - int(OVERLAP * longest)
    count = 1 - (longest - n) // apart  # n - longest over apart, rounded up, and the first
    return [(start, start + longest) for start in (i * (n - longest) // (count - 1) for i in range(count))]


def places_in_windows(first: np.ndarray, stop: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """(W,) the place of each word's first token in the concatenated windows, which include [CLS] and [SEP]. It is taken
    from the window in which the word is furthest from an edge, and is -1 if no window holds the word's beginning.

    first, stop: (W,) begin and end of each word in the ids of the text. spans: (begin, end) of each window in them."""
    places = np.full(len(first), -1)
    most = np.full(len(first), np.iinfo(np.int64).min)
    begin = 0
    for left, right in spans:
        room = np.minimum(first - left, right - stop)
        better = (left <= first) & (first < right) & (room > most)
        places[better], most[better] = begin + 1 + first[better] - left, room[better]
        begin += right - left + SPECIALS
    return places


def packed(documents: list[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor, Documents]:
    """Some documents, one after the other: tokens (T,), positions (T,), and the bounds of each document."""
    lengths = [len(ids) for ids in documents]
    positions = torch.cat([torch.arange(n) for n in lengths])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    tokens = torch.from_numpy(np.concatenate(documents))
    return tokens.to(device), positions.to(device), Documents.from_bounds(bounds, device)


def open_network(folder: Path, task: dict) -> Network:
    """Opens what `save` wrote. task: the content of the task.json beside it."""
    config = ModelConfig(**json.loads((folder / "config.json").read_text()))
    pooling = task.get("pooling", "cls") if task["kind"] == "sequence" else ""  # 0.1.0 had "cls" only
    model = Classifier(config, len(task["labels"]), pooling)
    model.load_state_dict(read_safetensors(folder / "model.safetensors"))
    return Network(
        model, open_tokenizer(folder), task["kind"], several=task.get("several", False),
        number=task.get("number", False), long=task.get("long", "cut"),
    )  # fmt: skip


class Start:
    """A starting point: the encoder of a run, or random weights with the sizes of a run or a preset."""

    def __init__(self, config: FineTuneConfig):
        """Raises ValueError if there is no such model, or if its tokenizer is that of another."""
        self.config, self.trained = config, None
        source, _, like = config.model.partition(":")
        if source == "random" and like in PRESETS:
            if not config.tokenizer:
                raise ValueError(
                    f"{config.model} needs --tokenizer; give the train.py run, or the tokenizer.model, of the model "
                    "that it is compared with, so that the two differ only in their weights"
                )
            self.tokenizer = open_tokenizer(config.tokenizer)
            vocabulary = padded_vocabulary(self.tokenizer.vocab_size)
            self.model_config = dataclasses.replace(PRESETS[like], vocabulary=vocabulary)
            return
        if source == "random" and not Path(like).is_dir():
            raise ValueError(
                f"--model is {config.model}; give random: and the folder of a train.py run, for a model as large "
                f"as that run's, or {words(f'random:{name}' for name in PRESETS)}"
            )
        run = like if source == "random" else config.model
        if not Path(run).is_dir():
            raise ValueError(
                f"--model is {config.model}, which is not a folder; give a run, an export, random: before one, or "
                f"{words([*(f'random:{name}' for name in PRESETS), 'hf:NAME_OR_PATH', 'tfidf'])}"
            )
        if config.tokenizer:
            raise ValueError("--tokenizer is for random:PRESET; a run has its own")
        trained = open_model(run)
        self.tokenizer, self.model_config = trained.tokenizer, trained.model.config
        self.trained = None if source == "random" else trained.model

    def train(self, data: Dataset, seed: int, score: Callable[[list[np.ndarray]], float]) -> Outcome:
        pooling = self.config.pooling if data.kind == "sequence" else ""
        model = Classifier(self.model_config, len(data.labels), pooling).initialise(seed)
        if self.trained is not None:
            model.start_from(self.trained)
        network = Network(
            model, self.tokenizer, data.kind, self.config.dropout, seed, data.several, data.number, self.config.long
        )
        return fit(network, data, self.config, seed, score)
