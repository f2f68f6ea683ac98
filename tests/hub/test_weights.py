"""One table for both directions: what is exported comes back, and what does not fit is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import peer
from minisobert.config import PRESETS, ModelConfig
from minisobert.hub.weights import FORMATS, to_ours, to_theirs
from minisobert.model import Classifier, MaskedLM
from minisobert.ops import cross_entropy
from tests.test_model import gradients_apart, gradients_under_their_names, packed, padded, with_signal_everywhere

SIZES = {"layers": 2, "hidden": 64, "heads": 4, "ffn": 96, "vocabulary": 128, "positions": 32}


def config_for(format: str, **sizes) -> ModelConfig:
    return ModelConfig(**{**SIZES, **sizes}, architecture="modernbert" if format == "modernbert" else "megatron-bert")


def models(format: str):
    """(kind of AutoModel, model) for each kind of model that a format can hold."""
    config = config_for(format)
    yield "MaskedLM", MaskedLM(config)
    yield "SequenceClassification", Classifier(config, 3, "cls")
    yield "TokenClassification", Classifier(config, 5, "")


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("format", FORMATS)
def test_what_transformers_loads_and_saves_comes_back_bit_for_bit(format):
    """Their state dict includes the copies of tied tensors."""
    pytest.importorskip("transformers")
    for kind, model in models(format):
        ours = weights(with_signal_everywhere(model))
        found = to_ours(peer(model, format, kind=kind).state_dict(), model.config, format)
        assert list(found) == list(ours)
        assert all(torch.equal(p, ours[name]) for name, p in found.items())


@pytest.mark.parametrize("format", FORMATS)
def test_copies_buffers_and_poolers_are_passed_over_and_other_tensors_named(format):
    model = with_signal_everywhere(MaskedLM(config_for(format)))
    theirs = to_theirs(weights(model), model.config, format)
    assert all(
        name.split(".")[0] in ("model", "head", "decoder", "bert", "cls", "roberta", "lm_head") for name in theirs
    )

    if format == "megatron-bert":
        theirs["bert.pooler.dense.weight"] = theirs["cls.seq_relationship.weight"] = torch.ones(2, 64)
        theirs["bert.embeddings.position_ids"] = torch.arange(32)
        theirs["cls.predictions.decoder.bias"] = theirs.pop("cls.predictions.bias")  # only this name
    found = to_ours(theirs, model.config, format)
    assert all(torch.equal(p, found[name]) for name, p in weights(model).items())

    (word,) = (name for name in theirs if "tok_embeddings" in name or "word_embeddings" in name)
    head = {"modernbert": "", "megatron-bert": "cls.predictions.", "xlm-roberta-xl": "lm_head."}[format]
    copy = f"{head}decoder.weight"
    with pytest.raises(ValueError, match=f"{copy} differs from {word}"):
        to_ours({**theirs, copy: theirs[word] + 1}, model.config, format)

    for change, said in (
        ({word: None}, rf"1 missing \({word}\)"),
        ({word: torch.ones(3, 7)}, rf"1 of another shape \({word} \[3, 7\], not \[128, 64\]\)"),
        ({"model.extra.weight": torch.ones(1)}, r"1 unexpected \(model.extra.weight\)"),
    ):
        broken = {name: p for name, p in {**theirs, **change}.items() if p is not None}
        with pytest.raises(ValueError, match=f"not those of a {format} with the sizes of its config: {said}"):
            to_ours(broken, model.config, format)


def test_a_format_of_another_architecture_is_refused_with_those_that_fit():
    model = MaskedLM(config_for("modernbert"))
    with pytest.raises(ValueError, match="is not a megatron-bert of transformers; choose modernbert"):
        to_theirs(weights(model), model.config, "megatron-bert")
    model = MaskedLM(config_for("megatron-bert"))
    with pytest.raises(ValueError, match="choose megatron-bert or xlm-roberta-xl"):
        to_theirs(weights(model), model.config, "modernbert")


@pytest.mark.parametrize(
    ("preset", "format", "attention"),
    [("large", "megatron-bert", "eager"), ("large", "xlm-roberta-xl", "sdpa"), ("modern-large", "modernbert", "sdpa")],
)
def test_outputs_and_gradients_at_the_widths_of_the_large_presets(preset, format, attention):
    """The sums have six thousand products in fp32, so 1e-5 is relative to the largest logit or gradient element."""
    pytest.importorskip("transformers")
    sizes = {name: getattr(PRESETS[preset], name) for name in ("hidden", "heads", "ffn")}
    model = with_signal_everywhere(MaskedLM(config_for(format, **sizes, layers=1, positions=64)))
    theirs, lengths = peer(model, format, attention=attention).eval(), [17, 40]
    tokens, positions, documents, masked, targets = packed(lengths, model.config.vocabulary)
    logits = model(tokens, positions, documents, masked)
    cross_entropy(logits, targets).sum().backward()
    ids, real = padded(tokens, lengths)
    their_logits = theirs(ids, attention_mask=real).logits[real.bool()][masked]
    F.cross_entropy(their_logits, targets, reduction="sum").backward()
    assert (logits - their_logits).abs().max() < 1e-5 * their_logits.abs().max()
    apart = gradients_apart(gradients_under_their_names(model, format), theirs)
    assert {name for name in apart if not name.endswith("key.bias")} == set()  # their true gradient is zero
