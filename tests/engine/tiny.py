"""A generator of random weights, prompts and noise: small enough for exactness tests in double precision."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache

import torch
from torch import Tensor

from kvpo.config import ExplorationConfig
from kvpo.engine.explorers import Member, RoutedFrame
from kvpo.engine.forks import Fork
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.noise import keyed_generator
from kvpo.engine.pages import PlannedRollout, cache_pages
from kvpo.engine.replay import ReplayRow, member_row, replay_context, replay_velocities
from kvpo.engine.rollout import Group, Ran, Rollout, roll_out
from kvpo.engine.stream import Stream, advance, open_stream
from kvpo.method.evidence import residual_table
from kvpo.method.flow import STEPS
from kvpo.models.cache import PageShape
from kvpo.models.causal_wan import CausalWan, WanShape
from kvpo.prompts import VideoPrompt
from tests.models.tiny import tiny_model
from tests.published_bank import deployment as deployment_of

SHAPE = WanShape(
    dim=32, num_heads=2, num_layers=2, ffn_dim=48, freq_dim=16, text_len=4, text_dim=6, channels=3,
    patch_size=(1, 2, 2), latent_height=4, latent_width=4,
)  # fmt: skip
FRAME = (SHAPE.channels, SHAPE.latent_height, SHAPE.latent_width)
SEGMENTS = ("a red square", "a blue disc", "nothing", "a green ring")
EXPLORATION = ExplorationConfig(
    branches=3, blocks=2, recent=3, routed=3, distinct=2, resident_frames=21, tail_blocks=1
)


def sensitive_model(dtype: torch.dtype = torch.float64, relative_positions: bool = False) -> CausalWan:
    """Random weights with attention sharp and strong enough for history to show."""
    model = tiny_model(replace(SHAPE, relative_positions=relative_positions))
    with torch.no_grad():
        for block in model.blocks:
            for norm in (block.self_attn.norm_q, block.self_attn.norm_k, block.norm3):
                norm.weight += 1.2
            block.self_attn.o.weight *= 4
    return model.to(dtype)


def generator(
    dtype: torch.dtype = torch.float64,
    *,
    window: int = 12,
    sink: int = 3,
    renoise: bool = False,
    context_noise: float = 0.0,
    relative_positions: bool = False,
    **deployment,
) -> StreamingGenerator:
    """A streaming generator around fresh weights, always the same."""
    return StreamingGenerator(
        transformer=sensitive_model(dtype, relative_positions),
        deployment=deployment_of(block=3, window=window, sink=sink, **deployment),
        sigmas=(1.0, 0.9375, 0.625),
        step=STEPS["renoise" if renoise else "ode"],
        latent_shape=FRAME,
        pages=PageShape(SHAPE.num_layers, SHAPE.tokens_per_frame, SHAPE.num_heads, SHAPE.head_dim),
        context_noise=context_noise,
        page_dtype=dtype,
    )


def prompt(id: int = 0, num_frames: int = 30, switches: tuple[int, ...] = ()) -> VideoPrompt:
    return VideoPrompt(id, SEGMENTS[: len(switches) + 1], switches, num_frames)


@cache
def texts(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Embeddings that differ strongly between segments."""
    table = {}
    for segment in SEGMENTS:
        draws = keyed_generator("words", segment)
        embedding = 2 * torch.randn(SHAPE.text_len, SHAPE.text_dim, generator=draws)
        embedding[-1] = 0
        table[segment] = embedding.to(dtype)
    return table


def tape_of(dtype: torch.dtype = torch.float64):
    """Seeded noise in the precision of the model."""

    def tape(video: int, block: int, kind: str) -> Tensor:
        return torch.randn(3, *FRAME, generator=keyed_generator(video, block, kind)).to(dtype)

    return tape


def grown(
    generator: StreamingGenerator, num_frames: int, *, prompts: list[VideoPrompt], pages: int = 400
) -> list[Stream]:
    """Streams of ``num_frames`` frames that keep all of their pages."""
    dtype = generator.page_dtype
    cache = generator.new_cache(pages)
    streams = [open_stream(generator, cache, one, texts(dtype), tape_of(dtype)) for one in prompts]
    for _ in range(num_frames // 3):
        advance(generator, streams)
    return streams


def route(*frames: int, group: int = 0) -> tuple[RoutedFrame, ...]:
    """Routed slots of one block."""
    return tuple(RoutedFrame(group, frame) for frame in frames)


def rolled_out(
    one: StreamingGenerator,
    prompts: Sequence[VideoPrompt],
    forks: Sequence[Fork],
    key: tuple[int | str, ...] = ("k",),
    *,
    keep_pool: bool = False,
    **options,
) -> Rollout:
    """A rollout with the texts and the noise of these tests."""
    dtype, planned = one.page_dtype, PlannedRollout(prompts, forks, keep_pool=keep_pool)
    return roll_out(one, planned, texts(dtype), tape_of(dtype), key, **options)


def grown_roots(
    one: StreamingGenerator, prompts: Sequence[VideoPrompt], fork: int, exploration: ExplorationConfig
) -> Rollout:
    """All roots of a rollout, in a cache that holds every member at once."""
    forks = [Fork(fork, exploration)] * len(prompts)
    every = [Fork(fork, replace(exploration, rows=0))] * len(prompts)
    cache = one.new_cache(cache_pages(one, [PlannedRollout(prompts, every, keep_pool=True)]))
    dtype = one.page_dtype
    rollout = Rollout(
        one, PlannedRollout(prompts, forks, keep_pool=True), texts(dtype), tape_of(dtype), cache
    )
    rollout.grow_roots(range(len(prompts)))
    return rollout


def visited(rollout: Rollout, members: Sequence[Member], **options: int) -> Ran:
    """The trajectories of members, with a leading axis over them."""
    ran = list(rollout.run(members, **options))
    return Ran(*(torch.stack([vars(own)[field.name] for own in ran]) for field in fields(Ran)))


def routed_row(group: Group, branch: int) -> ReplayRow:
    """A branch under the history that it was routed."""
    return replace(member_row(group, branch), routes=group.routed_pages(branch), recent=group.recent)


def replayed(
    one: StreamingGenerator, members: Sequence[tuple[Group, int]], row: Callable[..., ReplayRow] = member_row
) -> Tensor:
    """Velocities ``[R, P, S, F, C, H, W]`` under the generator as it is, at all states of groups' members."""
    rows = [row(group, index) for group, index in members]
    with torch.no_grad(), replay_context(one, rows) as replay:
        return replay_velocities(one, rows, replay, range(len(rows[0].states_PSFCHW)))


def residuals(one: StreamingGenerator, members: Sequence[tuple[Group, int]]) -> Tensor:
    """Squared residuals ``[R, P, S]`` between members' own velocities and a replay."""
    own = torch.stack([group.trajectories.velocities_MPSFCHW[index] for group, index in members])
    return residual_table(torch.ones(own.shape[:3], dtype=own.dtype), own, replayed(one, members))


def members_of(rollout: Rollout) -> list[tuple[Group, int]]:
    """Every group with the index of each of its members, the anchor's last."""
    return [(group, n) for group in rollout.groups for n in range(group.branches + 1)]
