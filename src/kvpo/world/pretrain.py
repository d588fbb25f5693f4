"""Pretraining of the embedded generator: flow matching with teacher forcing on deliberately imperfect videos.

All blocks of all videos train in one pass: clean rows compute keys and values once, noisy rows attend to the
frames their block would see when deployed, or, in part of the rows, to a randomly routed history, so that
routed contexts lie on the model's own manifold.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kvpo.config import StreamConfig
from kvpo.engine.noise import keyed_generator
from kvpo.files import new_file
from kvpo.method.flow import add_noise, few_step_sigmas
from kvpo.method.routing import visible_frames
from kvpo.models.causal_wan import CausalWan
from kvpo.models.context import TeacherContext
from kvpo.models.finite import require_finite_weights
from kvpo.models.settings import WanShape
from kvpo.models.tensor_files import storable
from kvpo.world.codec import load_codec
from kvpo.world.imperfect import training_batch
from kvpo.world.muon import Muon
from kvpo.world.text import LearnedTextEncoder


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of a pretraining run; the shipped base used the defaults."""

    steps: int = 2400
    videos: int = 12
    num_frames: int = 60
    snippet_blocks: int = 6
    """Consecutive blocks taken from each video, besides its first one (the sink)."""
    noisy_copies: int = 2
    """Noisy rows per clean row."""
    lr: float = 2.5e-3
    warmup: int = 100
    decay_from: float = 0.6
    """Share of the steps after which the learning rate falls linearly to zero."""
    ema_decay: float = 0.998
    routed_share: float = 0.4
    """Share of the videos whose blocks see a routed history."""
    donor_share: float = 0.25
    """Share of the routed videos that are routed into another video's history."""
    reencoded_share: float = 0.5
    """Share of the videos whose past before a switch is encoded under the new prompt, as streams do."""
    context_noise: float = 0.15
    """Upper end of the noise mixed into the clean rows, so that the model forgives its own errors."""
    solver_share: float = 0.7
    """Share of the noisy rows at the solver's own noise levels; the rest cover (0, 1)."""
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Encoded snippets of training videos."""

    latents_BKFCHW: Tensor
    """K chosen blocks of each video."""
    captions: list[list[str]]
    switches: list[list[int]]
    chosen: list[list[int]]
    """Indices of the chosen blocks."""


class TrainingVideos(Dataset):
    """Batches of encoded snippets; item n is a pure function of (settings, n)."""

    def __init__(self, stream: StreamConfig, settings: PretrainSettings) -> None:
        self.stream = stream
        self.settings = settings
        self.codec = load_codec()

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> Batch:
        torch.set_num_threads(1)
        settings, block = self.settings, self.stream.block
        generator = keyed_generator("pretraining videos", settings.seed, step)
        videos, captions, switches = training_batch(generator, settings.videos, settings.num_frames)
        blocks = settings.num_frames // block
        chosen = [snippet_blocks(own, blocks, self.stream, settings, generator) for own in switches]
        cut = torch.stack(
            [v.unflatten(0, (blocks, block))[own] for v, own in zip(videos, chosen, strict=True)]
        )
        with torch.no_grad():
            latents = self.codec.encode(cut.flatten(1, 2)).unflatten(1, cut.shape[1:3])
        return Batch(latents, captions, switches, chosen)


def snippet_blocks(
    switches: list[int],
    blocks: int,
    stream: StreamConfig,
    settings: PretrainSettings,
    generator: torch.Generator,
) -> list[int]:
    """Blocks of a video that are trained on: the first, and a run of consecutive ones.

    Half of the runs of a video with switches contain one, a third of the others follow the first block.
    """
    length = settings.snippet_blocks
    last = blocks - length

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    kind = float(torch.rand((), generator=generator))
    if switches and kind < 0.5:
        at = switches[draw(0, len(switches) - 1)] // stream.block
        start = min(max(1, at - draw(2, length - 1)), last)
    else:
        start = 1 if kind > 0.67 else draw(1, last)
    return [0, *range(start, start + length)]


def block_contexts(
    chosen: list[list[int]], stream: StreamConfig, settings: PretrainSettings, generator: torch.Generator
) -> Tensor:
    """Context frames of every chosen block ``[videos * blocks, P]`` as flat indices; -1 is an empty slot.

    A deployment context lacks the frames that the snippet left out. Routed rows keep the three most recent
    past frames and fill the other local slots with one to three frames from anywhere earlier in the snippet,
    or from another video's.
    """
    videos, per_video = len(chosen), len(chosen[0])
    past = stream.deployment.local_past
    assert past is not None
    table = torch.full((videos, per_video, stream.sink + past), -1)
    length = per_video * stream.block
    for video, blocks in enumerate(chosen):
        place = {
            b * stream.block + f: n * stream.block + f
            for n, b in enumerate(blocks)
            for f in range(stream.block)
        }
        routed = bool(torch.rand((), generator=generator) < settings.routed_share)
        donor = routed and bool(torch.rand((), generator=generator) < settings.donor_share)
        other = (video + 1) % videos if donor else video
        for n, block in enumerate(blocks):
            start = block * stream.block
            frames = [*chain(*visible_frames(start, range(stream.sink), past))]
            flat = [video * length + place[frame] for frame in frames if frame in place]
            first, stop = (0, length) if donor else (stream.sink, n * stream.block - 3)
            if routed and len(flat) == stream.sink + past and stop > first:
                distinct = int(torch.randint(1, 4, (), generator=generator))
                picks = torch.randint(first, stop, (distinct,), generator=generator).tolist()
                slots = [other * length + picks[k % distinct] for k in range(past - 3)]
                flat = flat[: stream.sink] + slots + flat[-3:]
            table[video, n, : len(flat)] = torch.tensor(flat, dtype=torch.int64)
    return table.flatten(0, 1)


@dataclass(frozen=True)
class Snippets:
    """Rows of one training batch: C clean blocks with their positions and texts."""

    clean_CFCHW: Tensor
    starts_C: Tensor
    context_text_C: Tensor
    """Caption that each block's keys are encoded under."""
    text_C: Tensor
    """Caption that each block is generated under."""
    trained_C: Tensor
    """1 where the block's velocity is trained on, 0 where its context was encoded under a later prompt."""


