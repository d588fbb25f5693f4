"""The public KVPO trainer of a given checkout, at small sizes, in float32 on the CPU.

No public code is copied: its modules are imported and some of their names replaced:

* ``torch`` where they create caches and noise, because sizes for 1.3B are hard-coded, noise has to be the
  same as on our side, and the code reads the random state of a GPU that does not exist;
* attention functions, which need FlashAttention or compute in bfloat16, by torch's own in float32;
* loading of the transformer, text encoder and VAE, and the rewards, by given weights, one given embedding,
  empty pixels and fixed scores, so that neither side decodes or scores anything;
* third-party packages that are not installed and have no effect here.
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

import diffusers  # noqa: F401  (it must see which packages are installed before stand-ins exist)
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
"""Packages that the public modules import but nothing here calls."""
KINDS = ("renoise 1", "renoise 2", "renoise 3", "context")
"""Kinds of noise that a block draws after its initial noise, in order."""
LATENTS, HEADS, TEXT = (16, 60, 104), (12, 128), 512
"""Sizes hard-coded in the public code: a latent frame, heads and their width, a text."""
CHUNKS = (0, 21, 39)
"""First frames of the chunks that the public pipeline generates for a 57-frame video."""
PROMPT = "prompt 0"


class Absent(MetaPathFinder, Loader):
    """Imports empty modules in place of packages that are not installed."""

    def __init__(self) -> None:
        self.names = [name for name in ABSENT if find_spec(name) is None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The specification of an empty module, for packages that are not installed and their submodules."""
        absent = name.split(".")[0] in self.names
        return ModuleSpec(name, self, is_package=True) if absent else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module any attribute that is accessed."""
        module.__getattr__ = lambda name: _ordinary(name)  # type: ignore[method-assign]


def _ordinary(name: str) -> type[SimpleNamespace]:
    if name.startswith("__"):
        raise AttributeError(name)
    return SimpleNamespace


class Sized:
    """torch for the public modules: 1.3B sizes become those of a shape, and noise comes from a tape."""

    def __init__(self, shape: WanShape, tape: Tape, block: int) -> None:
        self.shape, self.tape, self.block = shape, tape, block
        self.cuda = SimpleNamespace(
            is_available=lambda: False,
            empty_cache=lambda: None,
            get_rng_state=lambda device: None,
            set_rng_state=lambda state, device: None,
        )
        self.chunks: Iterator[int] = iter(())
        """First frames of the chunks whose initial noise is still to be drawn."""
        self.first = self.drawn = 0
        """First block of the current chunk, and the number of draws since."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, size: Any, **options: Any) -> Tensor:
        """Zeros; a cache of keys, values or text gets the sizes of the shape."""
        if isinstance(size, list | tuple) and tuple(size[-2:]) == HEADS:
            length = self.shape.text_len if size[1] == TEXT else size[1]
            size = (size[0], length, self.shape.num_heads, self.shape.head_dim)
        return torch.zeros(size, **options)

    def randn(self, size: Any, **_: Any) -> Tensor:
        """Noise from the tape: of a whole chunk, or for the next solver step or clean pass of a block."""
        if tuple(size[-3:]) == LATENTS:
            first, blocks = next(self.chunks) // self.block, size[1] // self.block
            return torch.cat([self.tape(0, first + n, "initial") for n in range(blocks)])[None]
        block, kind = divmod(self.drawn, len(KINDS))
        self.drawn += 1
        return self.tape(0, self.first + block, KINDS[kind])

    def begin(self, frame: int) -> None:
        """Note that a chunk starts at this frame."""
        self.first, self.drawn = frame // self.block, 0


def _attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Softmax attention; all tensors are ``[B, L, N, D]``."""
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class _Text(nn.Module):
    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, text_prompts: list[str]) -> dict[str, Tensor]:
        return {"prompt_embeds": self.embedding[None]}


class _Pixels(nn.Module):
    """A VAE that decodes every frame to a single pixel."""

    model = SimpleNamespace(clear_cache=lambda: None)

    def decode_to_pixel(self, latents: Tensor) -> Tensor:
        return torch.zeros(1, 4 * latents.shape[1] - 3, 3, 1, 1)


def _scores(videos: Tensor, *_: Any) -> tuple[list[float], dict[str, Any]]:
    """Fixed scores: earlier members of a group are better, and the anchor is the worst."""
    return [float(-n) for n in range(len(videos))], {}


def require_checkout(path: Path) -> None:
    """Raise ValueError naming the first missing file unless ``path`` holds the public trainer."""
    for name in (CONFIG, *(f"{module.replace('.', '/')}.py" for module in MODULES.values())):
        if not (path / name).is_file():
            raise ValueError(
                f"--public {path}: has no {name}; give the path of a checkout of the public KVPO trainer"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Discard standard output."""
    with redirect_stdout(io.StringIO()):
        yield


def modules_of(path: Path) -> dict[str, ModuleType]:
    """The checkout's modules by name. Raises ValueError for a wrong checkout or a failed import."""
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
    """The trainer of a checkout with given weights."""

    def __init__(
        self, modules: Mapping[str, ModuleType], settings: Mapping[str, Any], shape: WanShape, tape: Tape,
        text: Tensor, weights: Mapping[str, Tensor], *, local_block: int,
    ) -> None:  # fmt: skip
        """Branches fork at block ``local_block`` of the second chunk."""
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
        # The trainer sets bfloat16, which is slow on a CPU and too coarse for the comparison.
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
        """Fit a pipeline to the shape's sizes, and have it report when a chunk begins."""
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
        """The result of the trainer's rollout."""
        # The tail's noise is drawn once for the branches and once for the anchor.
        self.sized.chunks = iter((*CHUNKS, CHUNKS[-1]))
        with quiet():
            return self.trainer.rollout([PROMPT])

    def scores(
        self, found: Mapping[str, Any], trajectories: Any, *, steps: int, gradients: bool, checkpointing: bool
    ) -> Tensor:
        """Log-scores ``[K]`` of trajectories; with ``gradients``, also backward through ``steps`` steps."""
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
        """A rollout and its update, as shipped."""
        found = self.rollout()
        with quiet():
            self.trainer.train_step(found)

    def cache_bytes(self, found: Mapping[str, Any]) -> int:
        """Bytes of keys and values used by its branches: the pipeline's cache and saved copies."""
        saved = [self.trainer.pipeline._saved_state, found["kv_state_before_fork"]]
        caches = [self.trainer.pipeline.kv_cache1, *(one["kv_cache1"] for one in saved)]
        return distinct_bytes([layer[half] for cache in caches for layer in cache for half in "kv"])


def distinct_bytes(tensors: list[Tensor]) -> int:
    """Bytes of tensors, counting shared memory once."""
    return sum({one.data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


def _built(
    model: Callable[..., nn.Module], shape: WanShape, weights: Mapping[str, Tensor], _: str, **options: Any
) -> nn.Module:
    """The public transformer in the given shape, with given weights."""
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
