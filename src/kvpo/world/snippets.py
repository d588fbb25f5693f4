"""Pretraining batches: blocks of one act of a story, the past frames they see, and their captions.

A snippet is the video's first block (the sink), two older blocks that may be routed (the memory), the blocks
just before, and a run of trained blocks within one act. If the act brings something back, its memory usually
holds frames of acts that have shown it. So a routed history tells who returns, more reliably the more of its
frames agree, and the captions need not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kvpo.engine.noise import keyed_generator
from kvpo.method.routing import visible_frames
from kvpo.models.settings import Deployment
from kvpo.world.codec import load_codec
from kvpo.world.grammar import parse
from kvpo.world.imperfect import CLEAN, Faults, Showing, film, imperfect_story, training_stories
from kvpo.world.stories import RECALLS, Telling, sample_story
from kvpo.world.vocabulary import Act, Story

RECENT = 3
"""Most recent past frames that a routed row keeps."""
ROUTED = (3, 6)
"""Choices for the number of slots that a routed row fills from memory: as in deployment, or twice that."""
DISTINCT = (1, 2, 3, 6)
"""Choices for the number of different frames in those slots."""
CANDIDATES = 8
"""Maximum number of four-act stories to draw for each one in which history must tell who returns."""


@dataclass(frozen=True)
class SnippetSettings:
    """Choice of training stories and of snippets from them, and how often their history is routed."""

    videos: int = 16
    num_frames: int = 84
    telling: Telling = Telling(return_=0.6, two_actors=0.3, dropped=(0, 1, 2, 5, 5, 5))
    """More returns, and captions say less about it, than in the stories that the generator is judged on."""
    open_telling: Telling = Telling(return_=2.0, revisit=0.3, two_actors=0.3, dropped=(1, 2, 5, 5, 5, 5))
    """Telling of the stories that are searched for an act that only history tells."""
    faults: Faults = Faults(
        wrong_attribute=0.4,
        late_switch=0.05,
        ignored_switch=0.02,
        flicker=0.08,
        flicker_range=(0.05, 0.12),
        jitter=0.05,
        tiring=0.6,
    )
    """Mostly wrong attributes and movement that dies away: alignment can fix both, and neither blurs."""
    run: int = 2
    """Consecutive blocks that are trained per snippet."""
    copies: int = 4
    """Noisy copies of each trained block, each with its own history."""
    recall_weight: float = 1.5
    """Sampling weight of an act that brings something back; the other acts of its story have 1."""
    untold_weight: float = 50.0
    """Sampling weight of an act that brings back something that only history tells."""
    untold_share: float = 0.5
    """Share of the videos that have such an act, if enough candidates do."""
    opening_share: float = 0.7
    """Share of the runs that begin at the start of their act."""
    routed_share: float = 0.4
    """Share of the copies whose history is routed."""
    telling_share: float = 0.9
    """Share of the memory blocks that show what the act brings back, if an earlier act has shown it."""


@dataclass(frozen=True)
class Snippet:
    """Blocks of one video."""

    act: int
    run: range
    lead: range
    """The blocks before the run that its first block sees."""
    memory: tuple[int, ...]
    """Older blocks to route to; empty where there are none."""
    untold: bool
    """True if only the memory tells what the act's opening brings back; caption, sink and lead do not."""
    reencoded: range = range(0)
    """Blocks before the act that a stream re-encodes in one call when the act begins, if the run sees any."""

    @property
    def blocks(self) -> list[int]:
        """All blocks in order, each once."""
        return sorted({0, *self.memory, *self.lead, *self.reencoded, *self.run})


@dataclass(frozen=True)
class Batch:
    """Rows of one training step: C clean blocks, then N noisy copies of some of them."""

    clean_CFCHW: Tensor
    source_N: Tensor
    """Clean block that each noisy row is a copy of."""
    starts_R: Tensor
    """First frame of every row in its video."""
    text_R: Tensor
    """Caption that every row is encoded or generated under."""
    frames_RP: Tensor
    """Context frames in the form that ``TeacherContext`` takes."""
    captions: list[str]


def telling_acts(story: Story, number: int) -> list[int]:
    """Earlier acts that show an actor of act ``number`` or, for a revisit, its scene."""
    act = story.acts[number]
    looks = {(a.colour, a.shape, a.size) for a in act.actors}

    def tells(other: Act) -> bool:
        known = any((a.colour, a.shape, a.size) in looks for a in other.actors)
        return known or (act.event == "revisit" and other.scene == act.scene)

    return [n for n in range(number) if tells(story.acts[n])]


