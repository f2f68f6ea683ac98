"""transformers' ModernBertForMaskedLM with the weights of a model of ours: the peer of tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from minisobert.corpus.tokenizer import CLS, PAD, SEP
from minisobert.model import MaskedLM, Model


def peer(model: MaskedLM, dropout: float = 0.0, attention: str = "sdpa"):
    """A ModernBertForMaskedLM that computes what `model` does. attention: "sdpa", "eager", or another that it has."""
    import transformers

    theirs = transformers.ModernBertForMaskedLM(configuration(model, dropout, attn_implementation=attention))
    missing, unexpected = theirs.load_state_dict(by_their_names(model, lambda tensor: tensor.detach()), strict=False)
    if unexpected or any(name != "decoder.weight" for name in missing):  # which is tied to the embeddings
        raise RuntimeError(f"transformers' names have changed: missing {missing}, unexpected {unexpected}")
    return theirs


def configuration(model: Model, dropout: float = 0.0, **more):
    """The sizes of a model as a ModernBertConfig. Its dropout inside the MLP is elsewhere than ours."""
    import transformers

    config = model.config
    return transformers.ModernBertConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.ffn,
        max_position_embeddings=config.positions,
        norm_eps=config.norm_eps,
        local_attention=2 * config.window,
        layer_types=["sliding_attention" if block.window else "full_attention" for block in model.encoder.blocks],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": config.rope_base},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.local_rope_base},
        },
        embedding_dropout=dropout,
        attention_dropout=dropout,
        mlp_dropout=dropout,
        pad_token_id=PAD,
        cls_token_id=CLS,
        bos_token_id=CLS,
        sep_token_id=SEP,
        eos_token_id=SEP,
        **more,
    )


def by_their_names(model: Model, get: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """get(parameter) of each of ours, e.g. itself or its gradient, in their order and by their names."""
    encoder, config = model.encoder, model.config
    modules = {
        "model.embeddings.tok_embeddings": encoder.embeddings.word,
        "model.embeddings.norm": encoder.embeddings.norm,
        "model.final_norm": encoder.final_norm,
    }
    named = {}
    for i, block in enumerate(encoder.blocks):
        layer = f"model.layers.{i}"
        modules |= {
            f"{layer}.attn.Wo": block.attention_output,
            f"{layer}.mlp_norm": block.ffn_norm,
            f"{layer}.mlp.Wi": block.gated_ffn_input,
            f"{layer}.mlp.Wo": block.ffn_output,
        }
        if i:
            modules[f"{layer}.attn_norm"] = block.attention_norm
        qkv = get(block.qkv.weight).unflatten(0, (config.heads, 3, config.head_width))
        named[f"{layer}.attn.Wqkv.weight"] = qkv.transpose(0, 1).flatten(0, 2)
    head = model.mlm_head if isinstance(model, MaskedLM) else model.head
    modules |= {"head.dense": head.dense, "head.norm": head.norm}
    named |= {f"{name}.weight": get(module.weight) for name, module in modules.items()}
    if isinstance(model, MaskedLM):
        named["decoder.bias"] = get(head.decoder.bias)
    else:
        named |= {f"classifier.{name}": get(p) for name, p in model.classifier.named_parameters()}
    return named
