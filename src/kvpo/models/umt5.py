"""Prompt embeddings: the UMT5 encoder of the Wan models through transformers, behind an on-disk cache.

The encoder has 5.7 billion parameters, and a run needs each embedding once, so it is loaded only if the cache
lacks one.
"""

import hashlib
import html
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from kvpo.extras import extra
from kvpo.files import named_list, new_file
from kvpo.models.pretrained import read_tokenizer, strict_pretrained
from kvpo.models.tensor_files import (
    Shapes,
    assign_tensors,
    fingerprint,
    read_safetensors,
    read_tensors,
    renamed,
    shapes_of,
    storable,
)

with extra("wan"):
    import ftfy

logger = logging.getLogger(__name__)

OFFICIAL_WEIGHTS = "models_t5_umt5-xxl-enc-bf16.pth"
OFFICIAL_TOKENIZER = "google/umt5-xxl"
TEXT_LEN = 512

_OFFICIAL_TOP = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
_OFFICIAL_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def clean_text(text: str) -> str:
    """Clean a prompt as the Wan models do: repair mojibake and HTML entities, collapse whitespace."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", repaired).strip()


@dataclass(frozen=True)
class UMT5Encoder:
    """Tokenizer and encoder; ``text_len`` tokens per prompt, padded or truncated."""

    model: UMT5EncoderModel
    tokenizer: PreTrainedTokenizerBase
    text_len: int = TEXT_LEN

    def __post_init__(self) -> None:
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the text encoder's table only "
                f"{self.model.config.vocab_size}: they do not belong together"
            )

    @torch.no_grad()
    def encode(self, text: str) -> Tensor:
        """Embedding ``[text_len, D]`` of a prompt; rows of padding are zero."""
        tokens = self.tokenizer(
            [clean_text(text)],
            padding="max_length",
            truncation=True,
            max_length=self.text_len,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        hidden = self.model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).last_hidden_state[0]
        return hidden.masked_fill(tokens.attention_mask[0, :, None] == 0, 0)

    def length(self, text: str) -> int:
        """Number of tokens of a prompt before truncation, including the end token."""
        return token_count(self.tokenizer, text)


def token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Number of tokens of a prompt, including the end token."""
    return len(tokenizer(clean_text(text), verbose=False).input_ids)


def transformers_name(name: str) -> str:
    """transformers' name of a parameter in Wan's own text encoder file."""
    match = re.match(r"blocks\.(\d+)\.(.*)", name)
    if match is None:
        return renamed(name, _OFFICIAL_TOP)
    rest = renamed(match[2], _OFFICIAL_BLOCK)
    return name if rest == match[2] else f"encoder.block.{match[1]}.{rest}"


def _sizes(shapes: Shapes) -> dict[str, int]:
    attention = "encoder.block.0.layer.0.SelfAttention."
    places = {
        "vocab_size": ("shared.weight", 0),
        "d_model": ("shared.weight", 1),
        "attention width": (attention + "q.weight", 0),
        "num_heads": (attention + "relative_attention_bias.weight", 1),
        "relative_attention_num_buckets": (attention + "relative_attention_bias.weight", 0),
        "d_ff": ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
    }
    layers = {match[1] for name in shapes if (match := re.match(r"encoder\.block\.(\d+)\.", name))}
    found = {size: shapes[name][axis] for size, (name, axis) in places.items() if name in shapes}
    return found | {"num_layers": len(layers)}


