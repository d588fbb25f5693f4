"""Held-out evaluation: fixed prompts on fixed tapes, so that two policies can be compared video by video."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat

import torch
from torch import Tensor

from kvpo.engine.generator import pixels_of
from kvpo.engine.noise import Tape
from kvpo.engine.scoring import score_clips, segment_clips
from kvpo.prompts import VideoPrompt
from kvpo.rewards.pixel_statistics import looks
from kvpo.rewards.protocol import Scorer
from kvpo.rewards.reward import Reward
from kvpo.training.backbone import Backbone
from kvpo.training.kept_results import NOTHING_KEPT, KeptResults
from kvpo.training.ranks import ALONE, Ranks

ROWS = 32
"""Default limit on videos generated together."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of one policy on a set of prompts."""

    components_KN: Tensor
    """Scores per component and prompt: the frame-weighted mean over segments."""
    unseen_N: Tensor | None
    """The unseen scorer's scores; None without one."""
    watchers_HN: Tensor
    """Scores of the rewards that watch for hacking; no rows without any."""
    looks_LN: Tensor
    """Pixel statistics of the videos (``kvpo.rewards.pixel_statistics``)."""
    texts_N: tuple[tuple[str, ...], ...]
    """Segments of every prompt."""
    mismatched_KN: Tensor | None = None
    """Component scores against another prompt's captions; None if not requested."""
    exam_AN: Tensor | None = None
    """Demands met, then demands made, over all segments (see ``Judges.exam``); None without an exam."""

    @classmethod
    def of(cls, prompts: Sequence[VideoPrompt], tensors: Mapping[str, Tensor]) -> "Evaluation":
        """The evaluation of these prompts that has these ``tensors``."""
        texts_N = tuple(prompt.segments for prompt in prompts)
        return cls(texts_N=texts_N, **{"unseen_N": None} | dict(tensors))  # type: ignore[arg-type]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All scores by field; fields without any are left out."""
        return {name: one for name, one in vars(self).items() if isinstance(one, Tensor)}

    def by_prompt(self) -> "Evaluation":
        """Average over each distinct prompt's videos, so that standard errors count repeated prompts once."""
        distinct = list(dict.fromkeys(self.texts_N))
        if len(distinct) == len(self.texts_N):
            return self
        place = {texts: n for n, texts in enumerate(distinct)}
        share_ND = torch.zeros(len(self.texts_N), len(distinct))
        share_ND[range(len(self.texts_N)), [place[texts] for texts in self.texts_N]] = 1.0
        share_ND /= share_ND.sum(0)
        means = {name: one @ share_ND for name, one in self.tensors.items()}
        return replace(self, texts_N=tuple(distinct), **means)


@dataclass(frozen=True)
class Judges:
    """The reward used in training, and scorers that training never sees."""

    scorer: Scorer
    weights_K: Tensor
    unseen: Scorer | None
    """The independent judge of the embedded world: never used for training, selection or stopping."""
    watchers: tuple[Reward, ...] = ()
    """Rewards that watch for hacking and may stop the run."""
    exam: Scorer | None = None
    """Counts the demands that a clip meets and, in as many further components, those that its text makes."""

    @property
    def watcher_names(self) -> tuple[str, ...]:
        """Names of the rows of ``Evaluation.watchers_HN``."""
        return tuple(name for reward in self.watchers for name in reward.numbers())

    @property
    def identity(self) -> str:
        """Differs after a change of a reward, as far as that is known (see `Reward.identity`)."""
        return ", ".join(getattr(scorer, "identity", "") for scorer in (self.scorer, *self.watchers))

    def totals(self, evaluation: Evaluation) -> Tensor:
        """Weighted reward per prompt, [N]."""
        return self.weights_K @ evaluation.components_KN


