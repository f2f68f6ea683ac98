"""The model is compared with an independent implementation, and has the properties that packing promises."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import peer
from minisobert.config import PRESETS, ModelConfig
from minisobert.hub.configuration import configuration
from minisobert.hub.weights import to_theirs
from minisobert.model import MaskedLM
from minisobert.ops import Documents, Dropout, cross_entropy


def packed(lengths: list[int], vocabulary: int, seed: int = 0):
    """Random tokens of several documents in a row, of which every third is masked."""
    generator = torch.Generator().manual_seed(seed)
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    tokens = torch.randint(5, vocabulary, (bounds[-1],), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])
    masked = torch.arange(0, bounds[-1], 3)
    targets = torch.randint(5, vocabulary, masked.shape, generator=generator)
    return tokens, positions, Documents.from_bounds(bounds), masked, targets


def with_signal_everywhere(model: MaskedLM) -> MaskedLM:
    """The model with its initial weights moved a little, so that none are 0 or 1."""
    model.initialise(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.02)
    return model


def padded(tokens: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The documents as rows of a batch, and a mask of the places that are not padding."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(tokens.split(lengths)), pad([torch.ones(n) for n in lengths])


@pytest.mark.parametrize(
    ("preset", "encoder", "with_mlm_head"), [("base", 125_067_264, 125_709_440), ("large", 759_982_080, 762_396_032)]
)
def test_presets_have_the_published_number_of_parameters(preset, encoder, with_mlm_head):
    with torch.device("meta"):
        model = MaskedLM(PRESETS[preset])
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.parameters()) == with_mlm_head


@pytest.mark.parametrize("preset", ["modern-small", "modern-base", "modern-large"])
def test_modern_presets_have_as_many_parameters_as_transformers_model_and_the_formula_say(preset):
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = MaskedLM(PRESETS[preset])
        sizes = transformers.AutoConfig.for_model(**configuration(model.config, "modernbert"))
        theirs = transformers.AutoModelForMaskedLM.from_config(sizes)
    layers, h, f, v = (getattr(model.config, name) for name in ("layers", "hidden", "ffn", "vocabulary"))
    # qkv, attention's output, 2f in and f out, and two norms; the first block lacks one norm
    encoder = (v + 1) * h + layers * (4 * h * h + 3 * h * f + 2 * h) - h + h
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.parameters()) == encoder + h * h + h + v
    assert sum(p.numel() for p in theirs.parameters()) == encoder + h * h + h + v


@pytest.fixture
def one_thread():
    """Sets one thread, since rounding depends on how many threads add up a sum. Once, on a busy machine, two gradients
    differed by 1.5e-5 of the largest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients_under_their_names(model: MaskedLM, format: str) -> dict[str, torch.Tensor]:
    return to_theirs({name: p.grad for name, p in model.named_parameters()}, model.config, format)


def gradients_apart(ours: dict[str, torch.Tensor], theirs: torch.nn.Module) -> dict[str, float]:
    """Name → relative difference, for parameters whose gradients differ by more than 1e-5 of the largest element."""
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys()
    apart = {name: float((g - expected[name]).abs().max() / expected[name].abs().max()) for name, g in ours.items()}
    return {name: by for name, by in apart.items() if not by <= 1e-5}


@pytest.mark.parametrize(
    ("format", "attention"), [("megatron-bert", "eager"), ("xlm-roberta-xl", "eager"), ("xlm-roberta-xl", "sdpa")]
)
@pytest.mark.parametrize("head_width", [64, 96])
@pytest.mark.parametrize("lengths", [[53], [7, 1, 40, 24]], ids=["one document", "several documents"])
def test_outputs_and_gradients_are_those_of_transformers(format, attention, head_width, lengths, one_thread):
    """For the paper's model, with packed documents here and padded ones there."""
    pytest.importorskip("transformers")
    config = ModelConfig(layers=2, hidden=2 * head_width, heads=2, ffn=160, vocabulary=384, positions=64)
    model = with_signal_everywhere(MaskedLM(config))
    theirs = peer(model, format, attention=attention).eval()
    tokens, positions, documents, masked, targets = packed(lengths, config.vocabulary)
    assert 0 not in tokens  # theirs drops the gradient of the padding id's embedding

    logits = model(tokens, positions, documents, masked)
    cross_entropy(logits, targets).sum().backward()

    ids, real = padded(tokens, lengths)
    their_logits = theirs(ids, attention_mask=real).logits[real.bool()][masked]
    F.cross_entropy(their_logits, targets, reduction="sum").backward()

    assert (logits - their_logits).abs().max() < 1e-5
    apart = gradients_apart(gradients_under_their_names(model, format), theirs)
    # a constant added to all keys changes no softmax, so the true gradient is zero, and only rounding is left
    of_keys = [name for name in apart if name.endswith("key.bias")]
    assert apart.keys() == set(of_keys)
    assert all(dict(theirs.named_parameters())[name].grad.abs().max() < 1e-4 for name in of_keys)


LENGTHS = [1, 63, 64, 65, 129, 700, 2_048]  # around the window, and the longest row of the paper's presets


