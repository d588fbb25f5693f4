"""Plain English captions for the acts of a story, and an exact parser from captions back to requests."""

import random
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import replace

from kvpo.world.vocabulary import COLOURS, SHAPES, SIZES, Act, Actor, ActorRequest, Request

SCENE_PHRASES: dict[str, tuple[str, ...]] = {
    "night": ("at night", "under a starry sky", "in the dark of night"),
    "meadow": ("in a meadow", "on the meadow", "over a grassy meadow"),
    "desert": ("in the desert", "among the dunes", "over desert dunes"),
    "sea": ("by the sea", "above the waves", "out at sea"),
    "cave": ("in a cave", "inside a rocky cave", "deep in the cave"),
}
FINITE: dict[str, tuple[str, ...]] = {
    "still": ("rests", "stays in place", "hovers without moving"),
    "left": ("drifts left", "moves to the left", "glides left"),
    "right": ("drifts right", "moves to the right", "glides right"),
    "bob": ("bobs up and down", "bounces gently", "bobs in place"),
}
PARTICIPLE: dict[str, tuple[str, ...]] = {
    "still": ("resting", "staying in place", "hovering without moving"),
    "left": ("drifting left", "moving to the left", "gliding left"),
    "right": ("drifting right", "moving to the right", "gliding right"),
    "bob": ("bobbing up and down", "bouncing gently", "bobbing in place"),
}
PRESENCE = ("is in view", "can be seen", "is here")
LEADS = ("now", "then", "next", "after a moment", "suddenly", "")
LINKS = ("while", "and", "as")
SAME_PLACE = ("in the same place", "here as before", "")
UNNAMED_PLACE = ("in the earlier place", "where we were before")
OPENERS = ("here", "")
APPEARS = ("appears", "comes into view", "shows up")
RETURNS = ("comes back", "returns", "is back again")
TURNS = ("changes course and", "changes its motion and", "stops that and")
BECOMES = ("turns", "becomes", "changes to")
RECOLOURS = ("changes colour", "takes on another colour")
LEAVES = ("leaves", "goes away", "disappears")
REVISITS = ("we are back", "the view returns", "we come back")
TOLD = {
    "leave": LEAVES,
    "revisit": (*REVISITS, *UNNAMED_PLACE),
    "recolour": (*BECOMES, *RECOLOURS),
    "return": RETURNS,
}
"""Phrases that announce an event. "The view returns" is a revisit, so revisit comes before return."""
UNNAMED = ("something", "it", "one of them")
DETERMINERS = ("a", "an", "the")


def _lexicon() -> dict[tuple[str, ...], tuple[str, str]]:
    entries: dict[str, tuple[str, str]] = {}
    fillers = (*PRESENCE, *LEADS, *LINKS, *SAME_PLACE, *UNNAMED_PLACE, *OPENERS, *APPEARS, *RETURNS, *TURNS)
    fillers = (*fillers, *REVISITS, *RECOLOURS, "where", "keeps")
    entries.update({phrase: ("filler", "") for phrase in fillers if phrase})
    entries.update({phrase: ("becomes", "") for phrase in BECOMES})
    entries.update({phrase: ("gone", "") for phrase in LEAVES})
    entries.update({phrase: ("actor", "") for phrase in (*UNNAMED, *DETERMINERS)})
    entries.update({word: ("colour", word) for word in COLOURS})
    entries.update({word: ("shape", word) for word in SHAPES})
    entries.update({word: ("size", word) for word in SIZES})
    for kind, table in (("scene", SCENE_PHRASES), ("motion", FINITE), ("motion", PARTICIPLE)):
        entries.update({phrase: (kind, value) for value, phrases in table.items() for phrase in phrases})
    return {tuple(phrase.split()): meaning for phrase, meaning in entries.items()}


_LEXICON = _lexicon()
_LONGEST = max(map(len, _LEXICON))


_WORD = re.compile(r"(?:[^\W_]|['\u2190-\u2bff\U0001f000-\U0001faff])+")
"""Letters and digits of any script, apostrophes, and symbols such as emoji."""