def _load_official(path: Path, device: torch.device | str, dtype: torch.dtype) -> UMT5EncoderModel:
    """The encoder in a file of Wan's own layout; its sizes are inferred from the shapes."""
    tensors = {transformers_name(name): tensor for name, tensor in read_tensors(path).items()}
    sizes = _sizes(shapes_of(tensors))
    if len(sizes) < 7:
        raise ValueError(
            f"{path}: not a UMT5 encoder in Wan's layout ({OFFICIAL_WEIGHTS}); "
            f"it holds {named_list(list(tensors)[:3])}"
        )
    config = UMT5Config(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["d_model"],
        d_kv=sizes["attention width"] // sizes["num_heads"],
        d_ff=sizes["d_ff"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        relative_attention_num_buckets=sizes["relative_attention_num_buckets"],
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    # One embedding table under two names in transformers.
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    assign_tensors(model, tensors, str(path), device=device, dtype=dtype)
    model.tie_weights()
    return model


def text_encoder_files(root: Path) -> tuple[Path, Path]:
    """Paths of weights and tokenizer in a model directory of Wan's or diffusers' layout.

    Raises:
        ValueError: the directory has neither layout.
    """
    layouts = ((OFFICIAL_WEIGHTS, OFFICIAL_TOKENIZER), ("text_encoder", "tokenizer"))
    for weights, tokenizer in layouts:
        if (root / weights).exists() and (root / tokenizer).is_dir():
            return root / weights, root / tokenizer
    raise ValueError(
        f"{root}: no text encoder; expected {OFFICIAL_WEIGHTS} and {OFFICIAL_TOKENIZER}/ (Wan's layout), "
        "or text_encoder/ and tokenizer/ (diffusers' layout)"
    )


def load_text_encoder(
    weights: Path,
    tokenizer: Path,
    *,
    text_len: int = TEXT_LEN,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> UMT5Encoder:
    """Load the text encoder from local files, frozen.

    Args:
        weights: Wan's own ``.pth`` file or a directory that transformers reads.
        tokenizer: directory of the tokenizer.

    Raises:
        ValueError: unreadable files, keys that are missing, unexpected or misshapen (each named).
    """
    if weights.is_dir():
        straight = {"": torch.device(device)}  # from the mapped files onto the device
        model = strict_pretrained(UMT5EncoderModel, weights, dtype=dtype, device_map=straight)
    else:
        model = _load_official(weights, device, dtype).eval().requires_grad_(False)
    return UMT5Encoder(model, read_tokenizer(tokenizer), text_len)


def encoder_fingerprint(weights: Path, tokenizer: Path, dtype: torch.dtype) -> str:
    """Digest of what determines an embedding: the files and the precision."""
    return fingerprint((weights, tokenizer), str(dtype))


@dataclass(frozen=True)
class PromptCache:
    """Prompt embeddings on disk, one safetensors file per prompt, keyed by cleaned text and encoder."""

    directory: Path
    encoder: str
    """`encoder_fingerprint` of the encoder; embeddings of another encoder are never returned."""
    text_len: int = TEXT_LEN

    def path(self, text: str) -> Path:
        """Path of a prompt's file, which may not exist yet."""
        key = json.dumps([self.encoder, self.text_len, clean_text(text)], ensure_ascii=False)
        return self.directory / f"{hashlib.sha256(key.encode('utf-8')).hexdigest()}.safetensors"

    def _stored(self, text: str) -> tuple[Tensor, int] | None:
        """Rows and number of tokens of a prompt, or None if it is absent or its file is damaged."""
        path = self.path(text)
        if not path.is_file():
            return None
        try:
            stored = read_safetensors(path)
            rows, tokens = stored["embedding"], int(stored["tokens"])
        except (ValueError, KeyError, RuntimeError):
            return None  # computed and written again
        return (rows, tokens) if rows.dim() == 2 else None

    def read(self, text: str) -> Tensor | None:
        """Embedding ``[text_len, D]`` of a prompt, or None if it is absent or its file is damaged."""
        if (stored := self._stored(text)) is None:
            return None
        rows, _ = stored
        embedding = rows.new_zeros(self.text_len, rows.shape[1])
        embedding[: len(rows)] = rows
        return embedding

    def write(self, text: str, embedding_LD: Tensor, tokens: int) -> None:
        """Store an embedding without its padding, and its prompt's number of tokens, in one step."""
        filled = embedding_LD.any(dim=1).nonzero()
        used = int(filled.max()) + 1 if len(filled) else 0
        path = self.path(text)
        self.directory.mkdir(parents=True, exist_ok=True)
        with new_file(path, failures=(SafetensorError,)) as scratch:
            stored = storable({"embedding": embedding_LD[:used], "tokens": torch.tensor(tokens)})
            save_file(stored, scratch, metadata={"text": clean_text(text)})

    def fill(self, texts: Iterable[str], load: Callable[[], UMT5Encoder]) -> dict[str, int]:
        """Compute and store the missing embeddings.

        The encoder is loaded only if any are missing, and released afterwards. Texts are encoded one by one,
        so that an embedding does not depend on the other texts, nor on how many processes (such as the ranks
        of a run) share the work. Returns the number of tokens of every text truncated to ``text_len``.
        """
        lengths = {text: stored[1] for text in dict.fromkeys(texts) if (stored := self._stored(text))}
        missing = [text for text in dict.fromkeys(texts) if text not in lengths]
        if missing:
            logger.info("encoding %d prompts; they are kept in %s", len(missing), self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)
            encoder = load()
            for patience in (0, -1):  # first texts that no other process encodes, then wait for theirs
                for text in (text for text in missing if text not in lengths):
                    with suppress(Timeout):
                        lengths[text] = self._shared(text, encoder, patience)
        return {text: length for text, length in lengths.items() if length > self.text_len}

    def _shared(self, text: str, encoder: UMT5Encoder, patience: float) -> int:
        """Number of tokens of a text, which this process encodes unless another one has already done so.

        Raises Timeout if another process is encoding it for more than ``patience`` seconds; -1 waits for it.
        """
        claim = self.path(text).with_suffix(".lock")
        with FileLock(claim, timeout=patience):
            if (stored := self._stored(text)) is not None:
                tokens = stored[1]
            else:
                tokens = encoder.length(text)
                self.write(text, encoder.encode(text), tokens)
            claim.unlink(missing_ok=True)  # the next process to lock it finds it stored
            return tokens

    def embed(self, texts: Sequence[str], load: Callable[[], UMT5Encoder]) -> dict[str, Tensor]:
        """Embedding ``[text_len, D]`` (CPU) of each text; missing ones are computed and stored first."""
        self.fill(texts, load)
        found = {text: self.read(text) for text in dict.fromkeys(texts)}
        return {text: embedding for text, embedding in found.items() if embedding is not None}
