"""Data of a run's report beyond its metrics: before/after videos, branch groups, causality, diversity."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from kvpo.app.build import source_of
from kvpo.config import ExplorationConfig
from kvpo.engine.explorers import (
    Explorer,
    RoutedFrame,
    chosen_routes,
    fresh_noise,
    noise_branches,
    routes,
)
from kvpo.engine.forks import Fork, plan_forks
from kvpo.engine.generator import Codec, as_bytes, pixel_frame, pixels_of
from kvpo.engine.noise import Tape, keyed_generator
from kvpo.engine.rollout import Group
from kvpo.engine.scoring import Scores, decode_members, score_group
from kvpo.files import write_atomic, write_json
from kvpo.method.evidence import no_credit
from kvpo.prompts import VideoPrompt
from kvpo.report.headline import FEWEST_PROMPTS
from kvpo.training.collection import credit_of, explore
from kvpo.training.credit import collection_scale
from kvpo.training.diversity import Laboratory, Place, mean_diversity
from kvpo.training.evaluation import Evaluation
from kvpo.training.gradients import lesson_of, table_of, with_routed_teacher
from kvpo.training.ranks import ONE_TEAM, Ranks
from kvpo.training.run import Run
from kvpo.training.setup import Setup


def laboratory(setup: Setup, prompts: Sequence[VideoPrompt], tape: Tape | None = None) -> Laboratory:
    """Branch exploration outside training; ``tape`` defaults to one of its own, which the seed decides."""
    read_off = source_of(setup.config).read_off
    return Laboratory(
        generator=setup.generator,
        codec=setup.backbone.codec,
        texts=setup.backbone.texts(prompts),
        tape=tape or setup.backbone.tape("exploration"),
        judges=setup.judges,
        read_off=read_off and read_off(),
    )


def story_places(setup: Setup, count: int) -> list[Place]:
    """Forks of long validation stories: right at a prompt switch if one is eligible, else later."""
    config = setup.config
    # A fork's diversity is measured on its own history; donors would need further prompts.
    own = replace(config.exploration, donor=0)
    together: dict[Fork, list[VideoPrompt]] = {}
    for prompt in list(setup.validation["long"])[:count]:
        plan = plan_forks([prompt], own, setup.generator.deployment)
        at_switch = [fork for fork in plan.roomiest if fork in plan.at_switches]
        together.setdefault((at_switch or plan.roomiest)[-1], []).append(prompt)
    places = [Place(tuple(prompts), fork) for fork, prompts in together.items()]
    return sorted(places, key=lambda place: place.fork.frame)


def measure_diversity(setup: Setup, ranks: Ranks) -> dict[str, dict[str, float]]:
    """Compare routed branches with noise branches: at matched pixel distance, and with fresh noise.

    ``ranks`` share the places. Attributes are read off the pixels; the result is empty if the generator's
    source does not support that, or there are no stories.
    """
    if source_of(setup.config).read_off is None or "long" not in setup.validation:
        return {}
    places = story_places(setup, FEWEST_PROMPTS)
    look = laboratory(setup, [prompt for place in places for prompt in place.prompts])

    def at(place: Place) -> list[dict[str, float]]:
        with look.roots(place) as explore:
            routed, fresh = (look.measure(explore(explorer)) for explorer in (routes, fresh_noise))
            strength = look.matched_strength(explore, routed.pixel_distance, fresh.pixel_distance)
            matched = look.measure(explore(partial(noise_branches, strength=strength)))
        return [asdict(routed), asdict(fresh), {**asdict(matched), "strength": strength}]

    routed, fresh, matched = over_places(places, ranks, at)
    return {"chr": routed, "noise": fresh, "noise_matched": matched}


def branch_diversity(
    look: Laboratory, places: Sequence[Place], ranks: Ranks, *explorers: Explorer
) -> list[dict[str, float]]:
    """Diversity of every explorer's branches; see ``over_places``."""

    def at(place: Place) -> list[dict[str, float]]:
        with look.roots(place) as explore:
            return [asdict(look.measure(explore(explorer))) for explorer in explorers]

    return over_places(places, ranks, at)