def evaluate_policy(
    backbone: Backbone,
    prompts: Sequence[VideoPrompt],
    tape: Tape,
    judges: Judges,
    *,
    rows: int = ROWS,
    ranks: Ranks = ALONE,
    mismatched: bool = False,
    first: int = 0,
    report: Callable[[int], None] = lambda videos: None,
    kept: KeptResults = NOTHING_KEPT,
) -> Evaluation:
    """Generate every prompt in the deployment context and score its segments.

    At most ``rows`` videos are generated together, in batches that do not depend on the number of ranks.
    ``mismatched`` also scores the videos against the captions of others (see `swapped_captions`). Scoring
    starts at latent frame ``first``, or after the longest given beginning of a video if that is later.
    ``report`` is told how many videos have been scored since it was last called, on all ranks if they are
    equally fast. Batches whose results are ``kept`` are not generated again; those of others are kept.
    """
    first = max([first, *(len(backbone.given.get(prompt.id, ())) for prompt in prompts)])
    others = swapped_captions(prompts) if mismatched else None
    pairs = list(zip(batches(prompts, rows), batches(others, rows) if others else repeat(None), strict=False))
    same = (backbone.weights.base_sha256, judges.identity, tape, first, backbone.given_digest)
    names = [kept.name(*same, *pair) for pair in pairs]
    known, own = kept.read(names), []
    with ranks.together("evaluating"):
        for pair, name, results in ranks.share(list(zip(pairs, names, known, strict=True))):
            if results is None:
                own.append(_evaluated(backbone, *pair, tape, judges, first))
                kept.write(name, own[-1].tensors)
            else:
                own.append(Evaluation.of(pair[0], results))
            report(len(pair[0]) * ranks.count)
    return joined(ranks.in_order(own, "evaluating"))


def swapped_captions(prompts: Sequence[VideoPrompt]) -> list[VideoPrompt] | None:
    """Every prompt with the captions of the next one that has equally many segments but different texts.

    None if a prompt has no such partner.
    """
    swapped = []
    for n, prompt in enumerate(prompts):
        following = (*prompts[n + 1 :], *prompts[:n])
        partners = (other.segments for other in following if len(other.segments) == len(prompt.segments))
        captions = next((texts for texts in partners if texts != prompt.segments), None)
        if captions is None:
            return None
        swapped.append(replace(prompt, segments=captions))
    return swapped