def words(text: str) -> list[str]:
    """Lower-case words of a text without punctuation, with letters in one form (NFKC)."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _phrases(tokens: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yield (end position, kind, value) of each phrase, longest match first; kind is "" for unknown words."""
    position = 0
    while position < len(tokens):
        for length in range(min(_LONGEST, len(tokens) - position), 0, -1):
            meaning = _LEXICON.get(tuple(tokens[position : position + length]))
            if meaning is not None:
                break
        else:
            yield position, "", tokens[position]
            return
        position += length
        yield position, *meaning


def parse(caption: str) -> Request:
    """Parse a caption back into the request it was written from.

    Raises ValueError, with the caption and the part understood, for a word outside the grammar, an attribute
    that is given twice or belongs to nobody, a second scene, or other than one or two actors.
    """
    tokens = words(caption)
    scenes: list[str] = []
    actors: list[dict[str, str]] = []
    understood = 0
    for end, kind, value in _phrases(tokens):
        problem = _take(kind, value, scenes, actors)
        if problem:
            raise ValueError(_unreadable(caption, problem, tokens[:understood], scenes, actors))
        understood = end
    if not 1 <= len(actors) <= 2:
        problem = f"it speaks of {len(actors)} actors where one or two are possible"
        raise ValueError(_unreadable(caption, problem, tokens, scenes, actors))
    return Request(scenes[0] if scenes else None, tuple(ActorRequest(**actor) for actor in actors))


def _take(kind: str, value: str, scenes: list[str], actors: list[dict[str, str]]) -> str:
    """Add one phrase to the parse so far; returns the problem with it, or ""."""
    if kind == "":
        return f"the word {value!r} is not known here"
    if kind == "scene":
        scenes.append(value)
        return f"it names a second scene, {value!r}" if len(scenes) > 1 else ""
    if kind == "actor":
        actors.append({})
    elif kind != "filler":
        if not actors:
            return f"{value or kind!r} describes nobody"
        if kind == "gone":
            actors.pop()
        elif kind == "becomes":
            actors[-1].pop("colour", None)
        elif kind in actors[-1]:
            return f"{kind} is given twice to one actor"
        else:
            actors[-1][kind] = value
    return ""


def _unreadable(
    caption: str, problem: str, read: list[str], scenes: list[str], actors: list[dict[str, str]]
) -> str:
    return (
        f"caption {caption!r} cannot be read: {problem}; read so far: {' '.join(read)!r}, scene "
        f"{scenes[0] if scenes else None}, actors {actors}. "
        "Say for example 'a small red circle drifts left at night'"
    )


def event_of(caption: str) -> str:
    """The event of TOLD that a caption announces; "" for any other event."""
    said = f" {' '.join(words(caption))} "
    return next(
        (name for name, phrases in TOLD.items() if any(f" {phrase} " in said for phrase in phrases)), ""
    )


def full_request(act: Act) -> Request:
    """Request for everything that the act shows, with nothing left open."""
    actors = tuple(ActorRequest(a.colour, a.shape, a.size, a.motion) for a in act.actors)
    return Request(act.scene, actors)


DROPPED = (0, 0, 1, 2, 5)
"""Choices for the number of attributes that captions of *return* and *leave* leave open; 5: who it is."""


def describe(act: Act, previous: Act | None, rng: random.Random, dropped: tuple[int, ...] = DROPPED) -> str:
    """Write a caption for ``act``; everything that parse(caption) names agrees with the act.

    Three quarters of the captions of most events name everything; a quarter leave one attribute open.
    Captions of *return* and *leave* are vague more often ("one of them comes back").
    """
    return phrase(_draw_request(act, rng, dropped), act, previous, rng)


def _draw_request(act: Act, rng: random.Random, dropped: tuple[int, ...]) -> Request:
    request = full_request(act)
    drops = 0 if rng.random() < 0.75 else 1
    if act.event in ("return", "leave"):
        drops = rng.choice(dropped)
    if act.event == "turn" or drops == 5:
        # A turn's caption must name its actors and motions: only the scene may be left open.
        droppable = ["scene"] if act.event == "turn" else ["scene", "motion"]
        droppable = [name for name in droppable if rng.random() < 0.6]
        request = _open(request, 0, ("colour", "shape", "size") if drops == 5 else ())
        return _open(request, 0, tuple(droppable))
    names = ["scene", "colour", "shape", "size", "motion"]
    return _open(request, rng.randrange(len(act.actors)), tuple(rng.sample(names, drops)))


