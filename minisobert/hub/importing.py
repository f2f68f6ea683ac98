"""Reads a folder in Hugging Face's format as a model of ours, or turns it into the folder of a run that has not begun.

    python -m minisobert.hub import DIR --out RUN

transformers is not needed, and nothing in the folder is executed: the weights are read from safetensors, or from a
pytorch_model.bin that torch opens with weights_only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisobert.cli import reason, words
from minisobert.config import ModelConfig
from minisobert.corpus.shards import Shards
from minisobert.corpus.tokenizer import Tokenizer, open_tokenizer
from minisobert.corpus.tokenizer_json import JsonTokenizer
from minisobert.files import new_folder, read_safetensors, sha256, write_json, write_safetensors
from minisobert.hub.weights import FORMATS, to_ours
from minisobert.model import Classifier, Embedder, MaskedLM, Model
from minisobert.training import checkpoint
from minisobert.training.run import Trained, open_run

# Options of a ModernBERT that ours does not have, each with the only value that is accepted
_FIXED = {"attention_bias": False, "mlp_bias": False, "norm_bias": False, "classifier_bias": False}
_GELU = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}


@dataclass(frozen=True)
class Imported:
    model: Model  # a MaskedLM, a Classifier or, for an encoder without a head, an Embedder; in fp32, on the CPU
    tokenizer: Tokenizer | JsonTokenizer
    format: str  # one of FORMATS
    labels: tuple[str, ...] = ()  # of a Classifier, in the order of its logits
    of_documents: bool = False  # a Classifier of whole documents, not of words
    several: bool = False  # a document may have several of the labels
    number: bool = False  # it predicts a number for a document, and the one label is the number's name


def read(folder: str | Path) -> Imported:
    """The model in a folder in Hugging Face's format. Raises ValueError if it cannot be one of our models."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; download the model first: hf download NAME --local-dir {folder}")
    try:
        theirs = json.loads((folder / "config.json").read_text())
        architecture = theirs["model_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder} is not a model in Hugging Face's format (config.json: {reason(error)})") from None
    if architecture not in FORMATS:
        raise ValueError(
            f"{folder} holds a {architecture!r}; minisobert imports {words(FORMATS)}. For fine-tuning alone, "
            f"finetune.py --model hf:{folder} takes any encoder"
        )
    try:
        config = our_config(theirs)
    except (LookupError, TypeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} lacks an entry of a {architecture}, or has a wrong one ({error!r})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    tensors = read_weights(folder)
    if architecture == "xlm-roberta-xl":
        tensors = _one_row_before(tensors, theirs["pad_token_id"])
    try:
        ours = to_ours(tensors, config, architecture)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    labels, of_documents = (), False
    if "classifier.weight" in ours:
        names = theirs.get("id2label") or {}
        labels = tuple(names.get(str(i), f"LABEL_{i}") for i in range(len(ours["classifier.weight"])))
        of_documents = "ForSequenceClassification" in theirs["architectures"][0]
        pooling = (theirs.get("classifier_pooling", "cls") if config.is_modern else "cls") if of_documents else ""
        model: Model = Classifier(config, len(labels), pooling)
    else:
        model = (MaskedLM if "mlm_head.decoder.bias" in ours else Embedder)(config)
    model.load_state_dict({name: tensor.float() for name, tensor in ours.items()})
    tokenizer = open_tokenizer(folder)  # our own if minisobert exported the folder
    if tokenizer.vocab_size > config.vocabulary:
        raise ValueError(
            f"{folder / tokenizer.file_name} has {tokenizer.vocab_size:,} ids, but the model has "
            f"{config.vocabulary:,} rows of embeddings; it is the tokenizer of another model"
        )
    problem = theirs.get("problem_type") if labels else None
    several, number = problem == "multi_label_classification", problem == "regression" and len(labels) == 1
    return Imported(model.eval(), tokenizer, architecture, labels, of_documents, several, number)


def our_config(theirs: dict) -> ModelConfig:
    """The config of our model, from the content of a config.json. Raises ValueError for what our models do not have,
    LookupError for what is missing."""
    modern, activation = theirs["model_type"] == "modernbert", theirs.get("hidden_act", "gelu")
    activation = theirs.get("hidden_activation", "gelu") if modern else activation
    if activation not in _GELU:
        raise ValueError(f"the activation is {activation!r}; minisobert has {words(_GELU)}")
    of_head = {"modernbert": theirs.get("classifier_activation", "gelu"), "xlm-roberta-xl": "gelu"}
    if _GELU.get(other := of_head.get(theirs["model_type"], activation)) != _GELU[activation]:
        raise ValueError(
            f"the activation of the layers is {activation!r}, and that of the head {other!r}; minisobert has the same "
            "in both"
        )
    sizes = {
        "layers": theirs["num_hidden_layers"], "hidden": theirs["hidden_size"], "heads": theirs["num_attention_heads"],
        "ffn": theirs["intermediate_size"], "vocabulary": theirs["vocab_size"], "gelu": _GELU[activation],
    }  # fmt: skip
    positions = theirs.get("max_position_embeddings")
    if modern:
        return ModelConfig(
            **sizes, positions=positions or 8_192, norm_eps=theirs.get("norm_eps", 1e-5), architecture="modernbert",
            **_attention(theirs, sizes["layers"]),
        )  # fmt: skip
    if theirs.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"its positions are {theirs['position_embedding_type']!r}; minisobert has only absolute ones")
    if theirs["model_type"] == "xlm-roberta-xl":
        positions -= theirs["pad_token_id"] + 1  # rows of the table that no token uses
    return ModelConfig(**sizes, positions=positions, norm_eps=theirs.get("layer_norm_eps", 1e-12))


