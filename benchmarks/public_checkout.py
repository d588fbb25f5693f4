"""The public KVPO trainer of a given checkout, at small sizes, in float32 on the CPU.

Nothing of it is here: its modules are imported and some of their names replaced. These are

* ``torch``, where they create caches and noise: sizes are written into their code for 1.3B, noise has to be
  the one that our side reads, and the state of a GPU's random numbers is asked for where there is none;
* their attention functions, which want FlashAttention or compute in bfloat16: torch's own, in float32;
* loading of the transformer, text encoder and VAE, and the rewards: given weights, one given embedding, empty
  pixels and fixed scores, so that neither side decodes or scores anything;
* third-party packages that are not installed and do nothing here.
"""

import importlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers  # noqa: F401  (what it finds installed must be known before packages are stood in for)
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import yaml
from torch import Tensor, nn

from kvpo.engine.noise import Tape
from kvpo.models.settings import WanShape

CONFIG = "configs/train_kvpo_longlive.yaml"
MODULES = {
    name: f"models.longlive.{name}"
    for name in (
        "trainer.kvpo", "pipeline.streaming_training", "pipeline.diversity_sampling", "utils.wan_wrapper",
        "wan.modules.causal_model", "wan.modules.model",
    )
}  # fmt: skip
ABSENT = ("omegaconf", "torchvision", "einops", "easydict", "imageio", "decord", "cv2", "dashscope", "wandb")
"""Packages that the public modules import and that nothing here calls."""
KINDS = ("renoise 1", "renoise 2", "renoise 3", "context")
"""What a block draws after its initial noise, in this order."""
LATENTS, HEADS, TEXT = (16, 60, 104), (12, 128), 512
"""Sizes as the public code writes them: of a latent frame, of heads and their width, of a text."""
CHUNKS = (0, 21, 39)
"""First frames of the chunks that the public pipeline generates, of videos of 57 frames."""
PROMPT = "prompt 0"


