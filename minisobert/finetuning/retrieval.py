"""Embeddings that retrieve: contrastive training on pairs of texts, and how well a query then finds its text.

For a batch of n pairs, whose vectors q_i and c_i are scaled to length 1, with s_ij = q_i · c_j / TEMPERATURE:

    loss = -1/2 Σ_i ( log softmax(s_i·)_i + log softmax(s_·i)_i )

Every other text of the batch is a negative (InfoNCE, van den Oord et al. 2018, in both directions), except texts that
belong to the query by another pair.

More pairs in a batch make harder negatives, but memory can hold the states of only a few tokens. So the vectors are
computed twice, as in GradCache (Gao et al. 2021): first without gradients for the whole batch, which gives the gradient
of the loss in each vector; then part by part, and each part's gradient is propagated back through the model. Dropout
is a counted hash, so it drops the same elements both times.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minisobert.config import ModelConfig
from minisobert.corpus.packing import SPECIALS
from minisobert.corpus.tokenizer import Tokenizer, open_tokenizer
from minisobert.corpus.tokenizer_json import JsonTokenizer
from minisobert.files import read_safetensors
from minisobert.finetuning import encoder, loop
from minisobert.finetuning.config import FineTuneConfig
from minisobert.finetuning.kept import read_task
from minisobert.finetuning.loop import EVAL_TOKENS, Outcome, batches
from minisobert.model import Embedder
from minisobert.ops import Dropout
from minisobert.tasks.dataset import Dataset, Example
from minisobert.tasks.splits import fingerprint

TEMPERATURE = 0.05
MOST = 10_000  # texts that a query of test searches, at most
CHUNK = 1_024  # queries whose similarities to all candidates are in memory at a time


class Search(NamedTuple):
    """Queries, and the texts that they search. targets: (n,) which text belongs to each query. also: (n,) for each
    query, which other texts belong to it; these count neither for nor against it."""

    queries: list[str]
    candidates: list[str]
    targets: np.ndarray
    also: list[np.ndarray]


def search(examples: list[Example], others: Sequence[Example] = (), most: int = MOST) -> Search:
    """The queries of `examples`, which search the texts of `examples` and, up to `most` in all, those of `others`.
    Texts that differ only in case and white space are one text."""
    place: dict[str, int] = {}
    candidates: list[str] = []
    of_query: dict[str, set[int]] = {}
    for i, e in enumerate([*examples, *others]):
        text = fingerprint(e.other)
        if text not in place:
            if i >= len(examples) and len(candidates) >= most:
                continue
            place[text] = len(candidates)
            candidates.append(e.other)
        of_query.setdefault(fingerprint(e.text), set()).add(place[text])
    targets = np.array([place[fingerprint(e.other)] for e in examples])
    also = [np.array(sorted(of_query[fingerprint(e.text)] - {t}), int) for e, t in zip(examples, targets)]
    return Search([e.text for e in examples], candidates, targets, also)


def searches(data: Dataset) -> tuple[Search, Search]:
    """The searches of dev, among its own texts, and of test, among those of all splits."""
    return search(data.dev), search(data.test, [*data.dev, *data.train])


def found(task: Search, queries, candidates) -> list[np.ndarray]:
    """For each query (2,): the rank of its own text, from 1, and the index of the candidate that came first. Texts that
    are exactly as similar as the query's own rank before it.

    queries, candidates: their vectors as rows of length 1, in NumPy or as a sparse matrix of scipy.
    """
    results = []
    for start in range(0, len(task.queries), CHUNK):
        scores = queries[start : start + CHUNK] @ candidates.T
        scores = scores if isinstance(scores, np.ndarray) else scores.toarray()
        for row, target, also in zip(scores, task.targets[start:], task.also[start:]):
            own = row[target]
            row[also] = -np.inf
            rank = int((row >= own).sum())
            row[target] = -np.inf
            results.append(np.array([rank, target if rank == 1 else row.argmax()]))
    return results


class Network:
    """An Embedder with its tokenizer."""

    format, kind = "minisobert", "pair"

    def __init__(self, model: Embedder, tokenizer: Tokenizer | JsonTokenizer, dropout: float = 0.0, seed: int = 0):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module, self.tokenizer = model.to(self.device), tokenizer
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dropout, self.seed = dropout, seed
        self.cut = 0  # texts that were longer than the model reads

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        longest = self.module.config.positions - SPECIALS
        ids = [self.tokenizer.encode(text) for text in texts]
        self.cut += sum(len(each) > longest for each in ids)
        return [encoder.with_specials(each[:longest], self.tokenizer) for each in ids]

    def vectors(self, ids: list[np.ndarray], step: int | None = None, part: int = 0) -> Tensor:
        """(n, h) fp32 vectors of length 1. step, part: the training step and the part of its batch, for dropout; no
        dropout if step is None."""
        dropout = None
        if step is not None:
            layers = self.module.config.layers
            dropout = Dropout.for_step(self.dropout, self.seed, step, layers, self.device)
            # each part has masks of its own
            dropout = dropout and dataclasses.replace(dropout, token_offset=part << 20)
        return F.normalize(self.module(*encoder.packed(ids, self.device), dropout))

    @torch.no_grad()
    def embed(self, ids: list[np.ndarray]) -> np.ndarray:
        """(n, h) fp32 vectors of length 1."""
        lengths = np.array([len(each) for each in ids])
        result = np.empty((len(ids), self.module.config.hidden), np.float32)
        for batch in batches(lengths, EVAL_TOKENS, np.argsort(lengths, kind="stable")):
            result[batch] = self.vectors([ids[i] for i in batch]).cpu().numpy()
        return result

    def backward(
        self, queries: list[np.ndarray], others: list[np.ndarray], no_negatives: Tensor, tokens: int, step: int
    ) -> float:
        """Adds the gradient of the summed loss of a batch, and returns that loss. no_negatives: (n, n) bool, True where
        a query and the text of another pair belong together. tokens: the most that a part may have."""
        ids = [*queries, *others]
        lengths = np.array([len(each) for each in ids])
        parts = list(batches(lengths, tokens, np.argsort(lengths, kind="stable")))
        if len(parts) == 1:  # no need to compute them twice
            made = self.vectors(ids, step)
            loss = contrastive_loss(made[: len(queries)], made[len(queries) :], no_negatives.to(self.device))
            loss.backward()
            return float(loss.detach())
        made = torch.empty(len(ids), self.module.config.hidden, device=self.device)
        with torch.no_grad():
            for i, part in enumerate(parts):
                made[part] = self.vectors([ids[j] for j in part], step, i)
        made.requires_grad_()
        loss = contrastive_loss(made[: len(queries)], made[len(queries) :], no_negatives.to(self.device))
        (gradient,) = torch.autograd.grad(loss, made)
        for i, part in enumerate(parts):
            self.vectors([ids[j] for j in part], step, i).backward(gradient[part])
        return float(loss.detach())

    def save(self, folder: Path) -> None:
        encoder.save(folder, self.module, self.tokenizer)


def contrastive_loss(queries: Tensor, others: Tensor, no_negatives: Tensor) -> Tensor:
    """The loss, summed over the pairs. queries, others: (n, h) vectors of length 1. no_negatives: (n, n) bool, False on
    the diagonal."""
    similarities = (queries @ others.T / TEMPERATURE).masked_fill(no_negatives, -torch.inf)
    own = similarities.diagonal()
    return (similarities.logsumexp(1) + similarities.logsumexp(0) - 2 * own).sum() / 2


class Start(encoder.Start):
    """A starting point for pairs: an encoder, or the result of an earlier training on pairs."""

    def __init__(self, config: FineTuneConfig):
        """Raises ValueError if there is no such model."""
        folder = Path(config.model) / "model"
        if not (folder / "task.json").is_file():
            super().__init__(config)
            return
        if config.tokenizer:
            raise ValueError("--tokenizer is for random:PRESET; a model has its own")
        if (kind := read_task(folder)["kind"]) != "pair":
            raise ValueError(f"{config.model} was fine-tuned on a task of the kind {kind}; give a run, or one of pairs")
        self.config, network = config, open_network(folder)
        self.tokenizer, self.trained, self.model_config = network.tokenizer, network.module, network.module.config

    def train(self, data: Dataset, seed: int, score: Callable[[list[np.ndarray]], float]) -> Outcome:
        model = Embedder(self.model_config).initialise(seed)
        if self.trained is not None:
            model.encoder.load_state_dict(self.trained.encoder.state_dict())
        network = Network(model, self.tokenizer, self.config.dropout, seed)
        dev, test = searches(data)
        texts = [text for e in data.train for text in (e.text, e.other)]
        texts += [text for task in (dev, test) for part in (task.queries, task.candidates) for text in part]
        texts = list(dict.fromkeys(texts))
        ids = dict(zip(texts, network.encode(texts)))
        loop.note_cut(network, data)
        short = {text: self._shortened(ids[text]) for e in data.train for text in (e.text, e.other)}
        lengths = np.array([len(short[e.text]) + len(short[e.other]) for e in data.train])
        same_text, same_other = (
            torch.from_numpy(np.unique([fingerprint(text) for text in side], return_inverse=True)[1])
            for side in ([e.text for e in data.train], [e.other for e in data.train])
        )

        def cut_into(order: np.ndarray) -> Iterator[list[int]]:
            size = self.config.pairs_per_batch
            yield from (order[i : i + size].tolist() for i in range(0, len(order), size))

        def backward(batch: list[int], step: int) -> tuple[float, float]:
            together = sum(same[batch][:, None] == same[batch] for same in (same_text, same_other)) > 0
            together.fill_diagonal_(False)
            examples = [data.train[i] for i in batch]
            queries, others = [short[e.text] for e in examples], [short[e.other] for e in examples]
            return network.backward(queries, others, together, self.config.tokens_per_batch, step), len(batch)

        def ranks(task: Search) -> list[np.ndarray]:
            queries, candidates = (
                network.embed([ids[text] for text in part]) for part in (task.queries, task.candidates)
            )
            return found(task, queries, candidates)

        def on_dev() -> tuple[float, float, list[np.ndarray]]:
            results = ranks(dev)
            return score(results), float(np.log([rank for rank, _ in results]).mean()), results

        before = ranks(test)
        outcome = loop.train(network, self.config, seed, lengths, cut_into, backward, on_dev)
        return dataclasses.replace(outcome, test=ranks(test), before=before)

    def _shortened(self, ids: np.ndarray) -> np.ndarray:
        """The ids that training reads: at most pair_tokens of them, with [SEP] at the end."""
        most = self.config.pair_tokens - 1
        return np.concatenate([ids[:most], ids[-1:]]) if len(ids) > most + 1 else ids


def open_network(folder: Path) -> Network:
    """Opens what `save` wrote."""
    model = Embedder(ModelConfig(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(read_safetensors(folder / "model.safetensors"))
    return Network(model, open_tokenizer(folder))
