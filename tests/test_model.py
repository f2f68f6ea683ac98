"""The model against an independent implementation of the architecture, and the properties that packing promises."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import megatron_bert
from minisobert.config import PRESETS, ModelConfig
from minisobert.model import MaskedLM
from minisobert.ops import Documents, Dropout, cross_entropy


def packed(lengths: list[int], vocabulary: int, seed: int = 0):
    """Random tokens of documents in a row, and every third of them masked."""
    generator = torch.Generator().manual_seed(seed)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tokens = torch.randint(5, vocabulary, (bounds[-1],), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    masked = torch.arange(0, bounds[-1], 3)
    targets = torch.randint(5, vocabulary, masked.shape, generator=generator)
    return tokens, positions, Documents.from_bounds(bounds), masked, targets


@pytest.mark.parametrize(
    ("preset", "encoder", "with_mlm_head"), [("base", 125_067_264, 125_709_440), ("large", 759_982_080, 762_396_032)]
)
def test_presets_have_the_published_number_of_parameters(preset, encoder, with_mlm_head):
    with torch.device("meta"):
        model = MaskedLM(PRESETS[preset])
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.parameters()) == with_mlm_head


@pytest.mark.parametrize("head_width", [64, 96])
@pytest.mark.parametrize("lengths", [[53], [7, 1, 40, 24]], ids=["one document", "several documents"])
def test_outputs_and_gradients_are_those_of_transformers_megatron_bert(head_width, lengths):
    pytest.importorskip("transformers")
    config = ModelConfig(layers=2, hidden=2 * head_width, heads=2, ffn=160, vocabulary=384, positions=64)
    model = MaskedLM(config).initialise(0)
    with torch.no_grad():  # no zeros, no ones: every path carries signal
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.02)
    theirs = megatron_bert.peer(model).eval()
    tokens, positions, documents, masked, targets = packed(lengths, config.vocabulary)

    logits = model(tokens, positions, documents, masked)
    cross_entropy(logits, targets).sum().backward()

    ids = torch.nn.utils.rnn.pad_sequence(tokens.split(lengths), batch_first=True)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in lengths], batch_first=True)
    their_logits = theirs(ids, attention_mask=real).logits[real.bool()][masked]
    F.cross_entropy(their_logits, targets, reduction="sum").backward()

    assert (logits - their_logits).abs().max() < 1e-5
    theirs_by_name = dict(theirs.named_parameters())
    ours_by_name = megatron_bert.by_their_names(model, lambda tensor: tensor.grad)
    assert theirs_by_name.keys() == ours_by_name.keys() | (theirs_by_name.keys() & {"cls.predictions.decoder.bias"})
    largest_bias_of_a_key = 0.0
    for name, ours in ours_by_name.items():
        expected = theirs_by_name[name].grad
        if name.endswith("word_embeddings.weight"):
            # theirs cuts the lookup's gradient of the padding id, which no document holds here
            assert 0 not in tokens
        if name.endswith("key.bias"):
            # a constant added to all keys changes no softmax: the true gradient is zero, and rounding all there is
            largest_bias_of_a_key = max(largest_bias_of_a_key, float(ours.abs().max()))
            continue
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    assert largest_bias_of_a_key < 1e-4


def test_changing_one_document_leaves_the_others_outputs_bitwise_unchanged():
    config = ModelConfig(layers=2, hidden=128, heads=2, ffn=256, vocabulary=256, positions=64)
    model = MaskedLM(config).initialise(3)
    tokens, positions, documents, *_ = packed([20, 33, 11], config.vocabulary)
    dropout = Dropout.for_step(0.1, seed=1, step=0, layers=2)
    changed = tokens.clone()
    changed[20:53] = tokens[20:53].flip(0)
    for drop in (None, dropout):
        before = model.encoder(tokens, positions, documents, drop)
        after = model.encoder(changed, positions, documents, drop)
        others = [*range(20), *range(53, 64)]
        assert torch.equal(before[others], after[others])
        assert not torch.isclose(before[20:53], after[20:53]).all(1).any()


def test_loss_at_initialisation_is_that_of_unit_variance_into_random_embeddings():
    # logits are N(0, h · 0.02²) given a normalised state, so E log Σ exp = ln V + h · 0.02² / 2
    config = ModelConfig(layers=2, hidden=768, heads=12, ffn=1536, vocabulary=8_064)
    model = MaskedLM(config).initialise(0)
    tokens, positions, documents, masked, targets = packed([700, 324], config.vocabulary)
    with torch.no_grad():
        loss = cross_entropy(model(tokens, positions, documents, masked), targets).mean()
    assert loss == pytest.approx(math.log(config.vocabulary) + config.hidden * 0.02**2 / 2, rel=0.01)


def test_initial_weights_have_the_recipes_spread_and_depend_on_the_seed_alone():
    config = ModelConfig(layers=4, hidden=128, heads=2, ffn=512, vocabulary=1_024, positions=128)
    model, again, other = (MaskedLM(config).initialise(seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.encoder.embeddings.word.weight, other.encoder.embeddings.word.weight)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
        else:
            into_residual = "attention_output" in name or "ffn_output" in name
            expected = 0.02 / math.sqrt(8) if into_residual else 0.02
            assert p.detach().std() == pytest.approx(expected, rel=0.1), name
            assert abs(p.detach().mean()) < 4 * expected / math.sqrt(p.numel()), name


def test_no_masked_token_gives_a_zero_loss_and_no_nan():
    config = ModelConfig(layers=1, hidden=64, heads=1, ffn=128, vocabulary=128, positions=64)
    model = MaskedLM(config).initialise(0)
    tokens, positions, documents, *_ = packed([9], config.vocabulary)
    nothing = torch.empty(0, dtype=torch.int64)
    loss = cross_entropy(model(tokens, positions, documents, nothing), nothing).sum()
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_heads_that_do_not_divide_the_width_are_refused_with_the_nearest_that_do():
    with pytest.raises(ValueError, match="hidden 768 cannot be split over 11 heads; choose 6, 8 or 12"):
        ModelConfig(layers=1, hidden=768, heads=11, ffn=64)
