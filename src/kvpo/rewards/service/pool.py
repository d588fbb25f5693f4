"""Several servers of the same rewards as one scorer; they share its clips, and a failure costs a retry."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Declaration
from kvpo.rewards.service.client import RemoteScorer, connect
from kvpo.rewards.service.patience import PATIENCE, GaveUp, Patience, Trial
from kvpo.rewards.service.scoring_queue import Answer

logger = logging.getLogger(__name__)

OUTAGE = 5.0
"""Seconds that one of several servers may be unreachable before others take its clips."""
REST = 30.0
"""Seconds for which a failed server is asked only if all others have failed too."""


@dataclass(frozen=True)
class PooledScorer:
    """Servers of the same rewards, which share the clips."""

    servers: tuple[RemoteScorer, ...]
    patience: Patience
    """Retry and timeout policy for all of them together."""
    rested: dict[int, float] = field(default_factory=dict)
    """Failed server -> time from which it is asked again like any other."""

    @property
    def declarations(self) -> tuple[Declaration, ...]:
        """Declarations of the components, the same on all servers."""
        return self.servers[0].declarations

    @property
    def frame_rate(self) -> float:
        """Frames per second of the clips, the same on all servers."""
        return self.servers[0].frame_rate

    @property
    def components(self) -> tuple[str, ...]:
        return self.servers[0].components

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Answer:
        """Component -> [B], in the order of the clips. Raises ValueError as ``begin``."""
        return self.begin(video_BTCHW, prompts)()

    def begin(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Callable[[], Answer]:
        """Distribute clips over the servers; the returned function waits for component -> [B].

        Raises:
            ValueError: a server refuses the clips, or none gives scores in time; the message names it.
        """
        asked = self._in_turn()[: len(prompts)]
        ends = [len(prompts) * n // len(asked) for n in range(len(asked) + 1)]
        pieces = [slice(*span) for span in zip(ends, ends[1:], strict=False)]
        started = [
            (server, piece, self.servers[server].begin(video_BTCHW[piece], prompts[piece]))
            for server, piece in zip(asked, pieces, strict=True)
        ]

        def scores() -> Answer:
            found = [
                self._answered(server, answer, video_BTCHW[piece], prompts[piece])
                for server, piece, answer in started
            ]
            return {name: torch.cat([part[name] for part in found]) for name in self.components}

        return scores

    def _in_turn(self) -> list[int]:
        """Servers to ask: those that have not failed recently, or else the one that failed longest ago."""
        now, every = time.monotonic(), range(len(self.servers))
        awake = [server for server in every if self.rested.get(server, now) <= now]
        return awake or [min(every, key=lambda server: self.rested[server])]

    def _answered(
        self, server: int, answer: Callable[[], Answer], clips: Tensor, prompts: Sequence[ClipPrompt]
    ) -> Answer:
        """Scores from the server that was asked or, if it fails, from another one."""
        trial = Trial(self.patience, first=False)
        while True:
            try:
                found = answer()
            except GaveUp as error:
                self.rested[server] = time.monotonic() + REST
                trial.failed(error)
                if trial.over:
                    raise
                other = self._in_turn()[0]
                logger.warning("%s; %s takes its clips", error, self.servers[other].link.url)
                time.sleep(trial.wait)
                server, answer = other, self.servers[other].begin(clips, prompts)
            else:
                self.rested.pop(server, None)
                return found

    def close(self) -> None:
        """Close all connections."""
        for server in self.servers:
            server.close()


def connect_all(
    urls: Sequence[str], names: Sequence[str], *, token: str | None = None, patience: Patience = PATIENCE
) -> RemoteScorer | PooledScorer:
    """Connect to the rewards ``names`` of the servers at ``urls``.

    All servers must be up at the start; from then on one is enough. Raises ValueError as ``connect``, or if
    the servers differ.
    """
    if len(urls) == 1:
        return connect(urls[0], names, token=token, patience=patience)
    servers: list[RemoteScorer] = []
    try:
        for url in urls:
            servers.append(connect(url, names, token=token, patience=patience))
        for server in servers[1:]:
            for what in ("declarations", "frame_rate"):
                if vars(server)[what] != vars(servers[0])[what]:
                    raise ValueError(
                        f"reward servers {urls[0]} and {server.link.url} differ in the {what} of "
                        f"{', '.join(names)}; start them alike"
                    )
    except BaseException:
        for server in servers:
            server.close()
        raise
    for server in servers:
        server.link.patience = replace(patience, outage=min(OUTAGE, patience.outage), attempts=1)
    return PooledScorer(tuple(servers), patience)