def only_history_tells(story: Story, shown: Story, number: int) -> bool:
    """True if the act brings back something that neither its caption nor the previous act shows."""
    act, telling = story.acts[number], telling_acts(shown, number)
    left_open = any(actor.colour is None or actor.shape is None for actor in parse(act.caption).actors)
    return act.event in RECALLS and bool(telling) and number - 1 not in telling and left_open


def shown_stories(settings: SnippetSettings, generator: torch.Generator) -> tuple[list[Story], list[Showing]]:
    """Draw the stories of a batch and their showings; in ``untold_share`` only history tells who returns.

    In half of those, only the memory tells it; in the others act 1, which the sink shows, tells it as well.
    With any other ratio, who returns could be guessed without the memory.
    """
    half = round(settings.untold_share * settings.videos / 2)
    kinds: dict[bool, list[tuple[Story, Showing]]] = {False: [], True: []}
    for _ in range(CANDIDATES * 2 * half):
        story = sample_story(generator, 4, settings.num_frames, telling=settings.open_telling)
        showing = imperfect_story(story, settings.faults, generator)
        acts = [n for n in range(4) if only_history_tells(story, showing.story, n)]
        if acts:
            kinds[all(0 not in telling_acts(showing.story, n) for n in acts)].append((story, showing))
        if all(len(kind) >= half for kind in kinds.values()):
            break
    found = [pair for kind in kinds.values() for pair in kind[:half]]
    if others := settings.videos - len(found):
        for story in training_stories(generator, others, settings.num_frames, settings.telling):
            found.append((story, imperfect_story(story, settings.faults, generator)))
    stories, showings = zip(*found, strict=True)
    return list(stories), list(showings)


