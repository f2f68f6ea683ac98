"""Slices of parameters together are the whole, and a checkpoint's runs are at the places of the slices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minisobert.config import ModelConfig
from minisobert.model import MaskedLM
from minisobert.parallel import splits

BLOCK = "encoder.blocks.7."
# A parameter of each kind: name → shape of the whole for n ranks, given the numbers of a rank's outputs and inputs
PARAMETERS = {
    BLOCK + "qkv.weight": lambda n, outputs, inputs: (n * outputs, inputs),  # column
    BLOCK + "qkv.bias": lambda n, outputs, inputs: (n * outputs,),
    BLOCK + "gated_ffn_input.weight": lambda n, outputs, inputs: (2 * n * outputs, inputs),  # gated
    BLOCK + "gated_ffn_input.bias": lambda n, outputs, inputs: (2 * n * outputs,),
    BLOCK + "ffn_output.weight": lambda n, outputs, inputs: (outputs, n * inputs),  # row
    BLOCK + "ffn_output.bias": lambda n, outputs, inputs: (outputs,),
    "encoder.embeddings.word.weight": lambda n, outputs, inputs: (n * outputs, inputs),  # vocab
    "encoder.final_norm.weight": lambda n, outputs, inputs: (inputs,),  # whole on every rank
}
SIZES = st.integers(1, 5)


def whole_of(name: str, ranks: int, outputs: int, inputs: int) -> torch.Tensor:
    shape = PARAMETERS[name](ranks, outputs, inputs)
    return torch.arange(torch.Size(shape).numel()).view(shape)


@given(name=st.sampled_from(list(PARAMETERS)), ranks=SIZES, outputs=SIZES, inputs=SIZES, data=st.data())
def test_runs_of_a_slice_lie_where_the_slice_has_its_elements_from(name, ranks, outputs, inputs, data):
    whole = whole_of(name, ranks, outputs, inputs)
    rank = data.draw(st.integers(0, ranks - 1))
    own = splits.slice_of(name, whole, rank, ranks)
    assert splits.whole_shape(name, tuple(own.shape), ranks) == whole.shape
    first = data.draw(st.integers(0, own.numel()))
    count = data.draw(st.integers(0, own.numel() - first))
    found = torch.full((count,), -1)
    for in_whole, at, length in splits.contiguous_runs(name, tuple(own.shape), first, count, rank, ranks):
        assert (found[at : at + length] == -1).all()  # nothing is written twice
        found[at : at + length] = whole.flatten()[in_whole : in_whole + length]
    assert found.tolist() == own.flatten()[first : first + count].tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", PARAMETERS)
def test_all_slices_together_are_the_whole(name, ranks):
    whole = whole_of(name, ranks, 3, 5)
    slices = [splits.slice_of(name, whole, rank, ranks).flatten().tolist() for rank in range(ranks)]
    copies = ranks if splits.split_dimension(name) is None else 1
    assert sorted(element for part in slices for element in part) == sorted(copies * whole.flatten().tolist())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_of_a_gated_matrix_makes_the_same_features_of_both_halves(ranks):
    """The product of the two halves on a rank is its slice of the whole product."""
    features, name = 8, BLOCK + "gated_ffn_input.weight"
    w, x = torch.randn(2 * features, 5), torch.randn(5)
    a, b = (w @ x).chunk(2)
    parts = [torch.mul(*(splits.slice_of(name, w, rank, ranks) @ x).chunk(2)) for rank in range(ranks)]
    torch.testing.assert_close(torch.cat(parts), a * b)


@pytest.mark.parametrize("architecture", ["megatron-bert", "modernbert"])
def test_every_matrix_of_a_block_is_split_and_every_vector_of_tokens_is_summed(architecture):
    with torch.device("meta"):
        model = MaskedLM(ModelConfig(2, 64, 2, 96, vocabulary=128, positions=32, architecture=architecture))
    parameters = dict(model.named_parameters())
    unsplit = {name for name, p in parameters.items() if p.dim() == 2 and splits.split_dimension(name) is None}
    tables = {"encoder.embeddings.position.weight", "encoder.embeddings.token_type.weight"}
    assert unsplit == (tables & parameters.keys()) | {"mlm_head.dense.weight"}
    # parameters between a row layer and the next column layer see only some tokens; the head sees all masked ones
    between = {
        name for name, p in parameters.items() if splits.split_dimension(name) is None and "mlm_head" not in name
    }
    assert {name for name in parameters if splits.summed_over_tokens(name)} == between