class Absent(MetaPathFinder, Loader):
    """Empty modules in place of packages that are not installed."""

    def __init__(self) -> None:
        self.names = [name for name in ABSENT if find_spec(name) is None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The specification of an empty package, for those that are not installed and what they hold."""
        absent = name.split(".")[0] in self.names
        return ModuleSpec(name, self, is_package=True) if absent else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module any attribute that is asked for."""
        module.__getattr__ = lambda name: _ordinary(name)  # type: ignore[method-assign]


def _ordinary(name: str) -> type[SimpleNamespace]:
    if name.startswith("__"):
        raise AttributeError(name)
    return SimpleNamespace


class Sized:
    """torch as the public modules see it: sizes of 1.3B become those of a shape, noise comes from a tape."""

    def __init__(self, shape: WanShape, tape: Tape, block: int) -> None:
        self.shape, self.tape, self.block = shape, tape, block
        self.cuda = SimpleNamespace(
            is_available=lambda: False,
            empty_cache=lambda: None,
            get_rng_state=lambda device: None,
            set_rng_state=lambda state, device: None,
        )
        self.chunks: Iterator[int] = iter(())
        """First frames of the chunks whose initial noise will be asked for."""
        self.first = self.drawn = 0
        """The block that a chunk begins with, and how often noise was drawn since."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, size: Any, **options: Any) -> Tensor:
        """A cache of keys, values or text, or any other tensor."""
        if isinstance(size, list | tuple) and tuple(size[-2:]) == HEADS:
            length = self.shape.text_len if size[1] == TEXT else size[1]
            size = (size[0], length, self.shape.num_heads, self.shape.head_dim)
        return torch.zeros(size, **options)

    def randn(self, size: Any, **_: Any) -> Tensor:
        """The tape's noise: of a whole chunk, or what the next solver step or clean pass of a block draws."""
        if tuple(size[-3:]) == LATENTS:
            first, blocks = next(self.chunks) // self.block, size[1] // self.block
            return torch.cat([self.tape(0, first + n, "initial") for n in range(blocks)])[None]
        block, kind = divmod(self.drawn, len(KINDS))
        self.drawn += 1
        return self.tape(0, self.first + block, KINDS[kind])

    def begin(self, frame: int) -> None:
        """A chunk is generated from this frame on."""
        self.first, self.drawn = frame // self.block, 0


def _attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Softmax attention of ``[B, L, N, D]``."""
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class _Text(nn.Module):
    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": self.embedding[None]}


class _Pixels(nn.Module):
    """A VAE whose frames are single pixels."""

    model = SimpleNamespace(clear_cache=lambda: None)

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        return torch.zeros(1, 4 * latents.shape[1] - 3, 3, 1, 1)


def _scores(videos: Tensor, *_: Any) -> tuple[list[float], dict[str, Any]]:
    """The earlier of a group is better, the anchor the worst."""
    return [float(-n) for n in range(len(videos))], {}


def require_checkout(path: Path) -> None:
    """Raise ValueError, which names the first missing file, unless a path holds the public trainer."""
    for name in (CONFIG, *(f"{module.replace('.', '/')}.py" for module in MODULES.values())):
        if not (path / name).is_file():
            raise ValueError(
                f"--public {path}: has no {name}; give the path of a checkout of the public KVPO trainer"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, what is printed is thrown away."""
    with redirect_stdout(io.StringIO()):
        yield


def modules_of(path: Path) -> dict[str, ModuleType]:
    """The checkout's modules by name. Raises ValueError for a wrong checkout and one that does not import."""
    require_checkout(path)
    rewards = ModuleType("rewards.rewards")
    rewards.build_named_reward_fn = lambda name, **_: (name, _scores)  # type: ignore[attr-defined]
    sys.modules |= {"rewards": ModuleType("rewards"), "rewards.rewards": rewards}
    sys.path.insert(0, str(path))
    finder = Absent()
    sys.meta_path.append(finder)
    try:
        with quiet():
            return {name: importlib.import_module(module) for name, module in MODULES.items()}
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--public {path}: its modules do not import here: {error}") from error
    finally:
        sys.meta_path.remove(finder)


class Public:
    """The trainer of a checkout around given weights."""

    def __init__(
        self, modules: Mapping[str, ModuleType], settings: Mapping[str, Any], shape: WanShape, tape: Tape,
        text: Tensor, weights: Mapping[str, Tensor], *, local_block: int,
    ) -> None:  # fmt: skip
        """Forks are at block ``local_block`` of the second chunk."""
        sized = Sized(shape, tape, 3)
        trainer, wrapper = modules["trainer.kvpo"], modules["utils.wan_wrapper"]
        for module in (trainer, modules["pipeline.streaming_training"]):
            vars(module)["torch"] = sized
        vars(modules["wan.modules.causal_model"])["attention"] = _attention
        vars(modules["wan.modules.model"])["flash_attention"] = _attention
        vars(wrapper)["_resolve_wan_checkpoint_dir"] = str
        wrapper.CausalWanModel.from_pretrained = partial(_built, wrapper.CausalWanModel, shape, weights)
        vars(trainer).update(
            OmegaConf=SimpleNamespace(to_container=lambda one, **_: one, is_config=lambda one: False),
            DynamicSwapInstaller=SimpleNamespace(install_model=lambda *_, **__: None),
            WanTextEncoder=partial(_Text, text),
            WanVAEWrapper=_Pixels,
        )
        # The trainer sets bfloat16, which a processor computes slowly and which no comparison can use.
        wide = property(lambda self: torch.float32, lambda self, value: None)
        with quiet():
            cpu = torch.device("cpu")
            self.trainer = type("Trainer", (trainer.KVPOTrainer,), {"dtype": wide})(
                SimpleNamespace(**settings), cpu
            )
        self.sized, self.shape = sized, shape
        self.pipelines = modules["pipeline.diversity_sampling"].DiversitySamplingPipeline
        pipeline = self._fitted(self.trainer.pipeline, settings["slice_last_frames"])
        pipeline.plan_perturbation = partial(
            pipeline.plan_perturbation, forced_perturb_chunk_idx=1, forced_perturb_block_local_idx=local_block
        )

    def _fitted(self, pipeline: Any, slices: int) -> Any:
        """A pipeline of the shape's sizes that says when it begins a chunk."""
        tokens, own = self.shape.tokens_per_frame, pipeline.generate_chunk_with_cache

        def generate(*arguments: Any, current_start_frame: int, **options: Any) -> Any:
            self.sized.begin(current_start_frame)
            return own(*arguments, current_start_frame=current_start_frame, **options)

        pipeline.frame_seq_length, pipeline.num_transformer_blocks = tokens, self.shape.num_layers
        pipeline.kv_cache_size = (pipeline.local_attn_size + slices) * tokens
        pipeline.generate_chunk_with_cache = generate
        return pipeline

    def stream(self, frames: int) -> Tensor:
        """Latents ``[T, C, H, W]`` of a video; the cache holds the window, as in the public inference."""
        trainer = self.trainer
        pipeline = self._fitted(
            self.pipelines(
                denoising_step_list=trainer.denoising_step_list,
                scheduler=trainer.scheduler,
                generator=trainer.old_generator,
                num_frame_per_block=3,
                last_step_only=True,
                local_attn_size=trainer.pipeline.local_attn_size,
            ),
            0,
        )
        pipeline._initialize_kv_cache(1, torch.float32, "cpu")
        pipeline._initialize_crossattn_cache(1, torch.float32, "cpu")
        parts, text = [], trainer.text_encoder(text_prompts=[PROMPT])
        self.sized.chunks = iter(CHUNKS)
        for start, stop in zip(CHUNKS, (*CHUNKS[1:], frames), strict=True):
            noise = self.sized.randn((1, stop - start, *LATENTS))
            parts.append(pipeline.generate_chunk_sampling(noise, text, current_start_frame=start)[0])
        return torch.cat(parts)

    def rollout(self) -> dict[str, Any]:
        """What the trainer's rollout returns."""
        # The tail's noise is drawn for the branches and again for the anchor.
        self.sized.chunks = iter((*CHUNKS, CHUNKS[-1]))
        with quiet():
            return self.trainer.rollout([PROMPT])

    def scores(
        self, found: Mapping[str, Any], trajectories: Any, *, steps: int, gradients: bool, checkpointing: bool
    ) -> Tensor:
        """Log-scores ``[K]`` of trajectories, whose first ``steps`` solver steps have gradients or none."""
        trainer = self.trainer
        generator = trainer.generator if gradients else trainer.old_generator
        before, trainer.gradient_checkpointing = trainer.gradient_checkpointing, checkpointing
        options = {"grad_steps": steps if gradients else 0, "enable_grad": gradients}
        with quiet(), torch.set_grad_enabled(gradients):
            scores = trainer._compute_policy_log_scores(generator, found, trajectories, **options)
        if gradients:
            trainer.optimizer.zero_grad()
            scores.sum().backward()
        trainer.gradient_checkpointing = before
        return scores.detach()

    def step(self) -> None:
        """A rollout and the update from it, as shipped."""
        found = self.rollout()
        with quiet():
            self.trainer.train_step(found)

    def cache_bytes(self, found: Mapping[str, Any]) -> int:
        """Bytes of keys and values that its branches run with: the pipeline's cache and saved copies."""
        saved = [self.trainer.pipeline._saved_state, found["kv_state_before_fork"]]
        caches = [self.trainer.pipeline.kv_cache1, *(one["kv_cache1"] for one in saved)]
        return distinct_bytes([layer[half] for cache in caches for layer in cache for half in "kv"])


def distinct_bytes(tensors: list[Tensor]) -> int:
    """Bytes of tensors, counting those that share memory once."""
    return sum({one.data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def _built(
    model: Callable[..., nn.Module], shape: WanShape, weights: Mapping[str, Tensor], _: str, **options: Any
) -> nn.Module:
    """The public transformer of a shape with given weights."""
    geometry = {name: vars(shape)[name] for name in ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers")}
    channels = {"in_dim": shape.channels, "out_dim": shape.channels, "eps": shape.eps}
    text = {"text_len": shape.text_len, "text_dim": shape.text_dim, "patch_size": shape.patch_size}
    built = model(**geometry, **channels, **text, **options)
    built.load_state_dict(weights)
    return built


def shipped(path: Path) -> dict[str, Any]:
    """The settings of the checkout's configuration file."""
    settings: dict[str, Any] = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
    return settings
