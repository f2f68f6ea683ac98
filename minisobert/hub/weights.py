"""Our weights under Hugging Face's names, and theirs under ours: one table for each of their architectures.

    modernbert       our modernbert
    megatron-bert    our megatron-bert, for which transformers has eager attention only
    xlm-roberta-xl   our megatron-bert again: the same function, with SDPA and FlashAttention in transformers

A table maps modules, each with its weight and its bias. All tensors are the same on both sides, except

    qkv         our 3h rows are (H, 3, d), so that a slice of them is whole heads; theirs are (3, H, d), in one matrix
                or in three
    positions   xlm-roberta-xl counts positions from its padding id + 1, so a row of zeros comes before ours
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from minisobert.cli import words
from minisobert.config import ModelConfig
from minisobert.model import Classifier, Embedder, MaskedLM, Model

# Ours → theirs; {i} is the number of the block. For qkv, a tuple of modules whose concatenated rows are (3, H, d)
TABLES: dict[str, dict[str, str | tuple[str, ...]]] = {
    "modernbert": {
        "encoder.embeddings.word": "model.embeddings.tok_embeddings",
        "encoder.embeddings.norm": "model.embeddings.norm",
        "encoder.blocks.{i}.attention_norm": "model.layers.{i}.attn_norm",  # the first block has none, on both sides
        "encoder.blocks.{i}.qkv": ("model.layers.{i}.attn.Wqkv",),
        "encoder.blocks.{i}.attention_output": "model.layers.{i}.attn.Wo",
        "encoder.blocks.{i}.ffn_norm": "model.layers.{i}.mlp_norm",
        "encoder.blocks.{i}.gated_ffn_input": "model.layers.{i}.mlp.Wi",
        "encoder.blocks.{i}.ffn_output": "model.layers.{i}.mlp.Wo",
        "encoder.final_norm": "model.final_norm",
    },
    "megatron-bert": {
        "encoder.embeddings.word": "bert.embeddings.word_embeddings",
        "encoder.embeddings.position": "bert.embeddings.position_embeddings",
        "encoder.embeddings.token_type": "bert.embeddings.token_type_embeddings",
        "encoder.blocks.{i}.attention_norm": "bert.encoder.layer.{i}.attention.ln",
        "encoder.blocks.{i}.qkv": tuple(
            f"bert.encoder.layer.{{i}}.attention.self.{name}" for name in ("query", "key", "value")
        ),
        "encoder.blocks.{i}.attention_output": "bert.encoder.layer.{i}.attention.output.dense",
        "encoder.blocks.{i}.ffn_norm": "bert.encoder.layer.{i}.ln",
        "encoder.blocks.{i}.ffn_input": "bert.encoder.layer.{i}.intermediate.dense",
        "encoder.blocks.{i}.ffn_output": "bert.encoder.layer.{i}.output.dense",
        "encoder.final_norm": "bert.encoder.ln",
    },
    "xlm-roberta-xl": {
        "encoder.embeddings.word": "roberta.embeddings.word_embeddings",
        "encoder.embeddings.position": "roberta.embeddings.position_embeddings",
        "encoder.embeddings.token_type": "roberta.embeddings.token_type_embeddings",
        "encoder.blocks.{i}.attention_norm": "roberta.encoder.layer.{i}.attention.self_attn_layer_norm",
        "encoder.blocks.{i}.qkv": tuple(
            f"roberta.encoder.layer.{{i}}.attention.self.{name}" for name in ("query", "key", "value")
        ),
        "encoder.blocks.{i}.attention_output": "roberta.encoder.layer.{i}.attention.output.dense",
        "encoder.blocks.{i}.ffn_norm": "roberta.encoder.layer.{i}.LayerNorm",
        "encoder.blocks.{i}.ffn_input": "roberta.encoder.layer.{i}.intermediate.dense",
        "encoder.blocks.{i}.ffn_output": "roberta.encoder.layer.{i}.output.dense",
        "encoder.final_norm": "roberta.encoder.LayerNorm",
    },
}
FORMATS = tuple(TABLES)

# All names of an encoder begin with it, unless the encoder is saved by itself, as an Embedder
_PREFIX = {"modernbert": "model.", "megatron-bert": "bert.", "xlm-roberta-xl": "roberta."}

# The layers after the encoder, in a MaskedLM and in a Classifier of sequences ("pooled") or of tokens
_HEADS: dict[str, dict[str, dict[str, str]]] = {
    "modernbert": {
        "masked": {"mlm_head.dense": "head.dense", "mlm_head.norm": "head.norm", "mlm_head.decoder": "decoder"},
        "pooled": {"head.dense": "head.dense", "head.norm": "head.norm", "classifier": "classifier"},
        "token": {"head.dense": "head.dense", "head.norm": "head.norm", "classifier": "classifier"},
    },
    "megatron-bert": {
        "masked": {
            "mlm_head.dense": "cls.predictions.transform.dense",
            "mlm_head.norm": "cls.predictions.transform.LayerNorm",
            "mlm_head.decoder": "cls.predictions",
        },
        "pooled": {"pooler": "bert.pooler.dense", "classifier": "classifier"},
        "token": {"classifier": "classifier"},
    },
    "xlm-roberta-xl": {
        "masked": {
            "mlm_head.dense": "lm_head.dense",
            "mlm_head.norm": "lm_head.layer_norm",
            "mlm_head.decoder": "lm_head",
        },
        "pooled": {"pooler": "classifier.dense", "classifier": "classifier.out_proj"},
        "token": {"classifier": "classifier"},
    },
}

# Copies of tied tensors. A file may hold a tensor under both names, or under that of the copy alone
_TIED = {
    "modernbert": {"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    "megatron-bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "xlm-roberta-xl": {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
}
# Tensors that a file may hold but the model does not need: buffers, which old versions of transformers saved, and in
# a masked language model the pooler and the head of next-sentence prediction on it
_BUFFERS = re.compile(r"(bert|roberta)\.embeddings\.(position_ids|token_type_ids)")
_BESIDE_MASKED = re.compile(r"(bert|roberta)\.pooler\.|cls\.seq_relationship\.")
_POOLERS = "pooler.weight", "bert.pooler.dense.weight", "classifier.dense.weight"  # ours, and theirs
_MASKED = "mlm_head.", "head.", "decoder.", "cls.predictions.", "lm_head."  # ours, and theirs
_CLASSES = "classifier.weight", "classifier.out_proj.weight"  # theirs; a row for each class


def to_theirs(named: dict[str, Tensor], config: ModelConfig, format: str) -> dict[str, Tensor]:
    """A model's parameters under the names of `format`; or its gradients, which have the same names and shapes.

    named: all parameters of a MaskedLM, a Classifier or an Embedder, by our names. Tied tensors are returned once.
    Raises ValueError if the format is of another architecture than the config.
    """
    kind, theirs = _kind(named), {}
    table = _table(config, format, kind)
    for name, tensor in named.items():
        if _is_shifted(name, format):
            tensor = torch.cat([tensor.new_zeros(1, tensor.shape[1]), tensor])
        elif ".qkv." in name:
            tensor = tensor.unflatten(0, (config.heads, 3, config.head_width)).transpose(0, 1).flatten(0, 2)
        names = _their_names(name, table)
        theirs.update(zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor]))
    return {name.removeprefix(_PREFIX[format]) if kind == "bare" else name: t for name, t in theirs.items()}


def to_ours(tensors: dict[str, Tensor], config: ModelConfig, format: str) -> dict[str, Tensor]:
    """The reverse of `to_theirs`, for the `load_state_dict` of a model of ours with this config.

    tensors: those of a masked language model, a classifier of sequences or of tokens, or an encoder alone; their names
    tell which. Copies of tied tensors and buffers are left out, and so is the pooler of a model that is not a
    classifier. Raises ValueError for tensors that are missing, have another shape, or are unexpected.
    """
    if _kind(tensors) == "bare" and not any(name.startswith(_PREFIX[format]) for name in tensors):
        tensors = {_PREFIX[format] + name: tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not _BUFFERS.fullmatch(name)}
    for copy, original in _TIED[format].items():
        if copy in tensors and not torch.equal(tensors.setdefault(original, tensors[copy]), tensors.pop(copy)):
            raise ValueError(f"{copy} differs from {original}; models of minisobert have one tensor for both")
    kind = _kind(tensors)
    table = _table(config, format, kind)
    if kind in ("masked", "bare"):
        tensors = {name: tensor for name, tensor in tensors.items() if not _BESIDE_MASKED.match(name)}
    found, problems = {}, {"missing": [], "of another shape": []}
    for name, shape in _shapes(tensors, config, kind).items():
        names = _their_names(name, table)
        if lacking := [each for each in names if each not in tensors]:
            problems["missing"] += lacking
            continue
        parts = [tensors.pop(each) for each in names]
        extra = int(_is_shifted(name, format))
        expected = [(shape[0] + extra) // len(names), *shape[1:]]
        if wrong := [
            f"{each} {list(p.shape)}, not {expected}" for each, p in zip(names, parts) if list(p.shape) != expected
        ]:
            problems["of another shape"] += wrong
            continue
        tensor = torch.cat(parts)[extra:] if len(parts) > 1 or extra else parts[0]
        if ".qkv." in name:
            tensor = tensor.unflatten(0, (3, config.heads, config.head_width)).transpose(0, 1).flatten(0, 2)
        found[name] = tensor
    problems["unexpected"] = sorted(tensors)
    said = [
        f"{len(names):,} {what} ({names[0]}{', …' if len(names) > 1 else ''})"
        for what, names in problems.items()
        if names
    ]
    if said:
        raise ValueError(f"the weights are not those of a {format} with the sizes of its config: {'; '.join(said)}")
    return found


def _kind(names: Iterable[str]) -> str:
    """The kind of model with these names, ours or theirs: "masked"; "pooled" or "token", a classifier; or "bare"."""
    if not any(name.startswith("classifier.") for name in names):
        return "masked" if any(name.startswith(_MASKED) for name in names) else "bare"
    return "pooled" if any(name in names for name in _POOLERS) else "token"


def _table(config: ModelConfig, format: str, kind: str) -> dict[str, str | tuple[str, ...]]:
    if config.is_modern != (format == "modernbert"):
        others = [name for name in FORMATS if (name == "modernbert") == config.is_modern]
        raise ValueError(
            f"a {config.architecture} of minisobert is not a {format} of transformers; choose {words(others)}"
        )
    return TABLES[format] | _HEADS[format].get(kind, {})


def _their_names(name: str, table: dict[str, str | tuple[str, ...]]) -> list[str]:
    module, _, kind = name.rpartition(".")
    number = re.search(r"\.(\d+)\.", name)
    found = table[module.replace(number[0], ".{i}.") if number else module]
    each = (found,) if isinstance(found, str) else found
    return [f"{module.replace('{i}', number[1]) if number else module}.{kind}" for module in each]


def _is_shifted(name: str, format: str) -> bool:
    return format == "xlm-roberta-xl" and name == "encoder.embeddings.position.weight"


def _shapes(tensors: dict[str, Tensor], config: ModelConfig, kind: str) -> dict[str, torch.Size]:
    """The shapes of our parameters for the model with these tensors of theirs."""
    with torch.device("meta"):
        if kind == "masked":
            model: Model = MaskedLM(config)
        elif kind == "bare":
            model = Embedder(config)
        else:
            classes = next(len(tensors[name]) for name in _CLASSES if name in tensors)
            model = Classifier(config, classes, "cls" if kind == "pooled" else "")
    return {name: parameter.shape for name, parameter in model.named_parameters()}