def over_places(
    places: Sequence[Place], ranks: Ranks, at: Callable[[Place], list[dict[str, float]]]
) -> list[dict[str, float]]:
    """Mean of every number that ``at`` measures over the prompts of all places, which the ranks share."""
    with ranks.together("measuring diversity"):
        own = [at(place) for place in ranks.share(places)]
    measured = ranks.in_order(own, "measuring diversity")
    every = [found for found, place in zip(measured, places, strict=True) for _ in place.prompts]
    return [mean_diversity(rows) for rows in zip(*every, strict=True)]


def write_gallery(run: Run, results: dict[str, tuple[Evaluation, Evaluation]], directory: Path) -> None:
    """Write before/after videos of each test set: the most and the least improved, and two in between."""
    setup, judges = run.setup, run.setup.judges
    entries, videos = [], {}
    for name, (base, aligned) in results.items():
        prompts = setup.test[name]
        gains = judges.totals(aligned) - judges.totals(base)
        order = gains.argsort(descending=True).tolist()
        quarter = len(order) // 4
        picks = list(dict.fromkeys([order[0], order[quarter], order[len(order) // 2], order[-1]]))
        chosen = [prompts[n] for n in picks]
        backbone, tape = setup.backbone, setup.evaluation_tape()
        with run.trainer.sides.base():
            before = pixels_of(backbone.codec, backbone.latents(chosen, tape))
        with run.trainer.sides.aligned():
            after = pixels_of(backbone.codec, backbone.latents(chosen, tape))
        for place, n in enumerate(picks):
            key = f"{name}-{n}"
            videos |= {f"{key}-base": as_bytes(before[place]), f"{key}-aligned": as_bytes(after[place])}
            entries.append(
                {
                    "title": f"{name} {n}",
                    "prompt_segments": list(prompts[n].segments),
                    "switches": list(prompts[n].switches),
                    "num_frames": prompts[n].num_frames,
                    "base": f"{key}-base",
                    "aligned": f"{key}-aligned",
                    "base_reward": float(judges.totals(base)[n]),
                    "aligned_reward": float(judges.totals(aligned)[n]),
                    "components": {
                        component: {
                            "base": float(base.components_KN[k, n]),
                            "aligned": float(aligned.components_KN[k, n]),
                        }
                        for k, component in enumerate(judges.scorer.components)
                    },
                }
            )
    if setup.ranks.main:
        _write(directory, "gallery.json", entries, "videos.safetensors", videos)


def write_branches(run: Run, directory: Path) -> None:
    """Write branch groups of the starting policy, and groups routed to chosen acts."""
    setup = run.setup
    videos: dict[str, Tensor] = {}
    with run.trainer.sides.base():
        groups = _training_groups(run, videos)
        causality = causality_groups(setup, videos)
    entries = {"groups": groups, "causality": causality}
    if setup.ranks.main:
        _write(directory, "branches.json", entries, "branches.safetensors", videos)


def _training_groups(run: Run, videos: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Three groups of the first rollout, with energies, advantages and probabilities as in training."""
    setup, trainer, config = run.setup, run.trainer, run.setup.config
    learner, settings = replace(trainer.learner, teams=ONE_TEAM), config.method_settings
    ((rollout, scores),) = explore(setup, [0])
    scale = collection_scale(scores, setup.blend())
    donors = {group.index: group.root.prompt for group in rollout.groups}
    entries = []
    for index, (group, score) in enumerate(list(zip(rollout.groups, scores, strict=True))[:3]):
        credit = credit_of(setup, 0, index, score, scale)
        shown = credit or no_credit(group.branches)
        lesson = lesson_of(learner, group, shown, keyed_generator("evidence", config.seed, 0, index))
        table = table_of(learner, with_routed_teacher(learner, lesson))
        tables = lesson.tables(table, table, table)
        residuals, _, _ = tables.per_branch(shown.branches)
        extras: list[dict[str, float]] = [{} for _ in range(group.branches + 1)]
        for branch, residual in zip(shown.branches, residuals.tolist(), strict=True):
            extras[branch][learner.method.residual] = residual
        title = f"group {index + 1}: fork at frame {group.fork}"
        if credit is None:
            title += ", not trained on: its rewards differ by noise alone"
        else:
            for numbers, advantage in zip(extras, credit.all_advantages_G.tolist(), strict=False):
                numbers["advantage"] = advantage
            if learner.method.probabilities is not None:
                found = learner.method.probabilities(tables, credit, settings).tolist()
                for member, probability in zip((*credit.branches, group.branches), found, strict=False):
                    extras[member]["probability"] = probability
        key = f"group-{index}"
        entries.append(_group_entry(setup, group, score, title, key, extras, videos, donors))
    rollout.release()
    return entries


def causality_groups(setup: Setup, videos: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Branches routed to acts 1 and 2 of a story under the same noise and prompt, and the anchor.

    If the generator's source has stories that leave open who comes back, the first with distinguishable acts
    is used, routed in several proportions. Otherwise up to three long validation prompts are used, each
    branch routed to one act.
    """
    recall, entries = source_of(setup.config).recall, []
    own: Iterable[VideoPrompt] = setup.validation.get("long", ())
    stories = islice(recall.stories(setup.generator.block), 4) if recall else own
    for prompt in stories:
        if len(entries) == (1 if recall else 3):
            break
        if not (found := routed_to_acts(setup, prompt, thirds=recall is not None)):
            continue
        group, routes = found
        acts, looks = [], []
        if recall:
            acts = recall.actor(act_ends(group, setup.backbone.codec, setup.generator.block))
            looks = recall.actor(after_window(group, setup.backbone.codec))
        words = [word for act in acts for word in act.split()]
        if len(set(words)) < len(words):
            continue
        entry = _causality_entry(setup, group, routes, videos) | ({"acts": acts} if recall else {})
        for member, look in zip(entry["members"], [*looks[-1:], *looks[:-1]], strict=False):
            member["shows"] = look
        entries.append(entry)
    return entries


def routed_to_acts(setup: Setup, prompt: VideoPrompt, *, thirds: bool) -> tuple[Group, list[str]] | None:
    """A group that forks at its last switch, the third act or later, and the names of its routes.

    None if there is no fork at that switch, or an act has no frames to route.
    """
    if len(prompt.switches) < 2:
        return None
    deployment = setup.generator.deployment
    plan = plan_forks([prompt], setup.config.exploration, deployment)
    at_switch = [fork for fork in plan.roomiest if fork.frame == prompt.switches[-1]]
    if not at_switch:
        return None
    # Act 1 may be older than the pages that training keeps, so every frame stays here.
    own, frame = replace(at_switch[0].exploration, resident_frames=0), at_switch[0].frame
    counts = {0, own.routed // 3, own.routed - own.routed // 3, own.routed} if thirds else {0, own.routed}
    routes = act_routes(prompt, frame, own, deployment.sink, sorted(counts))
    if not routes:
        return None
    place = Place((prompt,), Fork(frame, replace(own, branches=len(routes))))
    (group,) = laboratory(setup, [prompt]).branches(place, chosen_routes([list(routes.values())]))
    return group, list(routes)


def _causality_entry(
    setup: Setup, group: Group, routes: Sequence[str], videos: dict[str, Tensor]
) -> dict[str, Any]:
    judges, rewards = setup.judges, setup.config.rewards
    score = score_group(
        group,
        setup.backbone.codec,
        judges.scorer,
        block=setup.generator.block,
        transition_blocks=rewards.transition_blocks,
    )
    number, extras = group.root.prompt.id, [dict[str, float]()] * (len(routes) + 1)
    title, key = f"routed to acts 1 and 2 of video {number}", f"causality-{number}"
    entry = _group_entry(setup, group, score, title, key, extras, videos, {}) | {"resident_frames": 0}
    for member, name in zip(entry["members"][1:], routes, strict=True):
        member["name"] = name
    return entry


def act_ends(group: Group, codec: Codec, block: int) -> Tensor:
    """The last two blocks of every act before the fork: ``[A, T, 3, H, W]``."""
    (video,) = pixels_of(codec, torch.cat(group.root.latents)[None])
    ends = [pixel_frame(switch, codec.frames_per_latent) for switch in group.root.prompt.switches]
    return torch.stack([video[end - 2 * block * codec.frames_per_latent : end] for end in ends])


def after_window(group: Group, codec: Codec) -> Tensor:
    """Pixels of every member after its window, or in it if no tail follows: ``[M, T, 3, H, W]``."""
    video = decode_members(group, codec, lead=0)
    after = video[:, group.window_frames * codec.frames_per_latent :]
    return after if after.shape[1] else video


def act_routes(
    prompt: VideoPrompt, fork: int, exploration: ExplorationConfig, sink: int, counts: Sequence[int]
) -> dict[str, tuple[RoutedFrame, ...]]:
    """Routes by name, one per count of frames from the middle of act 2; the others are from that of act 1.

    Empty if an act has no frames to route.
    """
    routed = exploration.routed
    first, second = prompt.switches[:2]
    spans = [(sink, first), (first, min(second, fork - exploration.recent))]
    if any(start >= stop for start, stop in spans):
        return {}
    routes = {}
    for count in counts:
        frames = [
            min(max(start, (start + stop) // 2 - share // 2 + n), stop - 1)
            for (start, stop), share in zip(spans, (routed - count, count), strict=True)
            for n in range(share)
        ]
        shares = [f"act {act} \u00d7{share}" for act, share in ((1, routed - count), (2, count)) if share]
        routes[" + ".join(shares)] = tuple(RoutedFrame(0, frame) for frame in frames)
    return routes


def _group_entry(
    setup: Setup,
    group: Group,
    score: Scores,
    title: str,
    key: str,
    extras: Sequence[dict[str, float]],
    videos: dict[str, Tensor],
    donors: Mapping[int, VideoPrompt],
) -> dict[str, Any]:
    """A group as the report shows it.

    ``extras`` are further numbers for each member, with the anchor last; ``donors`` are the prompts of the
    groups that routed frames may come from.
    """
    judges = setup.judges
    pixels = decode_members(group, setup.backbone.codec, lead=group.fork)
    totals = score.totals(judges.weights_K)
    members = []
    for n in [group.branches, *range(group.branches)]:
        anchor = n == group.branches
        name = "anchor" if anchor else f"branch {n + 1}"
        videos[f"{key}-{n}"] = as_bytes(pixels[n])
        routes = () if anchor else (group.routes[n] or ((),))[0]
        members.append(
            {
                "name": name,
                "video": f"{key}-{n}",
                "routed_frames": [
                    r.frame
                    if r.group == group.index
                    else {
                        "frame": r.frame,
                        "prompt": caption_at(donors[r.group], r.frame, setup.generator.block),
                    }
                    for r in routes
                ],
                "reward": float(totals[n]),
                "local": float(judges.weights_K @ score.local_KM[:, n]),
                "global": float(judges.weights_K @ score.global_KM[:, n]),
                **extras[n],
            }
        )
    # Members end with their tail, possibly before the video's end and its last switches.
    end = group.fork + group.clean_MTCHW.shape[1]
    switches = [frame for frame in group.root.prompt.switches if frame < end]
    return {
        "title": title,
        "prompt_segments": list(group.root.prompt.segments[: len(switches) + 1]),
        "switches": switches,
        "fork_frame": group.fork,
        "window_frames": group.window_frames,
        "num_frames": end,
        "members": members,
    }


def caption_at(prompt: VideoPrompt, frame: int, block: int) -> str:
    """The segment that a latent frame was generated for: switches act at block starts."""
    return prompt.segments[prompt.segment_at(frame // block * block)]


def _write(directory: Path, listing: str, entries: Any, archive: str, videos: dict[str, Tensor]) -> None:
    directory.mkdir(exist_ok=True)
    write_atomic(directory / archive, save(videos))
    write_json(directory / listing, entries)
