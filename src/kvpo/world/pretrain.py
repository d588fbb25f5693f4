"""Pretraining of the embedded generator: flow matching with teacher forcing on deliberately imperfect videos.

All blocks of all videos train in one pass: clean rows compute keys and values once, noisy rows attend to the
frames their block would see when deployed, or, in part of the rows, to a randomly routed history, so that
routed contexts lie on the model's own manifold.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kvpo.config import ModelConfig, StreamConfig
from kvpo.engine.noise import keyed_generator
from kvpo.method.flow import add_noise, few_step_sigmas
from kvpo.method.routing import deployment_frames
from kvpo.models.causal_wan import CausalWan, WanShape
from kvpo.models.context import TeacherContext
from kvpo.world.codec import load_codec
from kvpo.world.imperfect import training_batch
from kvpo.world.text import LearnedTextEncoder


@dataclass(frozen=True)
class PretrainSettings:
    """What one pretraining run does; the shipped base used the defaults."""

    steps: int = 4000
    videos: int = 4
    num_frames: int = 60
    noisy_copies: int = 2
    """Noisy rows per clean row."""
    lr: float = 2e-3
    warmup: int = 100
    decay_from: float = 0.6
    """Share of the steps after which the learning rate falls linearly to zero."""
    ema_decay: float = 0.998
    routed_share: float = 0.4
    """Share of the videos whose blocks see a routed history."""
    donor_share: float = 0.25
    """Share of the routed videos that are routed into another video's history."""
    context_noise: float = 0.15
    """Upper end of the noise mixed into the clean rows, so that the model forgives its own errors."""
    solver_share: float = 0.7
    """Share of the noisy rows at the solver's own noise levels; the rest cover (0, 1)."""
    seed: int = 0


class TrainingVideos(Dataset):
    """Batches of encoded training videos; item n is a pure function of (seed, n)."""

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        self.codec = load_codec()

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> tuple[Tensor, list[list[str]], list[list[int]]]:
        torch.set_num_threads(1)
        generator = keyed_generator("pretraining videos", self.settings.seed, step)
        videos, captions, switches = training_batch(generator, self.settings.videos, self.settings.num_frames)
        with torch.no_grad():
            return self.codec.encode(videos), captions, switches


def block_contexts(
    videos: int, blocks: int, stream: StreamConfig, settings: PretrainSettings, generator: torch.Generator
) -> Tensor:
    """Context frames of every block ``[videos * blocks, P]`` as flat frame indices; -1 is an empty slot."""
    past = stream.window - stream.sink - stream.block
    table = torch.full((videos, blocks, stream.sink + past), -1)
    length = blocks * stream.block
    for video in range(videos):
        routed = bool(torch.rand((), generator=generator) < settings.routed_share)
        donor = routed and bool(torch.rand((), generator=generator) < settings.donor_share)
        other = (video + 1) % videos if donor else video
        for block in range(blocks):
            start = block * stream.block
            frames = deployment_frames(start, sink=stream.sink, window=stream.window, block=stream.block)
            flat = [video * length + frame for frame in frames]
            pool_end = length if donor else start - 3
            first = 0 if donor else stream.sink
            if routed and len(frames) == stream.sink + past and pool_end - first > 0:
                distinct = int(torch.randint(1, 4, (), generator=generator))
                picks = torch.randint(first, pool_end, (distinct,), generator=generator).tolist()
                slots = [other * length + picks[n % distinct] for n in range(past - 3)]
                flat = flat[: stream.sink] + slots + flat[-3:]
            table[video, block, : len(flat)] = torch.tensor(flat, dtype=torch.int64)
    return table.flatten(0, 1)


