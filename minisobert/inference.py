"""A trained model in three lines.

    import minisobert
    model = minisobert.load("runs/base")
    model.fill_mask("How do I [MASK] a list in Python?")

It loads a run of `train.py`, the result of a `finetune.py`, or a folder in Hugging Face's format with a model that
minisobert supports. Texts are packed one after another into batches by tokens, without padding.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from minisobert.corpus.packing import SPECIALS
from minisobert.finetuning import apply, encoder, huggingface
from minisobert.finetuning.apply import CHUNK, PATIENCE
from minisobert.finetuning.baselines import Linear
from minisobert.finetuning.loop import EVAL_TOKENS, batches
from minisobert.hub import importing
from minisobert.model import MaskedLM, mean_states
from minisobert.ops import Documents
from minisobert.tasks.dataset import Example
from minisobert.tasks.words import word_spans
from minisobert.training.run import Trained


class Entity(NamedTuple):
    kind: str
    start: int  # in characters of its text
    stop: int
    text: str


class Loaded:
    """A model ready for use. model: a MaskedLM or a Classifier, in fp32. tokenizer: its `encode` and `decode` are used.
    Both are None for TF-IDF. labels: those of a fine-tuned model, in the order of its columns."""

    def __init__(self, name: str, model, tokenizer, network=None, labels: Sequence[str] = (), clean=str):
        """network: of a fine-tuned model, as fine-tuning has it; clean: applied to each text before it is read."""
        self._name, self._network, self._clean, self.labels = name, network, clean, tuple(labels)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.tokenizer = model and model.to(self.device).eval(), tokenizer

    def fill_mask(self, text: str, best: int = 5) -> list[list[tuple[str, float]]]:
        """The `best` likeliest pieces for each [MASK] of a text, with their probabilities. A [MASK] is one piece.

        A piece includes the space before it. Raises ValueError if there is no [MASK], the text is too long, or the
        model was fine-tuned and guesses no words.
        """
        if not isinstance(self.model, MaskedLM):
            raise ValueError(f"{self._name} was fine-tuned and no longer guesses words; load the run it began with")
        return guess(self, *with_masks(self, text), best)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, h) fp32: for each text the mean of its final states, including [CLS] and [SEP], as sentence-transformers
        computes it. Compare vectors by cosine. Texts that are too long are cut, with a note on standard error."""
        texts = _several(texts)
        if self.model is None:
            raise ValueError(f"{self._name} is TF-IDF, which has no embeddings; load a run")
        if isinstance(self._network, huggingface.Network):
            raise ValueError(f"{self._name} is a model of transformers; take its embeddings there")
        vectors = np.empty((len(texts), self.model.config.hidden), np.float32)
        for indices, ids in self._batches(texts):
            tokens, positions, documents = encoder.packed(ids, self.device)
            states = self.model.encoder(tokens, positions, documents)
            vectors[indices] = mean_states(states, documents).cpu().numpy()
        return vectors

    def classify(self, texts: Sequence[str]) -> np.ndarray:
        """(n, classes): for each text the probability of each of `labels`. They add up to 1 unless a text may have
        several labels. Raises ValueError if the model was not fine-tuned to classify texts."""
        self._check("sequence", "classifies")
        if self._network.number:
            raise ValueError(f"{self._name} predicts a number, {self.labels[0]}, not classes; call numbers(texts)")
        return self._of_documents(texts)

    def numbers(self, texts: Sequence[str]) -> np.ndarray:
        """(n,): the number predicted for each text, by a model of --number. Raises ValueError if the model was not
        fine-tuned to predict numbers."""
        self._check("sequence", "predicts numbers of")
        if not self._network.number:
            raise ValueError(f"{self._name} predicts classes, not a number; call classify(texts)")
        return self._of_documents(texts)[:, 0]

    def _of_documents(self, texts: Sequence[str]) -> np.ndarray:
        texts = _several(texts)
        found = [p[0] for p in self._predict([Example(str(i), self._clean(text)) for i, text in enumerate(texts)])]
        return np.stack(found) if found else np.empty((0, len(self.labels)))

    def entities(self, texts: Sequence[str]) -> list[list[Entity]]:
        """The entities of each text, in order. `tasks.words` defines how texts are cut into words. Raises ValueError if
        the model was not fine-tuned to find entities."""
        self._check("token", "tags")
        texts = [self._clean(text) for text in _several(texts)]
        spans = [word_spans(text) for text in texts]
        examples = [
            Example(str(i), text, words=tuple(text[slice(*span)] for span in inside))
            for i, (text, inside) in enumerate(zip(texts, spans))
        ]
        results = []
        for text, inside, p in zip(texts, spans, self._predict(examples)):
            found = apply.entities(self.labels, inside, p)
            results.append([Entity(kind, start, stop, text[start:stop]) for kind, start, stop in found])
        return results

    def _check(self, kind: str, does: str) -> None:
        if self._network is None or self._network.kind != kind:
            raise ValueError(f"{self._name} is not a model that {does} texts; load a result of finetune.py that does")

    def _predict(self, examples: list[Example]) -> Iterator[np.ndarray]:
        with tqdm(total=len(examples), unit="text", delay=PATIENCE) as bar:
            for start in range(0, len(examples), CHUNK):
                part = examples[start : start + CHUNK]
                yield from apply.probabilities(self._network, part)
                bar.update(len(part))
        apply.say_cut(self._network, len(examples))

    def _batches(self, texts: list[str]) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """Yields, for each batch, the indices of its texts and their ids."""
        longest = self.model.config.positions - SPECIALS
        cut = 0
        with tqdm(total=len(texts), unit="text", delay=PATIENCE) as bar:
            for start in range(0, len(texts), CHUNK):
                encoded = [self.tokenizer.encode(self._clean(text)) for text in texts[start : start + CHUNK]]
                cut += sum(len(ids) > longest for ids in encoded)
                ids = [encoder.with_specials(each[:longest], self.tokenizer) for each in encoded]
                for batch in batches(np.array([len(each) for each in ids]), EVAL_TOKENS, np.arange(len(ids))):
                    yield [start + i for i in batch], [ids[i] for i in batch]
                    bar.update(len(batch))
        if cut:
            print(f"{cut:,} of {len(texts):,} texts were cut to their first {longest:,} tokens", file=sys.stderr)


