"""The sizes of our models in the form of transformers' config.json."""

from __future__ import annotations

from minisobert.config import ModelConfig
from minisobert.corpus.tokenizer import Vocabulary, our_vocabulary

_ACTIVATION = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}


def configuration(config: ModelConfig, format: str, dropout: float = 0.0, vocabulary: Vocabulary | None = None) -> dict:
    """All that `transformers.AutoConfig.for_model` needs for a model that computes what ours does.

    format: one of `weights.FORMATS`. dropout: the rate at every place where our models have dropout. In the MLP of a
    modernbert, transformers has it at another place, so training continues slightly differently there. vocabulary:
    gives the special ids (default: those of our own tokenizers).
    """
    special = vocabulary or our_vocabulary(config.vocabulary)
    return {
        "model_type": format,
        "vocab_size": config.vocabulary,
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.positions,
        **(_modern(config, dropout) if format == "modernbert" else _megatron(config, format, dropout, special.pad)),
        "pad_token_id": special.pad,
        "cls_token_id": special.cls,
        "bos_token_id": special.cls,
        "sep_token_id": special.sep,
        "eos_token_id": special.sep,
        "tie_word_embeddings": True,
    }


def _modern(config: ModelConfig, dropout: float) -> dict:
    windows = [config.window_of(layer) for layer in range(config.layers)]
    return {
        "norm_eps": config.norm_eps,
        "hidden_activation": _ACTIVATION[config.gelu],
        "classifier_activation": _ACTIVATION[config.gelu],
        "classifier_pooling": "cls",
        "local_attention": 2 * config.window,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": config.rope_base},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_base},
        },
        # the same, as transformers 4 writes it
        "global_attn_every_n_layers": config.global_every,
        "global_rope_theta": config.rope_base,
        "local_rope_theta": config.local_rope_base,
        "embedding_dropout": dropout,
        "attention_dropout": dropout,
        "mlp_dropout": dropout,
    }


def _megatron(config: ModelConfig, format: str, dropout: float, padding: int) -> dict:
    # xlm-roberta-xl counts positions from its padding id + 1
    positions = config.positions + (padding + 1 if format == "xlm-roberta-xl" else 0)
    return {
        "max_position_embeddings": positions,
        "position_embedding_type": "absolute",
        "type_vocab_size": 2,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": _ACTIVATION[config.gelu],
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
