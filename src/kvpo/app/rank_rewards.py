"""Rewards on some of a run's ranks only: these serve them, and all ranks send their clips there."""

import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import Thread

from kvpo.app.named_rewards import named_rewards, sources_of
from kvpo.config import Config
from kvpo.extras import extra
from kvpo.rewards.service.messages import TOKEN_VARIABLE
from kvpo.serving import listener, url_of
from kvpo.training.ranks import Ranks


def with_served_rewards(config: Config, frame_rate: float, ranks: Ranks) -> Config:
    """Serve a run's rewards on its first ``rewards.ranks`` ranks; returns a configuration that uses these.

    The servers run as long as the ranks do. Rewards that name their own servers stay there. Nothing changes
    if ``rewards.ranks`` is 0 or not less than the number of ranks. Raises ValueError as `named_rewards` does.
    """
    count = config.rewards.ranks
    every = [*config.rewards.scorers, *config.evaluation.watchers]
    here = [name for name in every if "@" not in name]
    if not 0 < count < ranks.count or not here:
        return config
    doing, leaving = "loading the rewards", ranks.leaving
    given = os.environ.get(TOKEN_VARIABLE)
    token: str = ranks.gather(given or secrets.token_urlsafe(), doing)[0]
    os.environ[TOKEN_VARIABLE] = token
    if given is None:
        leaving.callback(os.environ.pop, TOKEN_VARIABLE, None)
    machines = ranks.gather(socket.gethostname(), doing)
    with ranks.together(doing):
        url = ""
        if ranks.rank < count:
            host = "127.0.0.1" if len(set(machines)) == 1 else machines[ranks.rank]
            url = _serve(config, here, host, token, frame_rate, leaving)
    urls = ",".join(ranks.gather(url, doing)[:count])

    def there(names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{name}@{urls}" if name in here else name for name in names)

    served = sources_of(here, config.rewards.sources)
    sources = {part: at for part, at in config.rewards.sources.items() if part not in served}
    rewards = replace(config.rewards, scorers=there(config.rewards.scorers), sources=sources)
    evaluation = replace(config.evaluation, watchers=there(config.evaluation.watchers))
    return replace(config, rewards=rewards, evaluation=evaluation)


def _serve(
    config: Config, names: Sequence[str], host: str, token: str, frame_rate: float, leaving: ExitStack
) -> str:
    """Load rewards, serve them in a thread until ``leaving`` is closed, and return their address."""
    from kvpo.app.reward_server import offers_of
    from kvpo.rewards.service.server import reward_app

    with extra("server"):
        import uvicorn
    rewards = named_rewards(
        names,
        sources_of(names, config.rewards.sources),
        field="rewards.scorers",
        prompts=True,
        frame_rate=frame_rate,
        device=config.device,
    )
    app = reward_app(
        [reward.scorer for reward in rewards], offers_of(rewards), frame_rate=frame_rate, token=token
    )
    listening = leaving.enter_context(listener(host, 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = Thread(target=server.run, kwargs={"sockets": [listening]}, name="kvpo rewards", daemon=True)
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join()

    leaving.callback(stop)
    return url_of(host, listening.getsockname()[1])
