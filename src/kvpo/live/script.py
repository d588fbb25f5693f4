"""The plain data that determines a session: seed, prompts with their switches, routed frames."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvpo.prompts import VideoPrompt

OPEN_END = 2**40
"""Latent frames of a video that runs until its viewer stops it."""


@dataclass(frozen=True)
class Cue:
    """A prompt to show."""

    prompt: str
    frames: int = 0
    """Latent frames that it lasts before the queue continues; 0: until it is replaced."""
    transition_blocks: int | None = None
    """Blocks over which the switch to it blends; None: ``stream.transition_blocks``."""


@dataclass(frozen=True)
class Script:
    """Everything that determines the latents of a session, given the weights."""

    seed: int
    segments: tuple[str, ...]
    switches: tuple[int, ...] = ()
    transitions: tuple[int | None, ...] = ()
    """Blocks over which each switch blends; None: ``stream.transition_blocks``."""
    routes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Block -> the past frames in its routed slots; a block without an entry sees its deployment context."""

    def shown(self, num_frames: int = OPEN_END) -> VideoPrompt:
        """The prompts as a request for a video of ``num_frames`` latent frames."""
        acted = sum(switch < num_frames for switch in self.switches)
        switches, transitions = self.switches[:acted], self.transitions[:acted]
        return VideoPrompt(0, self.segments[: acted + 1], switches, num_frames, transitions)

    def switched(self, frame: int, cue: Cue) -> "Script":
        """A copy with another prompt from ``frame`` on; switches at or after ``frame`` are dropped."""
        before = sum(switch < frame for switch in self.switches) if frame else 0
        if not frame:
            return replace(self, segments=(cue.prompt,), switches=(), transitions=())
        return replace(
            self,
            segments=(*self.segments[: before + 1], cue.prompt),
            switches=(*self.switches[:before], frame),
            transitions=(*self.transitions[:before], cue.transition_blocks),
        )

    def routed(self, routes: Mapping[int, tuple[int, ...]], first: int) -> "Script":
        """A copy with ``routes`` instead of its own from block ``first`` on."""
        earlier = {block: route for block, route in self.routes.items() if block < first}
        return replace(self, routes={**earlier, **routes})
