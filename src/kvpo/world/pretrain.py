"""Pretraining of the embedded generator: flow matching with teacher forcing on deliberately imperfect videos.

All blocks of a batch train in one pass. Clean rows compute keys and values once. Noisy rows attend to the
frames that their block would see when deployed or, for some rows, to a routed history, so that routed
contexts lie on the model's own manifold.

Training may be killed at any moment: ``<out>.unfinished`` is a safetensors file of everything the next step
depends on besides its number (weights, their moving average and the optimisers' state, in full precision).
All random draws are functions of (seed, step).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from os import cpu_count
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kvpo.config import StreamConfig
from kvpo.engine.noise import keyed_generator
from kvpo.files import new_file
from kvpo.method.flow import add_noise, few_step_sigmas
from kvpo.models.causal_wan import CausalWan
from kvpo.models.context import TeacherContext
from kvpo.models.finite import NonFiniteError, require_finite_weights
from kvpo.models.settings import WanShape
from kvpo.models.tensor_files import read_tensor_file, storable
from kvpo.world.muon import Muon
from kvpo.world.snippets import Batch, SnippetSettings, TrainingSnippets
from kvpo.world.text import LearnedTextEncoder

Begun = Mapping[str, Any]
"""Digest of the base that training started from, and the stream; empty without a base."""
ANEW: Begun = {}


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of a pretraining run; the defaults are those of `kvpo pretrain`."""

    snippets: SnippetSettings = field(default_factory=SnippetSettings)
    steps: int = 7000
    lr: float = 2.5e-3
    warmup: int = 100
    decay_from: float = 0.6
    """Share of the steps after which the learning rate falls linearly to zero."""
    faults_from: float = 0.65
    """Share of the steps after which videos have faults; 0 in a training that begins with a base.

    Faults are learned in a few hundred steps. Following captions takes thousands, and more if many
    videos contradict their captions.
    """
    ema_decay: float = 0.998
    context_noise: float = 0.15
    """Maximum noise level mixed into the clean rows, so that the model tolerates its own errors."""
    solver_share: float = 0.7
    """Share of the noisy rows at the solver's own noise levels; the rest cover (0, 1)."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    autocast: Literal["none", "bfloat16"] = "none"
    seed: int = 0


def training_loss(
    model: CausalWan,
    text: LearnedTextEncoder,
    batch: Batch,
    stream: StreamConfig,
    settings: PretrainSettings,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared velocity error of the noisy rows of one batch; random numbers are drawn on the CPU."""
    clean = batch.clean_CFCHW
    level = torch.rand(len(clean), generator=generator) * settings.context_noise
    seen = add_noise(clean, torch.randn(clean.shape, generator=generator), level)
    target = clean[batch.source_N]
    sigma = noise_levels(len(target), stream, settings, generator)
    noise = torch.randn(target.shape, generator=generator)
    device = next(model.parameters()).device
    context = TeacherContext(
        start_R=batch.starts_R.to(device),
        frames_RP=batch.frames_RP.to(device),
        block=stream.block,
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast == "bfloat16"):
        velocity = model(
            torch.cat([seen, add_noise(target, noise, sigma)]).to(device),
            torch.cat([torch.zeros(len(clean)), sigma]).to(device),
            text(batch.captions),
            context,
            text_rows=batch.text_R.to(device),
        )[len(clean) :]
    return (velocity.float() - (noise - target).to(device)).pow(2).mean()


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
        # Module initialisers use only the global generator.
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


@dataclass
class Training:
    """Training state: everything that a step changes."""

    trained: nn.ModuleDict
    average: dict[str, Tensor]
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer]
    step: int = 0

    @classmethod
    def begin(
        cls, model: WanShape, settings: PretrainSettings, device: str, start: Path | None = None
    ) -> "Training":
        """Start on a device, with fresh weights or those of the base ``start``."""
        if start is None:
            transformer, text = new_generator(model, settings.seed)
        else:
            transformer, text = load_generator(model, start)
            transformer.requires_grad_(True)
            text.requires_grad_(True)
        trained = nn.ModuleDict({"transformer": transformer, "text": text}).to(device)
        average = {name: value.detach().clone() for name, value in trained.state_dict().items()}
        return cls(trained, average, new_optimizers(transformer, trained, settings.lr))

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint by name."""
        found = {f"weights.{name}": value for name, value in self.trained.state_dict().items()}
        found |= {f"average.{name}": value for name, value in self.average.items()}
        for n, optimizer in enumerate(self.optimizers):
            for place, state in optimizer.state_dict()["state"].items():
                found |= {f"optimizer.{n}.{place}.{key}": value for key, value in state.items()}
        return found

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Restore what ``tensors()`` returned after ``step`` steps."""
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}}
        states: tuple[dict[int, Any], ...] = ({}, {})
        for name, value in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "optimizer":
                n, place, key = rest.split(".")
                states[int(n)].setdefault(int(place), {})[key] = value
            else:
                groups[kind][rest] = value
        self.trained.load_state_dict(groups["weights"])
        for name, value in groups["average"].items():
            self.average[name].copy_(value)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.step = step

    def advance(self, batch: Batch, stream: StreamConfig, settings: PretrainSettings) -> float:
        """Take one optimiser step and return its loss. Raises NonFiniteError."""
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(self.step, settings)
        generator = keyed_generator("pretraining noise", settings.seed, self.step)
        transformer, text = self.trained.values()
        loss = training_loss(transformer, text, batch, stream, settings, generator)
        if not loss.isfinite():
            raise NonFiniteError(
                f"step {self.step + 1} of the pretraining: the loss is {loss.item()}; what was saved before "
                "is still there"
            )
        self.trained.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            decay = min(settings.ema_decay, (self.step + 1) / (self.step + 10))
            for name, value in self.trained.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        self.step += 1
        return float(loss.detach())


