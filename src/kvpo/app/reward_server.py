"""``kvpo reward-server``: loads rewards by name and serves them to runs elsewhere."""

import logging
import time
from collections.abc import Mapping, Sequence

from kvpo.app.named_rewards import named_rewards
from kvpo.config_checks import ConfigurationError
from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Declaration
from kvpo.rewards.reward import Reward
from kvpo.rewards.service.messages import TOKEN_VARIABLE, Offers
from kvpo.rewards.service.server import RequestLimits, reward_app
from kvpo.serving import answering_later, check_address, listener, run_app, url_of

logger = logging.getLogger(__name__)


def offers_of(rewards: Sequence[Reward]) -> Offers:
    """Rewards offered to clients: catalogue rewards one by one, others with all their components.

    Raises ConfigurationError for two components with one name.
    """
    offers: dict[str, tuple[Declaration, ...]] = {}
    for reward in rewards:
        if reward.name in reward.components:
            offers |= {declaration.name: (declaration,) for declaration in reward.declarations}
        else:
            offers[reward.name] = reward.declarations
    names = [one.name for reward in rewards for one in reward.declarations]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigurationError(f"--reward: two rewards have a component called {twice[0]!r}")
    return offers


def check_rewards(
    names: Sequence[str],
    *,
    frame_rate: float,
    sources: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> str:
    """Load rewards and score one embedded-world clip; returns a line with score and time per component.

    Raises ValueError if a reward cannot be loaded, or does not return one finite number.
    """
    rewards = named_rewards(names, sources, frame_rate=frame_rate, device=device, prompts=True)
    offers_of(rewards)
    from kvpo.app.calibrate import demo_samples

    lines = []
    for reward in rewards:
        sample = demo_samples(reward, seed=0)[0]
        began = time.monotonic()
        scores = reward(sample.video_TCHW[None], [ClipPrompt(sample.prompt)])
        seconds = time.monotonic() - began
        lines += [f"{name}  {float(value):.4f}  {seconds:.2f} s" for name, value in scores.items()]
    return "\n".join(lines)


def serve_rewards(
    names: Sequence[str],
    *,
    host: str,
    port: int,
    token: str | None,
    frame_rate: float,
    limits: RequestLimits,
    sources: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> None:
    """Serve rewards until SIGTERM or Ctrl-C; clients that connect while they load are told to wait.

    Raises:
        ConfigurationError: invalid reward names, or an address that is taken or needs a token.
        ValueError: a part of a reward cannot be found.
    """
    check_address(host, token, TOKEN_VARIABLE)
    with listener(host, port) as listening:
        with answering_later(listening, f"loading {', '.join(names)}"):
            rewards = named_rewards(names, sources, frame_rate=frame_rate, device=device, prompts=True)
        app = reward_app(
            [reward.scorer for reward in rewards],
            offers_of(rewards),
            frame_rate=frame_rate,
            token=token,
            limits=limits,
        )
        logger.info("serving %s at %s", ", ".join(names), url_of(host, listening.getsockname()[1]))
        run_app(app, listening)
