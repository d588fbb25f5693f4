"""Captions as numbers: a word tokenizer over a committed vocabulary and a small learned text encoder."""

from collections.abc import Sequence
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpo.world.grammar import words

TEXT_LENGTH = 32
TEXT_DIM = 64
LAYERS, HEADS = 2, 4
PAD, UNKNOWN = 0, 1


class WordTokenizer:
    """Words to ids; ids are line numbers of the committed vocabulary file."""

    def __init__(self) -> None:
        text = files("kvpo.world").joinpath("assets", "vocabulary.txt").read_text(encoding="utf-8")
        self.vocabulary = tuple(text.split("\n")[:-1])
        self._ids = {word: index for index, word in enumerate(self.vocabulary)}

    def __len__(self) -> int:
        return len(self.vocabulary)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids [B, TEXT_LENGTH], padded with PAD; longer captions are cut, unknown words become UNKNOWN."""
        ids_BL = torch.full((len(captions), TEXT_LENGTH), PAD)
        for row, caption in enumerate(captions):
            ids = [self._ids.get(word, UNKNOWN) for word in words(caption)[:TEXT_LENGTH]]
            ids_BL[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        return ids_BL

    def unknown(self, caption: str) -> list[str]:
        """Distinct words of a caption that are not in the vocabulary, in order."""
        return list(dict.fromkeys(word for word in words(caption) if word not in self._ids))


class LearnedTextEncoder(nn.Module):
    """Captions to embeddings [B, TEXT_LENGTH, TEXT_DIM], zero at padding as Wan's text contract requires.

    Token and position embeddings, then pre-norm transformer layers; trained together with the generator.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = WordTokenizer()
        self.token_embedding = nn.Embedding(len(self.tokenizer), TEXT_DIM)
        self.position_embedding = nn.Parameter(torch.randn(TEXT_LENGTH, TEXT_DIM) * 0.02)
        self.layers = nn.ModuleList(_Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(TEXT_DIM)
        nn.init.normal_(self.token_embedding.weight, std=0.5)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embed ``captions`` (length B): [B, TEXT_LENGTH, TEXT_DIM]."""
        return self.embed(self.tokenizer(captions).to(self.position_embedding.device))

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Embed token ids [B, TEXT_LENGTH]: [B, TEXT_LENGTH, TEXT_DIM]."""
        present_BL = ids_BL != PAD
        x_BLD = self.token_embedding(ids_BL) + self.position_embedding
        # An empty caption has nothing to attend to; let it see its first position, which is zeroed below.
        visible_BL = present_BL.clone()
        visible_BL[:, 0] = True
        for layer in self.layers:
            x_BLD = layer(x_BLD, visible_BL)
        return self.norm(x_BLD) * present_BL[..., None]


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(TEXT_DIM)
        self.qkv = nn.Linear(TEXT_DIM, 3 * TEXT_DIM)
        self.out = nn.Linear(TEXT_DIM, TEXT_DIM)
        self.norm_feedforward = nn.LayerNorm(TEXT_DIM)
        self.feedforward = nn.Sequential(
            nn.Linear(TEXT_DIM, 4 * TEXT_DIM), nn.GELU(approximate="tanh"), nn.Linear(4 * TEXT_DIM, TEXT_DIM)
        )

    def forward(self, x_BLD: Tensor, visible_BL: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x_BLD)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BL[:, None, None, :])
        x_BLD = x_BLD + self.out(attended.transpose(1, 2).flatten(2))
        return x_BLD + self.feedforward(self.norm_feedforward(x_BLD))
