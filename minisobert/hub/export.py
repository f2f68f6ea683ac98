"""Writes a trained model as a folder that transformers and sentence-transformers load without any code of ours.

    model.safetensors            fp32 weights, under transformers' names
    config.json                  the sizes; for a classifier, its labels too
    tokenizer.json, …            see tokenizer_json.py
    modules.json, 1_Pooling/ …   for a run or a model of pairs: sentence-transformers' mean pooling
    README.md, loss.png          the model card

None of those libraries is needed to write it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from minisobert.corpus.tokenizer import Tokenizer
from minisobert.corpus.tokenizer_json import JsonTokenizer
from minisobert.files import new_folder, write_json, write_safetensors
from minisobert.finetuning import encoder, retrieval
from minisobert.finetuning.kept import read_task
from minisobert.hub import card
from minisobert.hub.configuration import configuration
from minisobert.hub.tokenizer_json import tokenizer_files
from minisobert.hub.weights import to_theirs
from minisobert.model import Model
from minisobert.plot import plot
from minisobert.training.run import checkpoint_of, open_run

# The names of transformers' classes, up to "For…"
CLASSES = {"modernbert": "ModernBert", "megatron-bert": "MegatronBert", "xlm-roberta-xl": "XLMRobertaXL"}
NEVER = -1e4  # the decoder's bias for ids without a piece, so that no mask is filled with one; fp16 can hold it


@dataclass
class Source:
    """What to export. kind: KIND of `transformers.AutoModelForKIND`, or "" for AutoModel."""

    model: Model
    tokenizer: Tokenizer | JsonTokenizer
    kind: str
    dropout: float
    labels: Sequence[str] = ()
    several: bool = False  # a text may have several of the labels
    number: bool = False  # the one label is the name of a number


def export(source: str, out: str, format: str = "", checkpoint: str = "") -> str:
    """Writes the run or the fine-tuned model in the folder `source` as the folder `out`. Returns the format.

    format: one of `weights.FORMATS`; "" chooses modernbert or xlm-roberta-xl by the architecture. checkpoint: that of a
    run, "last" (or ""), "best" or "step-N". Raises ValueError if there is no such model, if the format is of another
    architecture, or if `out` exists.
    """
    with new_folder(out) as folder:
        if (Path(source) / "model/task.json").is_file():
            if checkpoint:
                raise ValueError(
                    f"--checkpoint is for runs of train.py, and {source} is a fine-tuned model; leave it out"
                )
            found, about = _fine_tuned(Path(source))
        else:
            found, about = _run(Path(source), checkpoint or "last")
        format = format or ("modernbert" if found.model.config.is_modern else "xlm-roberta-xl")
        write(folder, found, format)
        picture = found.kind == "MaskedLM" and _picture(Path(source), folder / "loss.png")
        text = card.card(Path(out).name, format, found.model, about, picture)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return format


def _run(run: Path, which: str) -> tuple[Source, card.Pretrained]:
    path = checkpoint_of(run, which)
    trained = open_run(run, path)
    about = card.pretrained(run, path, trained)
    return Source(trained.model, trained.tokenizer, "MaskedLM", about.recipe.get("dropout", 0.0)), about


def _fine_tuned(out: Path) -> tuple[Source, card.FineTuned]:
    task = read_task(out / "model")
    if task["format"] == "transformers":
        raise ValueError(f"{out / 'model'} is in Hugging Face's format already; use that folder")
    if task["format"] == "tfidf":
        raise ValueError(f"{out} is TF-IDF, for which Hugging Face has no format; export a neural network")
    results = json.loads((out / "metrics.json").read_text())
    if task["kind"] == "pair":
        network = retrieval.open_network(out / "model")
        source = Source(network.module, network.tokenizer, "", results["settings"]["dropout"])
        return source, card.FineTuned(task, results)
    network = encoder.open_network(out / "model", task)
    kind = "SequenceClassification" if task["kind"] == "sequence" else "TokenClassification"
    dropout = results["settings"]["dropout"]
    source = Source(
        network.module, network.tokenizer, kind, dropout, task["labels"], bool(network.several), network.number
    )
    return source, card.FineTuned(task, results)


def write(folder: Path, source: Source, format: str) -> None:
    """Writes all files except the card."""
    config = source.model.config
    named = {name: parameter.detach().float() for name, parameter in source.model.named_parameters()}
    if source.kind == "MaskedLM":
        if config.gelu == "tanh" and format == "xlm-roberta-xl":
            raise ValueError(
                "this model has the tanh form of GELU, and xlm-roberta-xl has the exact one; give --as megatron-bert"
            )
        bias = named["mlm_head.decoder.bias"] = named["mlm_head.decoder.bias"].clone()
        bias[source.tokenizer.vocab_size :] = NEVER
    special, theirs = source.tokenizer.vocabulary, to_theirs(named, config, format)
    if format == "xlm-roberta-xl" and special.pad:  # `to_theirs` has added one row already
        name = next(name for name in theirs if name.endswith("embeddings.position_embeddings.weight"))
        theirs[name] = torch.cat([theirs[name].new_zeros(special.pad, config.hidden), theirs[name]])
    write_safetensors(folder / "model.safetensors", theirs, {"format": "pt"})
    described = {"architectures": [CLASSES[format] + (f"For{source.kind}" if source.kind else "Model")]}
    described |= configuration(config, format, source.dropout, special)
    if source.labels:
        described["id2label"] = {str(i): label for i, label in enumerate(source.labels)}
        described["label2id"] = {label: i for i, label in enumerate(source.labels)}
        described["classifier_dropout"] = source.dropout
        if source.several:
            described["problem_type"] = "multi_label_classification"
        if source.number:
            described["problem_type"] = "regression"
        if pooling := config.is_modern and source.model.pooling:
            described["classifier_pooling"] = pooling
    write_json(folder / "config.json", {**described, "dtype": "float32"})
    for name, content in tokenizer_files(source.tokenizer, config.positions).items():
        write_json(folder / name, content)
    # for our own use: faster than tokenizer.json, and exact where that is not
    (folder / source.tokenizer.file_name).write_bytes(source.tokenizer.content)
    if source.kind in ("MaskedLM", ""):
        _write_pooling(folder, config.hidden, config.positions, format)


def _write_pooling(folder: Path, hidden: int, positions: int, format: str) -> None:
    """Writes the files of sentence-transformers: the vector of a text is the mean of its tokens' final states."""
    of = "sentence_transformers.models"
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{of}.Transformer"},
               {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{of}.Pooling"}]  # fmt: skip
    write_json(folder / "modules.json", modules)
    # otherwise their classes for the paper's architecture add a pooler with random weights, and warn of it
    arguments = {} if format == "modernbert" else {"model_args": {"add_pooling_layer": False}}
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": positions, "do_lower_case": False, **arguments})
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": hidden, **modes})


def _picture(run: Path, path: Path) -> bool:
    """Draws the run's losses. Returns False if matplotlib is not installed or the run has no metrics."""
    with suppress(ValueError):
        plot([run], path)
    return path.exists()