def draw_snippet(
    story: Story, shown: Story, stream: Deployment, settings: SnippetSettings, generator: torch.Generator
) -> Snippet:
    """Draw an act of a story, a run of blocks in it and a memory of what the video really showed."""
    block, lead = stream.block, -(-(stream.local_past or 0) // stream.block)

    def draw(options: Sequence[int]) -> int:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def chance(share: float) -> bool:
        return bool(torch.rand((), generator=generator) < share)

    weights = [settings.recall_weight if act.event in RECALLS else 1.0 for act in story.acts]
    untold = [only_history_tells(story, shown, n) for n in range(len(story.acts))]
    weights = [settings.untold_weight if hidden else w for hidden, w in zip(untold, weights, strict=True)]
    number = int(torch.multinomial(torch.tensor(weights), 1, generator=generator))
    starts = [act.start // block for act in story.acts]
    first, end = starts[number], [*starts[1:], story.num_frames // block][number]
    start = first if chance(settings.opening_share) else draw(range(first, end - settings.run + 1))
    pool = range(1, start - lead)
    telling = telling_acts(shown, number)
    sources = {frame // block for n in telling for frame in act_frames(shown, n)} & set(pool)
    memory = tuple(
        draw(sorted(sources) if sources and chance(settings.telling_share) else pool)
        for _ in range(2 if pool else 0)
    )
    return Snippet(
        number,
        range(start, start + settings.run),
        range(max(0, start - lead), start),
        memory,
        start == first and untold[number] and 0 not in telling,
        reencoded_blocks(first, stream) if number and start - lead < first else range(0),
    )


def reencoded_blocks(first: int, stream: Deployment) -> range:
    """Blocks that see each other when a stream re-encodes recent frames for the act from block ``first``."""
    frames = stream.reencoded(first * stream.block)
    seen = frames if frames == first * stream.block else frames - stream.sink
    return range(first - seen // stream.block, first)


def act_frames(story: Story, number: int) -> range:
    """The frames of one act."""
    ends = [*(act.start for act in story.acts[1:]), story.num_frames]
    return range(story.acts[number].start, ends[number])


def told_act(story: Story, block: int, snippet: Snippet, stream: Deployment) -> int:
    """Index of the act that captions a block's keys while the snippet's act is generated.

    At a prompt switch, a stream re-encodes its recent frames under the new caption. The sink keeps its
    caption, unless the recent frames reach back to it.
    """
    frame, switch = block * stream.block, story.acts[snippet.act].start
    if (block > 0 or stream.reencoded(switch) == switch) and frame >= switch - stream.reencoded(switch):
        return snippet.act
    return sum(frame >= act.start for act in story.acts[1:])


def context_frames(
    snippet: Snippet, block: int, routed: bool, stream: Deployment, generator: torch.Generator
) -> list[int]:
    """Absolute frames that a block of a snippet sees: as deployed, or sink, route and recent frames."""
    local = stream.local_past
    start = block * stream.block
    sink, recent = visible_frames(start, range(stream.sink), local)
    if not routed:
        return [*sink, *recent]
    options = [frame for b in snippet.memory for frame in range(b * stream.block, (b + 1) * stream.block)]

    def one_of(values: Sequence[int]) -> int:
        return values[int(torch.randint(len(values), (), generator=generator))]

    distinct = torch.randperm(len(options), generator=generator)[: one_of(DISTINCT)]
    route = sorted(options[int(distinct[n % len(distinct)])] for n in range(one_of(ROUTED)))
    return [*sink, *route, *recent[-RECENT:]]


def lay_out(
    stories: Sequence[Story],
    snippets: Sequence[Snippet],
    clean_CFCHW: Tensor,
    stream: Deployment,
    settings: SnippetSettings,
    generator: torch.Generator,
) -> Batch:
    """Lay out the rows of a batch from the snippets' clean blocks, given one snippet after another."""
    block, width = stream.block, stream.sink + max(ROUTED) + RECENT
    clean: list[tuple[int, int, list[int]]] = []
    noisy: list[tuple[int, int, list[int]]] = []
    source: list[int] = []
    captions = [act.caption for story in stories for act in story.acts]
    first_caption = 0
    for story, snippet in zip(stories, snippets, strict=True):
        row = {b: len(clean) + n for n, b in enumerate(snippet.blocks)}

        def places(frames: Sequence[int], row: dict[int, int] = row) -> list[int]:
            return [row[f // block] * block + f % block for f in frames if f // block in row]

        for b in snippet.blocks:
            if b in snippet.reencoded:
                sink = [] if 0 in snippet.reencoded else range(stream.sink)
                together = (range(o * block, (o + 1) * block) for o in snippet.reencoded if o != b)
                frames = [*sink, *chain(*together)]
            else:
                frames = context_frames(snippet, b, False, stream, generator)
            clean.append((b * block, first_caption + told_act(story, b, snippet, stream), places(frames)))
        for _ in range(settings.copies):
            by_chance = bool(torch.rand((), generator=generator) < settings.routed_share)
            for b in snippet.run:
                # After its first block, the act continues as deployed: recent frames show who has returned.
                needed = snippet.untold and b == snippet.run[0]
                routed = bool(snippet.memory) and (by_chance or needed)
                frames = context_frames(snippet, b, routed, stream, generator)
                noisy.append((b * block, first_caption + snippet.act, places(frames)))
                source.append(row[b])
        first_caption += len(story.acts)
    starts, texts, contexts = zip(*chain(clean, noisy), strict=True)
    padded = [[*frames, *[-1] * (width - len(frames))] for frames in contexts]
    return Batch(
        clean_CFCHW,
        torch.tensor(source),
        torch.tensor(starts),
        torch.tensor(texts),
        torch.tensor(padded),
        captions,
    )


class TrainingSnippets(Dataset):
    """Batches of encoded snippets; item n is a pure function of (settings, seed, n, n < faulty_from).

    Videos have the settings' faults from item ``faulty_from`` on, and none before.
    """

    def __init__(
        self, stream: Deployment, settings: SnippetSettings, seed: int, faulty_from: int = 0
    ) -> None:
        self.stream, self.settings, self.seed, self.faulty_from = stream, settings, seed, faulty_from
        self.codec = load_codec()

    def __getitem__(self, step: int) -> Batch:
        torch.set_num_threads(1)
        settings, block = self.settings, self.stream.block
        if step < self.faulty_from:
            settings = replace(settings, faults=CLEAN)
        generator = keyed_generator("pretraining videos", self.seed, step)
        stories, showings = shown_stories(settings, generator)
        snippets = [
            draw_snippet(story, showing.story, self.stream, settings, generator)
            for story, showing in zip(stories, showings, strict=True)
        ]
        frames = [
            torch.tensor([b * block + n for b in snippet.blocks for n in range(block)])
            for snippet in snippets
        ]
        with torch.no_grad():
            video = film(showings, frames, generator)
            latents = self.codec.encode(video[None])[0]
        return lay_out(stories, snippets, latents.unflatten(0, (-1, block)), self.stream, settings, generator)