def unfinished(out: Path) -> Path:
    """Path of the checkpoint of a training that writes ``out``."""
    return out.with_name(out.name + ".unfinished")


def pretrain(
    model: WanShape,
    stream: StreamConfig,
    settings: PretrainSettings,
    out: Path,
    report: Callable[[int, float], None],
    *,
    device: str = "cpu",
    resume: bool = False,
    start: Path | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> bool:
    """Train the embedded generator and write its moving average to ``out`` (safetensors, fp16).

    ``out`` and a checkpoint beside it are written every ``checkpoint_every`` steps. ``resume`` continues from
    that checkpoint; on a CPU, the result is byte-identical. The number of steps may then be changed, as long
    as neither the faults nor the decay of the learning rate has begun under either number. ``report`` is
    called with (steps done, loss) after every step. ``start`` is a base to take the initial weights from, and
    training then sees faults at once; without it, weights are drawn. Deterministic in the settings on one
    CPU. Returns True if training finished, False if ``interrupted`` ended it.

    Raises:
        ValueError: the checkpoint is damaged, has other settings or another ``start``, or exists without
            ``resume``; or ``out`` exists and is not the result that ``resume`` would give.
        NonFiniteError: a loss is not finite.
    """
    if start:
        settings = replace(settings, faults_from=0.0)
    header = _header(model, stream, settings, start)
    begun = {name: header[name] for name in ("stream", "start")} if start else {}
    checkpoint = unfinished(out)
    if out.exists() and not checkpoint.exists():
        if resume and _made_with(out, model, settings, begun):
            return True
        raise ValueError(f"{out} is there already; delete it to train it anew, or choose another --out")
    training = Training.begin(model, settings, device, start)
    if checkpoint.exists():
        if not resume:
            raise ValueError(
                f"{checkpoint} is an unfinished training: --resume goes on with it; delete it to start anew"
            )
        _restore(training, checkpoint, header)
    for batch in _batches(stream, settings, training.step):
        loss = training.advance(batch, stream, settings)
        stop = interrupted()
        if stop or training.step % settings.checkpoint_every == 0:
            record = {"training": json.dumps({**header, "step": training.step})}
            with new_file(checkpoint, failures=(SafetensorError,)) as partial:
                save_file(storable(training.tensors()), partial, metadata=record)
            save_generator(training.average, model, settings, out, begun)
        report(training.step, loss)
        if stop and training.step < settings.steps:
            return False
    save_generator(training.average, model, settings, out, begun)
    checkpoint.unlink(missing_ok=True)
    return True


def _header(
    model: WanShape, stream: StreamConfig, settings: PretrainSettings, start: Path | None
) -> dict[str, Any]:
    """Settings that must match for a training to be resumed, after a round trip through JSON."""
    begun = {"sha256": None if start is None else hashlib.sha256(start.read_bytes()).hexdigest()}
    parts = {"model": asdict(model), "stream": asdict(stream), "settings": asdict(settings), "start": begun}
    return json.loads(json.dumps(parts))


def _restore(training: Training, path: Path, expected: dict[str, Any]) -> None:
    read_tensor_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {})["training"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no unfinished training; delete it to start anew") from error
    step, settings = int(found.pop("step")), expected["settings"]
    alike = min(settings["decay_from"], settings["faults_from"] or 1.0)
    if step <= alike * min(settings["steps"], found["settings"]["steps"]):
        # Until the rate decays and the faults begin, trainings of all lengths are the same.
        found["settings"]["steps"] = settings["steps"]
    different = [
        f"{part}.{name} was {found[part].get(name)}, is {value}"
        for part, values in expected.items()
        for name, value in values.items()
        if found[part].get(name) != value
    ]
    if different:
        raise ValueError(f"{path}: {'; '.join(different)}; give what it was begun with, or delete it")
    training.restore(load_file(path), step)


def _batches(stream: StreamConfig, settings: PretrainSettings, first: int) -> Iterator[Batch]:
    """The batches of all steps from ``first`` on, made by worker processes."""
    steps = range(first, settings.steps)
    faulty_from = round(settings.faults_from * settings.steps)
    snippets = TrainingSnippets(stream.deployment, settings.snippets, settings.seed, faulty_from)
    workers = max(1, (cpu_count() or 2) - 1)
    return iter(DataLoader(snippets, sampler=steps, batch_size=None, num_workers=workers))


def _generator_header(model: WanShape, settings: PretrainSettings, begun: Begun) -> str:
    return json.dumps({"model": asdict(model), "settings": asdict(settings), **begun})


def _made_with(path: Path, model: WanShape, settings: PretrainSettings, begun: Begun) -> bool:
    """True if the file comes from a training with this geometry, these settings and this start."""
    read_tensor_file(path)
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("generator") == _generator_header(model, settings, begun)


def save_generator(
    state: dict[str, Tensor], model: WanShape, settings: PretrainSettings, out: Path, begun: Begun = ANEW
) -> None:
    """Write weights in half precision, with the geometry, the settings and ``begun`` in the header."""
    # One entry: safetensors writes several in any order, and a rebuilt file would have another hash.
    header = {"generator": _generator_header(model, settings, begun)}
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
