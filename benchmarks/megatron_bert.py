"""transformers' MegatronBertForMaskedLM with the weights of a model of ours: the peer of tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from minisobert.config import ModelConfig
from minisobert.model import MaskedLM


def peer(model: MaskedLM, dropout: float = 0.0):
    """A MegatronBertForMaskedLM that computes what `model` does."""
    import transformers

    theirs = transformers.MegatronBertForMaskedLM(
        transformers.MegatronBertConfig(**sizes(model.config, dropout), layer_norm_eps=model.config.norm_eps)
    )
    missing, unexpected = theirs.load_state_dict(by_their_names(model, lambda tensor: tensor.detach()), strict=False)
    if unexpected or any("decoder" not in name and "position_ids" not in name for name in missing):
        raise RuntimeError(f"transformers' names have changed: missing {missing}, unexpected {unexpected}")
    return theirs


def sizes(config: ModelConfig, dropout: float) -> dict:
    """The sizes of a model as the configs of transformers' BERTs call them."""
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.positions,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


def by_their_names(model: MaskedLM, get: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """get(parameter) of each of ours, e.g. itself or its gradient, cut and named as theirs."""
    encoder, head, config = model.encoder, model.mlm_head, model.config
    named = {
        "bert.embeddings.word_embeddings.weight": get(encoder.embeddings.word.weight),
        "bert.embeddings.position_embeddings.weight": get(encoder.embeddings.position.weight),
        "bert.embeddings.token_type_embeddings.weight": get(encoder.embeddings.token_type.weight),
        "cls.predictions.bias": get(head.decoder.bias),
    }
    modules = {
        "bert.encoder.ln": encoder.final_norm,
        "cls.predictions.transform.dense": head.dense,
        "cls.predictions.transform.LayerNorm": head.norm,
    }
    for i, block in enumerate(encoder.blocks):
        layer = f"bert.encoder.layer.{i}"
        modules |= {
            f"{layer}.attention.ln": block.attention_norm,
            f"{layer}.attention.output.dense": block.attention_output,
            f"{layer}.ln": block.ffn_norm,
            f"{layer}.intermediate.dense": block.ffn_input,
            f"{layer}.output.dense": block.ffn_output,
        }
        for kind in ("weight", "bias"):
            parts = get(getattr(block.qkv, kind)).unflatten(0, (config.heads, 3, config.head_width)).unbind(1)
            for name, part in zip(("query", "key", "value"), parts):
                named[f"{layer}.attention.self.{name}.{kind}"] = part.flatten(0, 1)
    for name, module in modules.items():
        named[f"{name}.weight"], named[f"{name}.bias"] = get(module.weight), get(module.bias)
    return named
