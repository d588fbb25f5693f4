"""A held-out scorer of how well a clip matches a caption, learned from pairs alone; training never sees it.

One small network encodes frames and frame differences, another averages word embeddings. Contrastive training
on exact renders (half of them through the latent codec) pulls each clip and its caption together. The scorer
knows neither the vocabulary's meanings nor how the rewards measure pixels: its only labels are which caption
came with which clip. ``python -m kvpo.world.unseen`` rebuilds the shipped weights in about five CPU minutes.
Axes: B clips, T frames, D embedding, N pairs.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kvpo.files import new_file
from kvpo.models.finite import require_finite_weights
from kvpo.models.tensor_files import storable
from kvpo.progress import progress_bars
from kvpo.world.codec import FRAME_SIZE, PixelCodec, asset, load_codec
from kvpo.world.imperfect import CLEAN, observe
from kvpo.world.stories import Split, sample_story

EMBEDDING = 64
WORD_BUCKETS = 2048
ASSET = "unseen"
MATCHED, MISMATCHED = 0.9, 0.1
"""Scores that calibration gives to the median true pair and to the median false pair of clean clips."""
CLIP_WINDOW = 8
"""Frames per training clip."""
ACT = 12
"""Frames per act of the stories that clips are cut from: the minimum, so all acts have this length."""


class ClipEncoder(nn.Module):
    """Clips [B, T, 3, FRAME_SIZE, FRAME_SIZE] in [0, 1], T >= 1, to unit vectors [B, D]."""

    def __init__(self) -> None:
        super().__init__()
        cell = FRAME_SIZE // 16
        self.frames = nn.Sequential(
            nn.Conv2d(6, 24, 2 * cell + 1, stride=cell, padding=cell, padding_mode="circular"),
            nn.ReLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, 96, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.clip = nn.Sequential(nn.Linear(4 * 96, 256), nn.ReLU(), nn.Linear(256, EMBEDDING))

    def forward(self, video_BTCHW: Tensor) -> Tensor:
        """Embed clips: frame differences show motion, and mean and spread over time show how it continues."""
        change = torch.diff(video_BTCHW, dim=1, prepend=video_BTCHW[:, :1])
        if video_BTCHW.shape[1] > 1:
            # The first frame has no predecessor, and a difference of zero would read as standing still.
            change = torch.cat([change[:, 1:2], change[:, 1:]], 1)
        seen = torch.cat([video_BTCHW - 0.3, 4 * change], 2).flatten(0, 1)
        maps = self.frames(seen)
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1).unflatten(0, video_BTCHW.shape[:2])
        spread = pooled.std(1, correction=0)
        return F.normalize(self.clip(torch.cat([pooled.mean(1), spread], 1)), dim=1)


class CaptionEncoder(nn.Module):
    """Captions to unit vectors [B, D]: mean embedding of their words and word bigrams."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORD_BUCKETS, EMBEDDING, mode="mean")
        nn.init.normal_(self.words.weight, std=0.1)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embed captions; words are hashed, so any text has an embedding."""
        bags = [_buckets(caption) for caption in captions]
        starts = torch.tensor([0, *map(len, bags)][:-1]).cumsum(0)
        return F.normalize(self.words(torch.tensor(sum(bags, [])), starts), dim=1)


def _buckets(caption: str) -> list[int]:
    found = re.findall(r"[a-z]+", caption.lower()) or [""]
    pairs = [f"{a} {b}" for a, b in zip(found, found[1:], strict=False)]
    return [crc32(token.encode()) % WORD_BUCKETS for token in (*found, *pairs)]


class UnseenScorer(nn.Module):
    """Scores how well clips match captions, in [0, 1].

    A typical clean pair scores MATCHED, a typical clean clip with another clip's caption MISMATCHED.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clips = ClipEncoder()
        self.captions = CaptionEncoder()
        self.register_buffer("distractors_ND", torch.zeros(1, EMBEDDING))
        self.register_buffer("calibration", torch.tensor([1.0, 0.0]))

    def margin(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Similarity to the own caption minus the mean similarity to the fixed distractor captions, [B]."""
        clip_BD = self.clips(video_BTCHW)
        return ((self.captions(prompts) - self.distractors_ND.mean(0)) * clip_BD).sum(1)

    @torch.no_grad()
    def forward(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Match [B] of clips [B, T, 3, H, W] in [0, 1] with captions; ValueError if lengths differ."""
        if len(prompts) != video_BTCHW.shape[0]:
            raise ValueError(
                f"prompts has {len(prompts)} entries for {video_BTCHW.shape[0]} clips: "
                f"give one caption per clip"
            )
        slope, offset = self.calibration
        return torch.sigmoid(slope * self.margin(video_BTCHW, prompts) + offset)


def load_unseen(path: Path | None = None) -> UnseenScorer:
    """Read a scorer for inference, by default the one that ships with the package."""
    source = path or asset(ASSET)
    with safe_open(source, framework="pt") as stored:
        state = {name: stored.get_tensor(name).float() for name in stored.keys()}
        captions = json.loads(stored.metadata()["distractors"])
    require_finite_weights(state, str(source))
    scorer = UnseenScorer()
    scorer.load_state_dict(state | {"distractors_ND": torch.zeros(1, EMBEDDING)})
    _set_distractors(scorer, captions)
    return scorer.eval().requires_grad_(False)


def save_unseen(scorer: UnseenScorer, distractors: Sequence[str], path: Path) -> None:
    """Write the scorer as half-precision safetensors, with its distractor captions in the header."""
    state = {name: value.half() for name, value in scorer.state_dict().items()}
    state["calibration"] = scorer.calibration
    del state["distractors_ND"]
    with new_file(path, failures=(SafetensorError,)) as partial:
        save_file(storable(state), partial, metadata={"distractors": json.dumps(list(distractors))})


@torch.no_grad()
def _set_distractors(scorer: UnseenScorer, captions: Sequence[str]) -> None:
    scorer.distractors_ND = scorer.captions(captions)


@dataclass(frozen=True)
class Pairs:
    """Clips with their captions: ``video_NTCHW`` in uint8."""

    video_NTCHW: Tensor
    captions: tuple[str, ...]


def clean_pairs(split: Split, count: int, generator: torch.Generator, codec: PixelCodec | None) -> Pairs:
    """Render ``count`` exact clips of one act (ACT frames); every second one passes the codec, if given."""
    stories = [sample_story(generator, 2, 2 * ACT, split=split) for _ in range((count + 1) // 2)]
    video = observe(stories, generator, CLEAN)
    assert all(story.acts[1].start == ACT for story in stories)
    video_NTCHW = video.unflatten(1, (2, ACT)).flatten(0, 1)[:count]
    captions = tuple(act.caption for story in stories for act in story.acts)[:count]
    if codec is not None:
        for rows in torch.arange(0, count, 2).split(64):
            video_NTCHW[rows] = codec.decode(codec.encode(video_NTCHW[rows]))
    return Pairs((video_NTCHW * 255).round().byte(), captions)


def train_unseen(
    steps: int = 900,
    pool: int = 4000,
    batch: int = 64,
    judged: int = 400,
    seed: int = 0,
    show: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[UnseenScorer, list[str]]:
    """Train on ``pool`` pairs of the training split and calibrate on ``judged`` fresh ones, from ``seed``.

    Returns the scorer and the texts of its distractor captions.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        # Module initialisers use only the global generator.
        torch.manual_seed(seed)
        scorer = UnseenScorer()
    codec = load_codec()
    chunks = []
    for start in range(0, pool, 200):
        chunks.append(clean_pairs("train", min(200, pool - start), generator, codec))
        show("rendering", min(pool, start + 200), pool)
    pairs = Pairs(
        torch.cat([chunk.video_NTCHW for chunk in chunks]),
        tuple(caption for chunk in chunks for caption in chunk.captions),
    )
    del chunks
    temperature = nn.Parameter(torch.tensor(2.3))
    parameters = [*scorer.parameters(), temperature]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randperm(len(pairs.captions), generator=generator)[:batch]
        clips = scorer.clips(_augment(pairs.video_NTCHW[rows], generator))
        captions = scorer.captions([pairs.captions[row] for row in rows.tolist()])
        logits = clips @ captions.T * temperature.exp().clamp(max=30)
        truth = torch.arange(batch)
        loss = F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        show("training", step + 1, steps)
    scorer.eval().requires_grad_(False)
    fresh = clean_pairs("train", judged, generator, codec)
    distractors = sorted(set(fresh.captions))[:64]
    _set_distractors(scorer, distractors)
    _calibrate(scorer, clean_pairs("train", judged, generator, codec))
    return scorer, distractors


def _augment(video_NTCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Random window in time and random turn of the torus, neither of which a caption can tell."""
    start = int(torch.randint(video_NTCHW.shape[1] - CLIP_WINDOW + 1, (), generator=generator))
    turn = int(torch.randint(video_NTCHW.shape[4], (), generator=generator))
    return video_NTCHW[:, start : start + CLIP_WINDOW].float().div(255).roll(turn, 4)


@torch.no_grad()
def _calibrate(scorer: UnseenScorer, pairs: Pairs) -> None:
    video = pairs.video_NTCHW.float() / 255
    true = scorer.margin(video, pairs.captions).median()
    false = scorer.margin(video.roll(1, 0), pairs.captions).median()
    high, low = torch.logit(torch.tensor([MATCHED, MISMATCHED]))
    slope = (high - low) / (true - false)
    scorer.calibration = torch.stack([slope, high - slope * true])


@dataclass(frozen=True)
class UnseenReport:
    """Quality of a scorer on clean clips of one split."""

    recall_at_1_of_32: float
    matched: float
    mismatched: float
    brightened: float
    frozen_moving: float
    moving: float
    desaturated: float


@torch.no_grad()
def measure_unseen(
    scorer: UnseenScorer, split: Split = "test", groups: int = 16, seed: int = 1
) -> UnseenReport:
    """Recall@1 of 32 from clip to caption; mean scores of true, false and tampered pairs after the codec."""
    generator = torch.Generator().manual_seed(seed)
    codec = load_codec()
    pairs = clean_pairs(split, 32 * groups, generator, None)
    video = torch.cat([codec.decode(codec.encode(v.float() / 255)) for v in pairs.video_NTCHW.split(64)])
    clips = scorer.clips(video).unflatten(0, (groups, 32))
    captions = scorer.captions(pairs.captions).unflatten(0, (groups, 32))
    hits = (clips @ captions.transpose(1, 2)).argmax(2) == torch.arange(32)
    moving = [i for i, c in enumerate(pairs.captions) if re.search(r"left|right|bob|boun", c.lower())]
    moving_captions = [pairs.captions[i] for i in moving]

    def mean_score(v: Tensor, texts: Sequence[str]) -> float:
        return float(scorer(v, texts).mean())

    return UnseenReport(
        recall_at_1_of_32=float(hits.float().mean()),
        matched=mean_score(video, pairs.captions),
        mismatched=mean_score(video.roll(1, 0), pairs.captions),
        brightened=mean_score((1.5 * video).clamp(0, 1), pairs.captions),
        frozen_moving=mean_score(video[moving, :1].expand(-1, video.shape[1], -1, -1, -1), moving_captions),
        moving=mean_score(video[moving], moving_captions),
        desaturated=mean_score(video.mean(2, keepdim=True).expand_as(video), pairs.captions),
    )


def main() -> None:
    """Rebuild the shipped scorer and report it on clean clips of the test split."""
    torch.set_num_threads(1)
    with progress_bars() as show:
        scorer, distractors = train_unseen(show=show)
    target = asset(ASSET)
    save_unseen(scorer, distractors, target)
    Console().print(target, target.stat().st_size, measure_unseen(load_unseen(target)))


if __name__ == "__main__":
    main()
