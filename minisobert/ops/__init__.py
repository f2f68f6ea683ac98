"""The operations that an encoder spends its time in. Each file has a formula, a reference and the public function."""

from minisobert.ops.add_norm import add_norm, add_norm_reference
from minisobert.ops.attention import (
    Documents,
    attention,
    attention_reference,
    self_attention,
    self_attention_reference,
)
from minisobert.ops.bias_gelu import bias_gelu, bias_gelu_reference
from minisobert.ops.cross_entropy import (
    cross_entropy,
    cross_entropy_gradient,
    cross_entropy_gradient_reference,
    cross_entropy_parts,
    cross_entropy_parts_reference,
    cross_entropy_reference,
)
from minisobert.ops.dropout import Dropout, drop, drop_reference
from minisobert.ops.gated_gelu import gated_gelu, gated_gelu_reference
from minisobert.ops.rotary import rotary, rotary_reference, rotation

__all__ = [
    "Documents",
    "Dropout",
    "add_norm",
    "add_norm_reference",
    "attention",
    "attention_reference",
    "bias_gelu",
    "bias_gelu_reference",
    "cross_entropy",
    "cross_entropy_gradient",
    "cross_entropy_gradient_reference",
    "cross_entropy_parts",
    "cross_entropy_parts_reference",
    "cross_entropy_reference",
    "drop",
    "drop_reference",
    "gated_gelu",
    "gated_gelu_reference",
    "rotary",
    "rotary_reference",
    "rotation",
    "self_attention",
    "self_attention_reference",
]