def _open(request: Request, index: int, names: tuple[str, ...]) -> Request:
    """The request with some attributes of one actor, or the scene, left open."""
    scene = None if "scene" in names else request.scene
    blank = {name: None for name in names if name != "scene"}
    actors = tuple(replace(a, **blank) if i == index else a for i, a in enumerate(request.actors))
    return Request(scene, actors)


def phrase(request: Request, act: Act, previous: Act | None, rng: random.Random) -> str:
    """Put a request into words in the style of ``act.event``; parse returns the same request."""
    lead = rng.choice(LEADS if previous else OPENERS)
    place = rng.choice(SCENE_PHRASES[request.scene]) if request.scene else _no_place(act, previous, rng)
    clauses = []
    if act.event == "leave":
        assert previous is not None
        gone = next(actor for actor in previous.actors if actor.shape != act.actors[0].shape)
        vague = request.actors[0].shape is None
        name = "one of them" if vague else f"the {gone.colour} {gone.shape}"
        clauses.append(f"{name} {rng.choice(LEAVES)} and")
    for index, actor in enumerate(request.actors):
        if index:
            clauses.append(rng.choice(LINKS))
        clauses.append(_clause(actor, act, index, previous, rng))
    told = " ".join(clauses)
    if act.event == "revisit" and request.scene:
        return _tidy(f"{lead} {rng.choice(REVISITS)} {place}, where {told}")
    if place and rng.random() < 0.35:
        return _tidy(f"{lead} {place}, {told}")
    return _tidy(f"{lead}, {told} {place}" if lead in ("here", "next") else f"{lead} {told} {place}")


def _no_place(act: Act, previous: Act | None, rng: random.Random) -> str:
    if act.event == "revisit":
        return rng.choice(UNNAMED_PLACE)
    return rng.choice(SAME_PLACE) if previous and previous.scene == act.scene else ""


def _clause(request: ActorRequest, act: Act, index: int, previous: Act | None, rng: random.Random) -> str:
    """One actor's part of the sentence."""
    actor = act.actors[index]
    known = previous is not None and any(a.shape == actor.shape for a in previous.actors)
    motion = rng.choice(FINITE[request.motion]) if request.motion else ""
    doing = rng.choice(PARTICIPLE[request.motion]) if request.motion else ""
    name = noun_phrase(request, known or act.event in ("return", "revisit"), rng)
    before = next((a for a in previous.actors if a.shape == actor.shape), None) if previous else None
    if act.event == "recolour" and before is not None and before.colour != actor.colour:
        return f"{_recolour(request, before, rng)} {doing}"
    if act.event == "turn" and before is not None and before.motion != actor.motion:
        return f"{name} {rng.choice(TURNS)} {motion}"
    if act.event == "return":
        return f"{name} {rng.choice(RETURNS)} {doing}"
    if known and act.event != "revisit" and doing and rng.random() < 0.5:
        return f"{name} keeps {doing}"
    if act.event in ("show", "join") and not known and rng.random() < 0.5:
        return f"{name} {rng.choice(APPEARS)} {doing}"
    return f"{name} {motion or rng.choice(PRESENCE)}"


def _recolour(request: ActorRequest, before: Actor, rng: random.Random) -> str:
    # The old colour, when named, tells which actor is meant; the request keeps only the new one.
    old = before.colour if request.shape is None or rng.random() < 0.5 else None
    name = noun_phrase(replace(request, colour=old if request.colour else None), True, rng)
    change = f"{rng.choice(BECOMES)} {request.colour}" if request.colour else rng.choice(RECOLOURS)
    return f"{name} {change}"


def noun_phrase(request: ActorRequest, known: bool, rng: random.Random) -> str:
    """Noun phrase for an actor: 'a small red circle', 'the ring', 'something blue' or 'one of them'."""
    adjectives = [word for word in (request.size, request.colour) if word]
    if request.shape is None:
        if known and not adjectives:
            return rng.choice(("one of them", "it"))
        return " ".join(("something", " and ".join(adjectives)))
    rest = " ".join((*adjectives, request.shape))
    determiner = "the" if known else ("an" if rest.startswith("orange") else "a")
    return f"{determiner} {rest}"


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip(" ,")
    text = re.sub(r" ,", ",", re.sub(r",( ,)+", ",", text))
    return text[0].upper() + text[1:] + "."
