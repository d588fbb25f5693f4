"""``kvpo reward-server``: rewards by name, built here and served to runs elsewhere."""

import ipaddress
import logging
import signal
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from kvpo.app.named_rewards import NamedReward, named_rewards
from kvpo.config_checks import ConfigurationError
from kvpo.extras import extra
from kvpo.files import read_text
from kvpo.rewards.declarations import DECLARATIONS
from kvpo.rewards.server import Limits, reward_app
from kvpo.rewards.wire import TOKEN_VARIABLE, Offer

with extra("server"):
    import uvicorn

logger = logging.getLogger(__name__)

STOPPING_SECONDS = 30
"""Time that running requests may still take once the server was told to stop."""


def offers_of(rewards: Sequence[NamedReward]) -> list[Offer]:
    """Rewards offered to clients: catalogue rewards one by one, others with all their components.

    Raises ConfigurationError for two components of one name.
    """
    offers: list[Offer] = []
    for reward in rewards:
        if reward.name in DECLARATIONS:
            offers += [Offer(one.name, (one,), {one.name: 1.0}) for one in reward.declarations]
        else:
            offers.append(Offer(reward.name, reward.declarations, reward.weights))
    names = [one.name for offer in offers for one in offer.declarations]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigurationError(f"--reward: two rewards have a component called {twice[0]!r}")
    return offers


def check_address(host: str, token: str | None) -> None:
    """Refuse to listen to other machines without a token. Raises ConfigurationError."""
    if token is None and not is_loopback(host):
        raise ConfigurationError(
            f"--host: {host} is open to other machines, which needs a token: set {TOKEN_VARIABLE} or "
            "give --token-file FILE"
        )


def is_loopback(host: str) -> bool:
    """True if only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_token(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """The bearer token: of a file if one is named, else of the environment's variable.

    Raises ConfigurationError for a file or a variable without one.
    """
    where, text = TOKEN_VARIABLE, environment.get(TOKEN_VARIABLE)
    if file is not None:
        try:
            where, text = f"--token-file: {file}", read_text(file)
        except ValueError as error:
            raise ConfigurationError(f"--token-file: cannot read {error}") from error
    if text is None:
        return None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(f"{where}: a token is one word of letters, digits and signs")
    return token


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigurationError(f"--host, --port: cannot listen at {host} {port}: {error}") from error


def serve(
    names: Sequence[str],
    *,
    host: str,
    port: int,
    token: str | None,
    frame_rate: float,
    limits: Limits,
    sources: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> None:
    """Serve rewards until SIGTERM or Ctrl-C; clients that come before they are loaded wait.

    Raises:
        ConfigurationError: rewards that cannot be named so, an address that is taken or needs a token.
        ValueError: a part of a reward cannot be found.
    """
    check_address(host, token)
    with _listener(host, port) as listener:
        rewards = named_rewards(names, sources, frame_rate=frame_rate, device=device, prompts=True)
        app = reward_app(
            [reward.scorer for reward in rewards],
            offers_of(rewards),
            frame_rate=frame_rate,
            token=token,
            limits=limits,
        )
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOPPING_SECONDS
        )
        shown = f"[{host}]" if ":" in host else host
        logger.info("serving %s at http://%s:%d", ", ".join(names), shown, listener.getsockname()[1])
        # uvicorn stops at a signal and then raises it again, for the handler that was there before
        former = signal.signal(signal.SIGTERM, lambda number, frame: None)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, former)
        logger.info("stopped")
