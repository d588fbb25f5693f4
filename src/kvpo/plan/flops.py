"""FLOPs of the transformer's matrix products, two per multiply-add."""

from dataclasses import dataclass
from math import prod

from kvpo.models.adapters import LORA_TARGETS
from kvpo.models.settings import WanShape


@dataclass(frozen=True)
class Call:
    """One forward pass: rows that share one text, each a block of frames that also sees context frames."""

    shape: WanShape
    rows: int
    block: int
    context: int

    @property
    def queries(self) -> int:
        """Tokens computed, over all rows."""
        return self.rows * self.block * self.shape.tokens_per_frame

    @property
    def keys(self) -> int:
        """Tokens that each query of a row attends to."""
        return (self.block + self.context) * self.shape.tokens_per_frame


def _attention(call: Call) -> float:
    """Scores and weighted sums of one layer: over the context and over the text."""
    return 4.0 * call.queries * (call.keys + call.shape.text_len) * call.shape.dim


def _self_keys_values(call: Call) -> float:
    return 4.0 * call.queries * call.shape.dim**2


def _layer_linears(call: Call) -> float:
    """Projections of both attentions and the feed-forward of one layer; text keys and values once."""
    dim = call.shape.dim
    own = call.queries * (4 * dim**2 + 2 * dim**2 + 2 * dim * call.shape.ffn_dim)
    return 2.0 * (own + 2 * call.shape.text_len * dim**2)


def _ends(call: Call) -> float:
    """Patch embedding and the embeddings of text and timestep."""
    shape, dim = call.shape, call.shape.dim
    patch = call.queries * prod(shape.patch_size) * shape.channels * dim
    text = shape.text_len * (shape.text_dim * dim + dim**2)
    time = call.rows * (shape.freq_dim * dim + dim**2 + 6 * dim**2)
    return 2.0 * (patch + text + time)


def attention_flops(call: Call) -> float:
    """The attention products of all layers."""
    return call.shape.num_layers * _attention(call)


def velocity_flops(call: Call) -> float:
    """A forward pass that returns velocities."""
    shape = call.shape
    head = 2.0 * call.queries * shape.dim * prod(shape.patch_size) * shape.channels
    return attention_flops(call) + shape.num_layers * _layer_linears(call) + _ends(call) + head


def encode_flops(call: Call) -> float:
    """A clean pass: all layers, but only keys and values of the last one, and no head."""
    layers = call.shape.num_layers - 1
    return layers * (_attention(call) + _layer_linears(call)) + _self_keys_values(call) + _ends(call)


def adapter_flops(call: Call, rank: int) -> float:
    """FLOPs of a pass for an adapter beside the weights: 2 rank (inputs + outputs) per token and layer."""
    dim, ffn = call.shape.dim, call.shape.ffn_dim
    total = 0.0
    for target in LORA_TARGETS:
        tokens = call.shape.text_len if target in ("cross_attn.k", "cross_attn.v") else call.queries
        widths = dim + ffn if target.startswith("ffn") else 2 * dim
        total += 2.0 * tokens * rank * widths
    return call.shape.num_layers * total


def summing_flops(shape: WanShape, rank: int) -> float:
    """FLOPs of adding an adapter to the weights: 2 rank x inputs x outputs per layer, whatever the tokens."""
    widths = (shape.ffn_dim if target.startswith("ffn") else shape.dim for target in LORA_TARGETS)
    return 2.0 * shape.num_layers * sum(rank * shape.dim * width for width in widths)