def training_loss(
    model: CausalWan,
    text: LearnedTextEncoder,
    batch: tuple[Tensor, list[list[str]], list[list[int]]],
    stream: StreamConfig,
    settings: PretrainSettings,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared velocity error of the noisy rows of one batch."""
    latents_BTCHW, captions, switches = batch
    videos, frames = latents_BTCHW.shape[:2]
    blocks, copies = frames // stream.block, settings.noisy_copies
    clean = latents_BTCHW.unflatten(1, (blocks, stream.block)).flatten(0, 1)
    starts = torch.arange(blocks) * stream.block
    flat = [caption for video in captions for caption in video]
    embedded = text(flat)
    row, of_block = 0, []
    for video_switches in switches:
        segment = sum((starts >= switch).long() for switch in video_switches)
        of_block.append(row + (segment if torch.is_tensor(segment) else torch.zeros_like(starts)))
        row += len(video_switches) + 1
    level = torch.rand(videos, 1, generator=generator) * settings.context_noise
    level = level.expand(-1, blocks).reshape(-1)
    seen = add_noise(clean, torch.randn(clean.shape, generator=generator), level)

    noisy_rows = videos * blocks * copies
    sigmas = few_step_sigmas(stream.schedule, stream.shift).float()
    solver = sigmas[torch.randint(len(sigmas), (noisy_rows,), generator=generator)]
    u = torch.rand(noisy_rows, generator=generator)
    anywhere = stream.shift * u / (1 + (stream.shift - 1) * u)
    use_solver = torch.rand(noisy_rows, generator=generator) < settings.solver_share
    sigma = torch.where(use_solver, solver, anywhere)
    target = clean.repeat(copies, 1, 1, 1, 1)
    noise = torch.randn(target.shape, generator=generator)
    context = TeacherContext(
        start_R=starts.repeat(videos).repeat(copies + 1),
        frames_CP=block_contexts(videos, blocks, stream, settings, generator),
        block=stream.block,
    )
    velocity = model(
        torch.cat([seen, add_noise(target, noise, sigma)]),
        torch.cat([torch.zeros(len(clean)), sigma]),
        embedded,
        context,
        text_rows=torch.cat(of_block).repeat(copies + 1),
    )[len(clean) :]
    return (velocity - (noise - target)).pow(2).mean()


def learning_rate(step: int, settings: PretrainSettings) -> float:
    """Linear warm-up, constant, then linear decay to zero."""
    decay_start = settings.decay_from * settings.steps
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    return settings.lr * min(1.0, (settings.steps - step) / (settings.steps - decay_start))


def new_generator(model: ModelConfig, seed: int) -> tuple[CausalWan, LearnedTextEncoder]:
    """Freshly initialised transformer and text encoder; the output projection starts at zero."""
    with torch.random.fork_rng(devices=[]):
        # Module initialisers know only the global generator.
        torch.manual_seed(seed)
        transformer = CausalWan(WanShape(**asdict(model)))
        text = LearnedTextEncoder()
    nn.init.zeros_(transformer.head.head.weight)
    nn.init.zeros_(transformer.head.head.bias)
    return transformer, text


def pretrain(
    model: ModelConfig,
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
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    batches = DataLoader(TrainingVideos(settings), batch_size=None, num_workers=1)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        generator = keyed_generator("pretraining noise", settings.seed, step)
        loss = training_loss(transformer, text, batch, stream, settings, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(settings.ema_decay, (step + 1) / (step + 10))
            for name, value in trained.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        report(step, float(loss.detach()))
        if (step + 1) % 250 == 0 or step + 1 == settings.steps:
            save_generator(average, model, settings, out)


def save_generator(
    state: dict[str, Tensor], model: ModelConfig, settings: PretrainSettings, out: Path
) -> None:
    """Write weights in half precision with the geometry and the settings in the header."""
    header = {"model": json.dumps(asdict(model)), "settings": json.dumps(asdict(settings))}
    save_file({name: value.half().contiguous() for name, value in state.items()}, out, metadata=header)


def load_generator(model: ModelConfig, path: Path) -> tuple[CausalWan, LearnedTextEncoder]:
    """Read a pretrained embedded generator for inference.

    Raises:
        RuntimeError: the file's geometry is not ``model``'s.
    """
    transformer, text = new_generator(model, 0)
    trained = nn.ModuleDict({"transformer": transformer, "text": text})
    trained.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    trained.requires_grad_(False)
    return transformer, text