def modern(**sizes) -> ModelConfig:
    sizes = {"layers": 4, "hidden": 128, "heads": 2, "ffn": 96, "vocabulary": 384, **sizes}
    return ModelConfig(**sizes, architecture="modernbert")


def local_alone(model: MaskedLM) -> MaskedLM:
    """The model with a window in the first block too, which no config gives."""
    first, second = model.encoder.blocks[:2]
    first.window, first.rope_base = second.window, second.rope_base
    return model


@pytest.mark.parametrize(("kind", "layers", "every"), [("global", 1, 1), ("local", 2, 3), ("mixed", 4, 3)])
def test_outputs_and_gradients_are_those_of_transformers_modernbert(kind, layers, every, one_thread):
    pytest.importorskip("transformers")
    model = with_signal_everywhere(MaskedLM(modern(layers=layers, global_every=every)))
    types = {"layer_types": ["sliding_attention"] * 2} if kind == "local" else {}
    model = local_alone(model) if kind == "local" else model
    lengths = LENGTHS if kind == "mixed" else LENGTHS[:-1]
    tokens, positions, documents, masked, targets = packed(lengths, model.config.vocabulary)
    logits = model(tokens, positions, documents, masked)
    cross_entropy(logits, targets).sum().backward()
    ours = gradients_under_their_names(model, "modernbert")

    for attention in ("eager", "sdpa"):
        theirs, their_logits = peer(model, "modernbert", attention=attention, **types).eval(), []
        for some in (slice(0, 5), slice(5, 7)):  # two batches, so that the longest do not pad all others
            ids, real = padded(torch.cat(tokens.split(lengths)[some]), lengths[some])
            their_logits.append(theirs(ids, attention_mask=real).logits[real.bool()])
        their_logits = torch.cat(their_logits)[masked]
        F.cross_entropy(their_logits, targets, reduction="sum").backward()

        assert (logits - their_logits).abs().max() < 1e-5
        assert gradients_apart(ours, theirs) == {}, attention


@pytest.mark.parametrize("architecture", ["megatron-bert", "modernbert"])
def test_changing_one_document_leaves_the_others_outputs_bitwise_unchanged(architecture):
    sizes = {"layers": 2, "hidden": 128, "heads": 2, "ffn": 256, "vocabulary": 256, "positions": 64, "window": 16}
    model = MaskedLM(ModelConfig(**sizes, architecture=architecture)).initialise(3)
    tokens, positions, documents, *_ = packed([20, 33, 11], model.config.vocabulary)
    dropout = Dropout.for_step(0.1, seed=1, step=0, layers=2)
    changed = tokens.clone()
    changed[20:53] = tokens[20:53].flip(0)
    for drop in (None, dropout):
        before = model.encoder(tokens, positions, documents, drop)
        after = model.encoder(changed, positions, documents, drop)
        others = [*range(20), *range(53, 64)]
        assert torch.equal(before[others], after[others])
        assert not torch.isclose(before[20:53], after[20:53]).all(1).any()


def test_a_state_depends_on_no_token_outside_the_windows_path():
    """If all blocks have a window of 5 tokens, each carries information 5 tokens further, and no further."""
    layers, window, at = 3, 5, 40
    model = MaskedLM(modern(layers=layers, window=window)).initialise(3)
    local_alone(model)
    tokens, positions, documents, *_ = packed([81], model.config.vocabulary)
    changed = tokens.clone()
    changed[at] += 1
    states = [model.encoder(each, positions, documents) for each in (tokens, changed)]
    moved = (states[0] != states[1]).any(1).nonzero().flatten().tolist()
    assert moved == [*range(at - layers * window, at + layers * window + 1)]


def test_loss_at_initialisation_is_that_of_unit_variance_into_random_embeddings():
    # for a normalised state, logits are N(0, h · 0.02²), so E log Σ exp = ln V + h · 0.02² / 2
    config = ModelConfig(layers=2, hidden=768, heads=12, ffn=1536, vocabulary=8_064)
    model = MaskedLM(config).initialise(0)
    tokens, positions, documents, masked, targets = packed([700, 324], config.vocabulary)
    with torch.no_grad():
        loss = cross_entropy(model(tokens, positions, documents, masked), targets).mean()
    assert loss == pytest.approx(math.log(config.vocabulary) + config.hidden * 0.02**2 / 2, rel=0.01)


@pytest.mark.parametrize("architecture", ["megatron-bert", "modernbert"])
def test_initial_weights_have_the_recipes_spread_and_depend_on_the_seed_alone(architecture):
    sizes = {"layers": 4, "hidden": 128, "heads": 2, "ffn": 512, "vocabulary": 1_024, "positions": 128}
    config = ModelConfig(**sizes, architecture=architecture)
    model, again, other = (MaskedLM(config).initialise(seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert not torch.equal(model.encoder.embeddings.word.weight, other.encoder.embeddings.word.weight)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == (1.0 if "norm" in name and name.endswith("weight") else 0.0)).all(), name
        else:
            into_residual = "attention_output" in name or "ffn_output" in name
            std = 0.02 if architecture == "megatron-bert" else 0.02 * math.sqrt(768 / 128)
            expected = std / math.sqrt(8) if into_residual else std
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