def _attention(theirs: dict, layers: int) -> dict:
    """Windows and rotary bases of a ModernBERT, as transformers 5 or version 4 writes them."""
    for name, value in _FIXED.items():
        if theirs.get(name, value) != value:
            raise ValueError(f"{name} is {theirs[name]}; the layers of minisobert's modernbert have no biases")
    every = theirs.get("global_attn_every_n_layers", 3)
    if types := theirs.get("layer_types"):
        is_global = [kind == "full_attention" for kind in types]
        patterns = {n: [i % n == 0 for i in range(layers)] for n in range(1, layers + 1)}
        matching = [n for n, pattern in patterns.items() if pattern == is_global]
        if not matching:
            raise ValueError(
                f"layer_types are {''.join('g' if each else 'l' for each in is_global)} (g: full attention); in "
                "minisobert every n-th layer has it, beginning with the first"
            )
        every = every if every in matching else matching[0]
    bases = theirs.get("rope_parameters") or {}
    for name, base in bases.items():
        if base.get("rope_type", "default") != "default":
            raise ValueError(f"the rotary positions of {name} are {base['rope_type']!r}; minisobert has only 'default'")
    local = theirs.get("local_rope_theta")
    whole = bases.get("full_attention", {}).get("rope_theta", theirs.get("global_rope_theta", 160_000.0))
    windowed = bases.get("sliding_attention", {}).get("rope_theta", 10_000.0 if local is None else local)
    return {
        "global_every": every, "window": theirs.get("local_attention", 128) // 2, "rope_base": float(whole),
        "local_rope_base": float(windowed),
    }  # fmt: skip


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors in a folder, in whichever of transformers' files they are. Raises ValueError if there are none, or if
    they cannot be read."""
    for name, opened in (("model.safetensors", read_safetensors), ("pytorch_model.bin", _read_pickle)):
        index = folder / f"{name}.index.json"
        try:
            if index.is_file():
                files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                return {key: tensor for file in files for key, tensor in opened(folder / Path(file).name).items()}
            if (folder / name).is_file():
                return opened(folder / name)
        except (OSError, ValueError, LookupError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"the weights in {folder} cannot be read ({reason(error)})") from None
    raise ValueError(f"{folder} holds no model.safetensors and no pytorch_model.bin")


def _read_pickle(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _one_row_before(tensors: dict[str, Tensor], padding: int) -> dict[str, Tensor]:
    """The tensors of an xlm-roberta-xl as they would be with a padding id of 0, since it counts positions from the
    padding id + 1; and with a second token type, which ours has and nothing uses."""
    tensors = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("embeddings.position_embeddings.weight"):
            tensors[name] = tensor[padding:]
        if name.endswith("embeddings.token_type_embeddings.weight") and len(tensor) == 1:
            tensors[name] = torch.cat([tensor, torch.zeros_like(tensor)])
    return tensors


def _what(model: Model) -> str:
    return "an encoder without its head" if isinstance(model, Embedder) else "a classifier"


def import_run(folder: str | Path, out: str | Path) -> None:
    """Writes the folder of a run at step 0, with the weights and the tokenizer of a model, for `train.py --init`,
    fine-tuning and all else that takes a run. Raises ValueError if the model cannot be imported, or if `out` exists."""
    with new_folder(out) as run:
        imported = read(folder)
        if not isinstance(imported.model, MaskedLM):
            raise ValueError(f"{folder} holds {_what(imported.model)}; a run begins with a masked language model")
        (run / imported.tokenizer.file_name).write_bytes(imported.tokenizer.content)
        step = checkpoint.path_of(run / "checkpoints", 0)
        step.mkdir(parents=True)
        weights = {name: parameter.detach() for name, parameter in imported.model.named_parameters()}
        write_safetensors(step / "model.safetensors", weights)
        checksum = sha256(step / "model.safetensors")
        origin = [{"imported": imported.format, "from": Path(folder).resolve().name}]
        state = {"progress": {"step": 0}, "run": {}, "sha256": {"model.safetensors": checksum}}
        checkpoint.write_state(step, state)
        described = {
            "model": dataclasses.asdict(imported.model.config),
            "tokenizer": hashlib.sha256(imported.tokenizer.content).hexdigest(),
            "init": {"history": origin},
        }
        write_json(run / "config.json", described)


def open_model(path: str | Path) -> Trained:
    """The masked language model in a run of ours, or in a folder in Hugging Face's format. Raises ValueError if the
    path is neither, or if it holds another kind of model."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give the --out of train.py, or a folder in Hugging Face's format")
    if (path / "checkpoints").is_dir() or not (path / "config.json").is_file():
        return open_run(path)
    imported = read(path)
    if not isinstance(imported.model, MaskedLM):
        raise ValueError(f"{path} holds {_what(imported.model)}; a masked language model is needed")
    return Trained(imported.model, imported.tokenizer, [{"imported": imported.format, "from": path.resolve().name}])


def open_init(path: str, shards: Shards) -> Trained:
    """The model of --init. Raises ValueError if the corpus was encoded by another tokenizer than the model's."""
    init = open_model(path)
    if init.tokenizer.content != shards.tokenizer_file.read_bytes():
        raise ValueError(
            f"{shards.folder} was not encoded by the tokenizer of {path}; prepare the data again with: data.prepare "
            f"--tokenizer {path}"
        )
    return init
