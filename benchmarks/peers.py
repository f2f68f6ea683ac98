"""Models of transformers with the weights of our models: the peers in tests and benchmarks."""

from __future__ import annotations

from minisobert.hub.configuration import configuration
from minisobert.hub.weights import to_theirs
from minisobert.model import Model


def peer(model: Model, format: str, dropout: float = 0.0, attention: str = "eager", kind: str = "MaskedLM", **more):
    """The model of `format` that computes what `model` does.

    attention: "sdpa", "eager" or another that transformers has for it. kind: KIND of `transformers.AutoModelForKIND`.
    more: fields of its config.
    """
    import transformers

    if kind != "MaskedLM":
        more = {"num_labels": model.classifier.out_features, **more}
    config = transformers.AutoConfig.for_model(**{**configuration(model.config, format, dropout), **more})
    theirs = getattr(transformers, f"AutoModelFor{kind}").from_config(config, attn_implementation=attention)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    missing, unexpected = theirs.load_state_dict(to_theirs(weights, model.config, format), strict=False)
    if unexpected or any("decoder" not in name for name in missing):  # the decoder is tied
        raise RuntimeError(f"transformers' names have changed: missing {missing}, unexpected {unexpected}")
    return theirs