def snippet_rows(
    batch: Batch, stream: StreamConfig, settings: PretrainSettings, generator: torch.Generator
) -> Snippets:
    """Lay the blocks of a batch out as rows."""
    starts, context_text, text, trained = [], [], [], []
    first_caption = 0
    for video, blocks in enumerate(batch.chosen):
        frames = [block * stream.block for block in blocks]
        segments = [sum(frame >= switch for switch in batch.switches[video]) for frame in frames]
        reencoded = bool(torch.rand((), generator=generator) < settings.reencoded_share)
        for n, (frame, segment) in enumerate(zip(frames, segments, strict=True)):
            starts.append(frame)
            text.append(first_caption + segment)
            later = reencoded and n > 0 and segment < segments[-1]
            context_text.append(first_caption + (segments[-1] if later else segment))
            trained.append(0.0 if later else 1.0)
        first_caption += len(batch.captions[video])
    return Snippets(
        batch.latents_BKFCHW.flatten(0, 1),
        torch.tensor(starts),
        torch.tensor(context_text),
        torch.tensor(text),
        torch.tensor(trained),
    )


def training_loss(
    model: CausalWan,
    text: LearnedTextEncoder,
    batch: Batch,
    stream: StreamConfig,
    settings: PretrainSettings,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared velocity error of the noisy rows of one batch."""
    copies, chosen = settings.noisy_copies, batch.chosen
    rows = snippet_rows(batch, stream, settings, generator)
    clean = rows.clean_CFCHW
    embedded = text([caption for video in batch.captions for caption in video])
    level = torch.rand(len(chosen), generator=generator) * settings.context_noise
    level = level.repeat_interleave(len(chosen[0]))
    seen = add_noise(clean, torch.randn(clean.shape, generator=generator), level)
    sigma = noise_levels(len(clean) * copies, stream, settings, generator)
    target = clean.repeat(copies, 1, 1, 1, 1)
    noise = torch.randn(target.shape, generator=generator)
    context = TeacherContext(
        start_R=rows.starts_C.repeat(copies + 1),
        frames_CP=block_contexts(chosen, stream, settings, generator),
        block=stream.block,
    )
    velocity = model(
        torch.cat([seen, add_noise(target, noise, sigma)]),
        torch.cat([torch.zeros(len(clean)), sigma]),
        embedded,
        context,
        text_rows=torch.cat([rows.context_text_C, rows.text_C.repeat(copies)]),
    )[len(clean) :]
    error_R = (velocity - (noise - target)).pow(2).mean((1, 2, 3, 4))
    weight_R = rows.trained_C.repeat(copies)
    return (error_R * weight_R).sum() / weight_R.sum()


def noise_levels(
    count: int, stream: StreamConfig, settings: PretrainSettings, generator: torch.Generator
) -> Tensor:
    """Noise levels of the noisy rows: mostly the solver's own, the rest anywhere on the shifted schedule."""
    sigmas = few_step_sigmas(stream.schedule, stream.shift).float()
    solver = sigmas[torch.randint(len(sigmas), (count,), generator=generator)]
    u = torch.rand(count, generator=generator)
    anywhere = stream.shift * u / (1 + (stream.shift - 1) * u)
    return torch.where(torch.rand(count, generator=generator) < settings.solver_share, solver, anywhere)


def learning_rate(step: int, settings: PretrainSettings) -> float:
    """Linear warm-up, constant, then linear decay to zero."""
    decay_start = settings.decay_from * settings.steps
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    return settings.lr * min(1.0, (settings.steps - step) / (settings.steps - decay_start))


def new_generator(model: WanShape, seed: int) -> tuple[CausalWan, LearnedTextEncoder]:
    """Freshly initialised transformer and text encoder; the output projection starts at zero."""
    with torch.random.fork_rng(devices=[]):
        # Module initialisers know only the global generator.
        torch.manual_seed(seed)
        transformer = CausalWan(model)
        text = LearnedTextEncoder()
    nn.init.zeros_(transformer.head.head.weight)
    nn.init.zeros_(transformer.head.head.bias)
    return transformer, text


def new_optimizers(
    transformer: CausalWan, trained: nn.Module, lr: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both.
    """
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in trained.parameters() if id(p) not in chosen]
    return (
        Muon(matrices, lr=lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01),
    )


def pretrain(
    model: WanShape,
    stream: StreamConfig,
    settings: PretrainSettings,
    out: Path,
    report: Callable[[int, float], None],
) -> None:
    """Train the embedded generator from scratch and write its moving average to ``out`` (safetensors, fp16).

    ``report`` is called with (step, loss) after every step. Deterministic in the settings on one machine.
    """
    transformer, text = new_generator(model, settings.seed)
    trained = nn.ModuleDict({"transformer": transformer, "text": text})
    average = {name: value.detach().clone() for name, value in trained.state_dict().items()}
    parameters = list(trained.parameters())
    optimizers = new_optimizers(transformer, trained, settings.lr)
    batches = DataLoader(TrainingVideos(stream, settings), batch_size=None, num_workers=1)
    for step, batch in enumerate(batches):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        generator = keyed_generator("pretraining noise", settings.seed, step)
        loss = training_loss(transformer, text, batch, stream, settings, generator)
        trained.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            decay = min(settings.ema_decay, (step + 1) / (step + 10))
            for name, value in trained.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        report(step, float(loss.detach()))
        if (step + 1) % 250 == 0 or step + 1 == settings.steps:
            save_generator(average, model, settings, out)


def save_generator(state: dict[str, Tensor], model: WanShape, settings: PretrainSettings, out: Path) -> None:
    """Write weights in half precision with the geometry and the settings in the header."""
    # One entry, because safetensors writes several in any order and a rebuilt file would have another hash.
    header = {"generator": json.dumps({"model": asdict(model), "settings": asdict(settings)})}
    with new_file(out, failures=(SafetensorError,)) as partial:
        save_file(storable({name: value.half() for name, value in state.items()}), partial, metadata=header)


def load_generator(model: WanShape, path: Path) -> tuple[CausalWan, LearnedTextEncoder]:
    """Read a pretrained embedded generator for inference.

    Raises:
        RuntimeError: the file's geometry is not ``model``'s.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    transformer, text = new_generator(model, 0)
    trained = nn.ModuleDict({"transformer": transformer, "text": text})
    weights = load_file(path)
    require_finite_weights(weights, str(path))
    trained.load_state_dict({name: value.float() for name, value in weights.items()})
    trained.requires_grad_(False)
    return transformer, text
