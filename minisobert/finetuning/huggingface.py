"""Hugging Face's encoders on a task: any to which transformers can add a classifier, with its tokenizer (extra [hf]).

The loop and the batches are the same as for our models, but a batch goes through the network in padded parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minisobert.finetuning.config import FineTuneConfig
from minisobert.finetuning.loop import Encoded, Outcome, fit
from minisobert.finetuning.standard import last_layer
from minisobert.tasks import TASKS
from minisobert.tasks.dataset import Dataset, Example

LONGEST = 2_048  # tokens that are read at most, and the length of a model that states none


class Start:
    """A starting point: `hf:NAME_OR_PATH`."""

    def __init__(self, config: FineTuneConfig):
        self.config, self.name = config, config.model.removeprefix("hf:")
        if config.tokenizer:
            raise ValueError(f"--tokenizer is for random:PRESET; {config.model} has its own")
        with explained(self.name):
            # words of a sentence have a space before them; byte-level tokenizers must be told so, others ignore it
            words = {"add_prefix_space": True} if TASKS[config.task].kind == "token" else {}
            self.tokenizer = _transformers().AutoTokenizer.from_pretrained(self.name, **words)
        _check_tokenizer(self.name, self.tokenizer)

    def train(self, data: Dataset, seed: int, score: Callable[[list[np.ndarray]], float]) -> Outcome:
        torch.manual_seed(seed)  # for the classifier's weights, and for dropout in the loop
        names = dict(enumerate(data.labels))
        with explained(self.name):
            module, found = _auto(data.kind).from_pretrained(
                self.name, id2label=names, label2id={name: i for i, name in names.items()}, dtype=torch.float32,
                ignore_mismatched_sizes=True,  # a classifier of another task is replaced
                output_loading_info=True,
            )  # fmt: skip
        _check_weights(self.name, module.base_model_prefix, found)
        if data.number:  # a layer that is there already may predict another number, in another unit
            last_layer(module).reset_parameters()
        network = Network(module, self.tokenizer, data.kind, data.several, data.number)
        return fit(network, data, self.config, seed, score)


class Network:
    """A model of transformers with its tokenizer, as `loop.fit` takes it."""

    format = "transformers"
    dtype = torch.float32  # of the parameters; on a GPU autocast computes in bf16

    def __init__(self, module, tokenizer, kind: str, several: bool = False, number: bool = False):
        if len(tokenizer) > (rows := module.get_input_embeddings().weight.shape[0]):
            raise ValueError(
                f"the tokenizer of {module.name_or_path} has {len(tokenizer):,} ids, but the model has {rows:,} rows "
                "of embeddings; it is the tokenizer of another model"
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.module, self.tokenizer, self.kind = module.to(self.device), tokenizer, kind
        self.several = module.config.num_labels if several else 0
        if several:
            module.config.problem_type = "multi_label_classification"  # makes their pipelines use sigmoids
        self.number = number
        if number:
            module.config.problem_type = "regression"  # makes their pipelines leave the number as it is
        positions = getattr(module.config, "max_position_embeddings", None) or LONGEST
        if any(family in module.config.model_type for family in ("roberta", "camembert", "longformer", "mpnet")):
            positions -= module.config.pad_token_id + 1  # their positions begin after the padding id
        self.longest = min(positions, tokenizer.model_max_length, LONGEST)

    def encode(self, examples: list[Example]) -> list[Encoded]:
        if self.kind == "sequence":
            batch, words = [e.text for e in examples], False
        else:
            batch, words = [list(e.words) for e in examples], True
        found = self.tokenizer(batch, truncation=True, max_length=self.longest, is_split_into_words=words)
        ids = [np.array(each, dtype=np.int64) for each in found["input_ids"]]
        if not words:
            return [
                Encoded.document(e, each, several=self.several, number=self.number) for e, each in zip(examples, ids)
            ]
        items = []
        for i, (e, each) in enumerate(zip(examples, ids)):
            word = np.array([-1 if w is None else w for w in found.word_ids(i)])
            kept, places = np.unique(word, return_index=True)  # the first piece of each word
            items.append(Encoded.sentence(e, each, places[kept >= 0], kept[kept >= 0]))
        return items

    def parts(self, items: list[Encoded], tokens: int) -> list[list[Encoded]]:
        """Groups items of similar length, with at most `tokens` places in a group, padding included."""
        parts: list[list[Encoded]] = []
        for item in sorted(items, key=lambda item: len(item.ids)):
            if not parts or (len(parts[-1]) + 1) * len(item.ids) > tokens:
                parts.append([])
            parts[-1].append(item)
        return parts

    def logits(self, items: list[Encoded], step: int | None) -> Tensor:
        self.module.train(step is not None)
        lengths = torch.tensor([len(item.ids) for item in items])
        ids = torch.full((len(items), int(lengths.max())), self.tokenizer.pad_token_id)
        for row, item in zip(ids, items):
            row[: len(item.ids)] = torch.from_numpy(item.ids)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        # the numbers that a trained network gives must not be rounded to 8 bits
        rounded = self.device.type == "cuda" and not (self.number and step is None)
        with torch.autocast("cuda", torch.bfloat16, enabled=rounded):
            logits = self.module(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
        if self.kind == "token":
            at = [i * ids.shape[1] + item.places for i, item in enumerate(items)]
            logits = logits.flatten(0, 1).index_select(0, torch.from_numpy(np.concatenate(at)).to(self.device))
        return logits.float()

    def save(self, folder: Path) -> None:
        self.module.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def open_network(folder: Path, task: dict) -> Network:
    """Opens what `Network.save` wrote. task: the content of the task.json beside it."""
    transformers = _transformers()
    with explained(str(folder)):
        module = _auto(task["kind"]).from_pretrained(folder)
        return Network(
            module, transformers.AutoTokenizer.from_pretrained(folder), task["kind"], task.get("several", False),
            task.get("number", False),
        )  # fmt: skip


def _transformers():
    try:
        import transformers
    except ImportError:
        raise ValueError("models of Hugging Face need transformers: pip install 'minisobert[hf]'") from None
    transformers.logging.set_verbosity_error()  # it would warn that the classifier is new, as it should be
    return transformers


def _auto(kind: str):
    transformers = _transformers()
    sequence = kind == "sequence"
    return transformers.AutoModelForSequenceClassification if sequence else transformers.AutoModelForTokenClassification


@contextlib.contextmanager
def explained(name: str):
    """Turns any error of transformers into a ValueError with a message of one line."""
    try:
        yield
    except Exception as error:  # the class of safetensors' errors has no narrower base
        reason = " ".join(str(error).split())
        raise ValueError(f"transformers cannot load {name} here: {reason[:300]}") from None


def _check_tokenizer(name: str, tokenizer) -> None:
    if tokenizer.pad_token_id is None or not tokenizer.is_fast:
        lacks = "padding token" if tokenizer.pad_token_id is None else "fast form, which knows the pieces of a word"
        raise ValueError(f"the tokenizer of {name} has no {lacks}; choose another model")


def _check_weights(name: str, encoder: str, found: dict) -> None:
    """Raises ValueError if the files lack weights of the encoder, which would then be random. A head may be new.

    encoder: the name of the encoder within the model. found: transformers' account of what it has loaded."""
    keys = [key if isinstance(key, str) else key[0] for key in (*found["missing_keys"], *found["mismatched_keys"])]
    lost = sorted(key for key in keys if key.startswith(f"{encoder}.") and ".pooler." not in key)
    if lost:
        raise ValueError(
            f"{name} lacks {len(lost):,} weights of its encoder, or has them in another size ({lost[0]}, …); "
            "its files do not belong together"
        )