def load(path: str | Path) -> Loaded:
    """The model of a train.py run, of a finetune.py result, or of a folder in Hugging Face's format. Raises ValueError
    if there is none that can be loaded."""
    folder, name = Path(path), str(path)
    if (folder / "model/task.json").is_file():
        network, task, clean = apply.open_fine_tuned(folder)
        if isinstance(network, Linear):
            return Loaded(name, None, None, network, task["labels"], clean)
        if task["kind"] == "pair":
            return Loaded(name, network.module, network.tokenizer)
        return Loaded(name, network.module, network.tokenizer, network, task["labels"], clean)
    if (folder / "checkpoints").is_dir() or not (folder / "config.json").is_file():
        trained = importing.open_model(folder)
        return Loaded(name, trained.model, trained.tokenizer)
    imported = importing.read(folder)
    network = None
    if imported.labels:
        kind = "sequence" if imported.of_documents else "token"
        network = encoder.Network(
            imported.model, imported.tokenizer, kind, several=imported.several, number=imported.number
        )
    return Loaded(name, imported.model, imported.tokenizer, network, imported.labels)


def _several(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("give a list of texts, even for a single one")
    return list(texts)


@torch.no_grad()
def guess(
    trained: Trained | Loaded, ids: np.ndarray, masked: list[int], best: int = 3
) -> list[list[tuple[str, float]]]:
    """The `best` likeliest pieces, with their probabilities, for each masked place of a text.

    ids: (n,) of the text, without specials; masked: the indices that the model must not see. Raises ValueError if the
    text is too long, or `best` is out of range.
    """
    positions = trained.model.config.positions
    if len(ids) > positions - SPECIALS:
        raise ValueError(f"the text has {len(ids):,} tokens; the model reads up to {positions - SPECIALS:,}")
    if not 1 <= best <= trained.tokenizer.vocab_size:
        raise ValueError(f"best is {best:,}; it must be from 1 to {trained.tokenizer.vocab_size:,}, the vocabulary")
    special = trained.tokenizer.vocabulary
    tokens = torch.tensor([special.cls, *ids.tolist(), special.sep])
    places = torch.tensor(masked) + 1
    tokens[places] = special.mask
    device = next(trained.model.parameters()).device
    documents = Documents.from_bounds([0, len(tokens)], device)
    logits = trained.model(tokens.to(device), torch.arange(len(tokens)).to(device), documents, places.to(device))
    # ids beyond the vocabulary are padding of the matrix: no text has them
    probabilities, pieces = logits[:, : trained.tokenizer.vocab_size].softmax(1).topk(best)
    return [
        [(trained.tokenizer.decode([piece]), p) for piece, p in zip(*row)]
        for row in zip(pieces.tolist(), probabilities.tolist())
    ]


def with_masks(trained: Trained | Loaded, text: str) -> tuple[np.ndarray, list[int]]:
    """The ids of a text in which each [MASK] is one piece, and the places of these. Raises ValueError if it has none.

    A piece includes the space before it, so " [MASK]" is one: no model has seen a separate space before a word.
    """
    parts = text.replace(" [MASK]", "[MASK]").split("[MASK]")
    if len(parts) == 1:
        raise ValueError('the text has no [MASK]; write one where the model should guess, as in "for i in [MASK](10):"')
    ids, places = [trained.tokenizer.encode(parts[0])], []
    for part in parts[1:]:
        places.append(sum(map(len, ids)))
        ids += [np.array([trained.tokenizer.vocabulary.mask]), trained.tokenizer.encode(part)]
    return np.concatenate(ids).astype(np.int64), places
