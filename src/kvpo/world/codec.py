"""The embedded world's latent codec: a small convolutional autoencoder, one latent frame per video frame."""

from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvpo.files import new_file
from kvpo.models.finite import require_finite_weights
from kvpo.models.tensor_files import storable
from kvpo.progress import progress_bars
from kvpo.world.imperfect import CLEAN, Faults, observe, training_stories
from kvpo.world.vocabulary import FRAME_SIZE

LATENT_CHANNELS = 8
PEAK_RATE = 3e-3
LATENT_NOISE = 0.5
"""Largest std of noise on normalised latents in training, so that the decoder tolerates generator errors."""
ENCODED = 32
"""Height and width to which frames are average-pooled before encoding."""


class PixelCodec(nn.Module):
    """Frames [3, FRAME_SIZE, FRAME_SIZE] in [0, 1] to latents [8, 8, 8] of mean 0 and std 1, and back."""

    frames_per_latent = 1
    frames_per_second = 8.0

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.AdaptiveAvgPool2d(ENCODED),
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, LATENT_CHANNELS, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 64, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.PixelShuffle(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 3 * (FRAME_SIZE // 16) ** 2, 3, padding=1),
            nn.PixelShuffle(FRAME_SIZE // 16),
        )
        self.register_buffer("mean", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("std", torch.ones(LATENT_CHANNELS))

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        """Latents [B, T, 8, 8, 8] of frames [B, T, 3, H, W] in [0, 1]."""
        raw = self.encoder(video_BTCHW.flatten(0, 1) * 2 - 1)
        latents = (raw - self.mean[:, None, None]) / self.std[:, None, None]
        return latents.unflatten(0, video_BTCHW.shape[:2])

    def decode(self, latents_BTCHW: Tensor, before_TCHW: Tensor | None = None) -> Tensor:
        """Frames [B, T, 3, H, W] of latents [B, T, 8, 8, 8]; clamped to [0, 1] unless training.

        Frames are decoded one by one, so ``before_TCHW`` has no effect. Unless training, they are returned on
        the CPU, where the world's scorers run: each looks at few pixels.
        """
        frames = self.decoder(latents_BTCHW.flatten(0, 1).to(self.std.dtype))
        video = ((frames + 1) / 2).unflatten(0, latents_BTCHW.shape[:2])
        return video if self.training else video.clamp(0, 1).cpu()

    def decode_next(self, latents_FCHW: Tensor, state: object | None) -> tuple[Tensor, object | None]:
        """Frames [F, 3, H, W] of the next latents of a video; the codec has no state."""
        return self.decode(latents_FCHW[None])[0], None

    @torch.no_grad()
    def set_statistics(self, video_BTCHW: Tensor) -> None:
        """Set the stored mean and std per latent channel from sample frames."""
        raw = self.encoder(video_BTCHW.flatten(0, 1) * 2 - 1)
        self.mean.copy_(raw.mean((0, 2, 3)))
        self.std.copy_(raw.std((0, 2, 3)))


def _sample(generator: torch.Generator, count: int, num_frames: int) -> Tensor:
    """Draw ``count`` faulty and ``count`` clean videos [2 * count, num_frames, 3, H, W]."""
    return torch.cat(
        [
            observe(training_stories(generator, count, num_frames), generator, faults)
            for faults in (Faults(), CLEAN)
        ]
    )


def _frames(generator: torch.Generator, count: int) -> Iterator[Tensor]:
    """Batches [1, count, 3, H, W] of shuffled frames, half faulty and half clean, each seen about twice."""
    while True:
        pool = _sample(generator, 24, 36).flatten(0, 1)
        for _ in range(2):
            for rows in torch.randperm(len(pool), generator=generator).split(count):
                yield pool[rows][None]


def train_codec(
    steps: int = 12000,
    seed: int = 0,
    batch: int = 16,
    encoding: PixelCodec | None = None,
    show: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> PixelCodec:
    """Train a codec on freshly drawn frames of the training split; deterministic in ``seed``.

    With ``encoding``, only the decoder is trained, on that codec's latents: existing generators stay valid.
    """
    generator = torch.Generator().manual_seed(seed)
    codec = PixelCodec()
    for layer in codec.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    if encoding is not None:
        codec.encoder.load_state_dict(encoding.encoder.state_dict())
        codec.mean.copy_(encoding.mean)
        codec.std.copy_(encoding.std)
        codec.encoder.requires_grad_(False)
    trained = [p for p in codec.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    frames = _frames(generator, batch)
    codec.train()
    for step in range(steps):
        video = next(frames)
        if encoding is None and (step in (0, steps // 10, steps // 4) or step % 500 == 0):
            codec.set_statistics(video)
        latents = codec.encode(video)
        noise = torch.randn(latents.shape, generator=generator)
        deviation_TCHW = LATENT_NOISE * torch.rand(latents.shape[1], 1, 1, 1, generator=generator)
        loss = _loss(codec.decode(latents + deviation_TCHW * noise), video)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        show("training", step + 1, steps)
    if encoding is None:
        codec.set_statistics(_sample(torch.Generator().manual_seed(seed + 1), 256, 60)[:, ::5])
    return codec.eval().requires_grad_(False)


def _loss(decoded: Tensor, video: Tensor) -> Tensor:
    # The absolute error keeps outlines crisp, the squared one keeps colours right.
    return 0.2 * F.mse_loss(decoded, video) + 0.8 * F.l1_loss(decoded, video)


def save_codec(codec: PixelCodec, path: Path) -> None:
    """Write the codec as half-precision safetensors."""
    with new_file(path, failures=(SafetensorError,)) as partial:
        save_file(storable({name: value.half() for name, value in codec.state_dict().items()}), partial)


def asset(name: str) -> Path:
    """Path of a weights file that ships with the package."""
    return Path(str(files("kvpo.world").joinpath("assets", f"{name}.safetensors")))


def load_codec(path: Path | None = None) -> PixelCodec:
    """Read a codec for inference, by default the one that ships with the package."""
    source = path or asset("codec")
    weights = load_file(source)
    require_finite_weights(weights, str(source))
    codec = PixelCodec()
    codec.load_state_dict({name: value.float() for name, value in weights.items()})
    return codec.eval().requires_grad_(False)


def main() -> None:
    """Train a new decoder for the shipped codec's latents; existing generators stay valid."""
    torch.set_num_threads(1)
    with progress_bars() as show:
        codec = train_codec(encoding=load_codec(), show=show)
    save_codec(codec, asset("codec"))


if __name__ == "__main__":
    main()