def batches(prompts: Sequence[VideoPrompt], rows: int) -> list[Sequence[VideoPrompt]]:
    """Split the prompts into as few batches of at most ``rows`` as possible, of nearly equal sizes."""
    count = math.ceil(len(prompts) / rows)
    ends = [len(prompts) * n // count for n in range(count + 1)]
    return [prompts[start:end] for start, end in pairwise(ends)]


def _evaluated(
    backbone: Backbone,
    prompts: Sequence[VideoPrompt],
    others: Sequence[VideoPrompt] | None,
    tape: Tape,
    judges: Judges,
    first: int,
) -> Evaluation:
    """The results of one batch, also against the captions of ``others`` if there are any."""
    codec, block = backbone.codec, backbone.generator.block
    latents = backbone.latents(prompts, tape)
    videos, frames = pixels_of(codec, latents), codec.frames_per_latent

    def scores(
        scorer: Scorer, lead: int = block, asked: Sequence[VideoPrompt] = prompts, counted: bool = False
    ) -> Tensor:
        return segment_scores(scorer, videos, asked, frames, block, lead, first=first, counted=counted)

    watchers = [_weights(reward) @ scores(reward) for reward in judges.watchers]
    return Evaluation(
        components_KN=scores(judges.scorer),
        unseen_N=judges.unseen and scores(judges.unseen, lead=0)[0],
        watchers_HN=torch.cat(watchers) if watchers else torch.empty(0, len(prompts)),
        looks_LN=looks(videos),
        texts_N=tuple(prompt.segments for prompt in prompts),
        mismatched_KN=others and scores(judges.scorer, asked=others),
        exam_AN=judges.exam and scores(judges.exam, lead=0, counted=True),
    )


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Join the results of several sets of prompts; a field that any part lacks becomes None."""
    first, *rest = (vars(part) for part in parts)
    every = {name: [value, *(own[name] for own in rest)] for name, value in first.items()}
    texts_N = tuple(texts for own in every.pop("texts_N") for texts in own)
    whole = {name: None if any(v is None for v in own) else torch.cat(own, -1) for name, own in every.items()}
    return Evaluation(texts_N=texts_N, **whole)


def _weights(reward: Reward) -> Tensor:
    """Weight of every component in each of the reward's numbers, ``[H, K]``."""
    numbers = reward.numbers().values()
    return torch.tensor([[weights.get(name, 0.0) for name in reward.components] for weights in numbers])


def segment_scores(
    scorer: Scorer,
    videos: Tensor,
    prompts: Sequence[VideoPrompt],
    frames_per_latent: int,
    block: int,
    lead: int,
    *,
    first: int = 0,
    stop: int | None = None,
    offset: int = 0,
    counted: bool = False,
) -> Tensor:
    """Frame-weighted mean over the segments that videos show in latent frames ``[first, stop)``: ``[K, N]``.

    The pixels start at latent frame ``offset``; clips include ``lead`` frames before their segment.
    ``counted`` returns the sum over the segments instead of the mean.
    """
    ends = [stop or prompt.num_frames for prompt in prompts]
    clips = [
        segment_clips(p, first, end, block=block, lead=lead) for p, end in zip(prompts, ends, strict=True)
    ]
    flat = [(n, clip) for n, own in enumerate(clips) for clip in own]
    table = score_clips(scorer, videos, flat, offset=offset, frames_per_latent=frames_per_latent)
    means = torch.zeros(len(table), len(prompts))
    for column, (n, clip) in enumerate(flat):
        share = (clip.stop - clip.start - clip.prompt.switch) / (ends[n] - first)
        means[:, n] += (1.0 if counted else share) * table[:, column]
    return means


@dataclass(frozen=True)
class PairedGain:
    """Mean difference between two policies on the same prompts and noise."""

    mean: float
    standard_error: float
    """Standard deviation of the differences (ddof 1) over the square root of their number."""
    improved: float
    """Share of prompts whose score rises."""


def paired_gain(base_N: Tensor, aligned_N: Tensor) -> PairedGain:
    """Compare two policies prompt by prompt."""
    gain = (aligned_N - base_N).double()
    error = float(gain.std(correction=1)) / math.sqrt(len(gain))
    return PairedGain(float(gain.mean()), error, float((gain > 0).double().mean()))


def paired_change(base_N: Tensor, aligned_N: Tensor) -> dict[str, float]:
    """Means of two policies, and their paired gain with its standard error."""
    gain, means = paired_gain(base_N, aligned_N), (float(base_N.mean()), float(aligned_N.mean()))
    return {"base": means[0], "aligned": means[1], "gain": gain.mean, "se": gain.standard_error}


def comparison(base: Evaluation, aligned: Evaluation, judges: Judges) -> dict[str, object]:
    """The numbers of one prompt set over distinct prompts, as summary.json and the metrics log store them."""
    base, aligned = base.by_prompt(), aligned.by_prompt()
    base_N, aligned_N = judges.totals(base), judges.totals(aligned)
    gain = paired_gain(base_N, aligned_N)
    pairs_K = zip(judges.scorer.components, base.components_KN, aligned.components_KN, strict=True)
    components = {name: paired_change(*pair) for name, *pair in pairs_K}
    numbers: dict[str, object] = {
        "prompts": len(base_N),
        "base_mean": float(base_N.mean()),
        "aligned_mean": float(aligned_N.mean()),
        "paired_gain": gain.mean,
        "paired_se": gain.standard_error,
        "improved_fraction": gain.improved,
    }
    if base.unseen_N is not None and aligned.unseen_N is not None:
        unseen = paired_gain(base.unseen_N, aligned.unseen_N)
        numbers |= {
            "unseen_scorer_base": float(base.unseen_N.mean()),
            "unseen_scorer_gain": unseen.mean,
            "unseen_scorer_se": unseen.standard_error,
        }
    if base.mismatched_KN is not None and aligned.mismatched_KN is not None:
        weights_K = judges.weights_K
        wrong = paired_gain(weights_K @ base.mismatched_KN, weights_K @ aligned.mismatched_KN)
        numbers |= {"wrong_caption_gain": wrong.mean, "wrong_caption_se": wrong.standard_error}
    if base.exam_AN is not None and aligned.exam_AN is not None:
        assert judges.exam is not None
        numbers["accuracy"] = accuracies(judges.exam.components, base.exam_AN, aligned.exam_AN)
    return numbers | {"components": components}


def accuracies(components: Sequence[str], base_AN: Tensor, aligned_AN: Tensor) -> dict[str, dict[str, float]]:
    """Share of demands met, base and aligned, and number of demands ``n``, by kind of demand."""
    (base_met, n), (aligned_met, _) = (counts.sum(1).chunk(2) for counts in (base_AN, aligned_AN))
    return {
        name: {"base": float(base_met[k] / n[k]), "aligned": float(aligned_met[k] / n[k]), "n": int(n[k])}
        for k, name in enumerate(components[: len(n)])
        if n[k] > 0
    }


def mean_gain(comparisons: Mapping[str, Mapping[str, object]]) -> float:
    """Paired gain averaged over prompt sets, by which the best checkpoint is chosen."""
    return sum(float(numbers["paired_gain"]) for numbers in comparisons.values()) / len(comparisons)  # type: ignore[arg-type]
