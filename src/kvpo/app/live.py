"""``kvpo live``: a page for directing a stream while it runs, base and aligned side by side."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from kvpo.app.build import checkpoint_of, load_backbone, opened_arms, source_of
from kvpo.config import Config
from kvpo.config_checks import check
from kvpo.files import make_directory
from kvpo.live.scheduler import Scheduler, SessionLimits, Side
from kvpo.live.script import Cue
from kvpo.live.server import LARGEST_MESSAGE, live_app
from kvpo.live.session import Stage
from kvpo.live.theatre import Theatre
from kvpo.models.tensor_files import fingerprint
from kvpo.prompts import VideoPrompt
from kvpo.serving import check_address, listener, run_app, url_of
from kvpo.threads import start_thread
from kvpo.training.backbone import Backbone
from kvpo.training.device import GB, computing

logger = logging.getLogger(__name__)

LIVE_TOKEN_VARIABLE = "KVPO_LIVE_TOKEN"
RESIDENT = 33
"""History frames that stay resident if a configuration keeps all of them: a live stream has no end."""


def serve_live(
    config: Config,
    out: Path,
    *,
    host: str,
    port: int,
    token: str | None,
    run: Path | None = None,
    checkpoint: str | int | Path | None = None,
    weights: str = "average",
    limits: SessionLimits,
) -> None:
    """Serve the live page until SIGTERM or Ctrl-C.

    Args:
        out: directory of snapshots, exports and choices.
        token: token that clients must show; None: no token, for an address that only this machine can reach.
        run: a run whose aligned model streams too; None: the base alone.
        checkpoint: checkpoint of the run; None: the best.
        weights: the moving ``average`` of the trained weights, or the ``raw`` ones.

    Raises:
        ConfigurationError: an address that is taken or needs a token.
        ValueError: weights that cannot be used.
        StorageError: ``out`` cannot be made.
    """
    check(config)
    check_address(host, token, LIVE_TOKEN_VARIABLE)
    with listener(host, port) as listening:
        make_directory(out)
        with computing(config):
            theatre = theatre_of(config, out, run=run, checkpoint=checkpoint, weights=weights, limits=limits)
            scheduler = theatre.scheduler
            worker = start_thread(scheduler.run, "kvpo live scheduler")
            key = f"/#token={token}" if token else "/"
            size = scheduler.cache.num_pages * scheduler.cache.page_bytes / GB
            logger.info("%d pages of history take %.2f GB", scheduler.cache.num_pages, size)
            logger.info("live at %s%s (Ctrl-C stops)", url_of(host, listening.getsockname()[1]), key)
            try:
                app = live_app(theatre, host=host, token=token)
                run_app(app, listening, ws_max_size=LARGEST_MESSAGE)
            finally:
                scheduler.stop()
                worker.join()


def theatre_of(
    config: Config,
    out: Path,
    *,
    run: Path | None,
    checkpoint: str | int | Path | None,
    weights: str,
    limits: SessionLimits,
) -> Theatre:
    """The sessions of a server, ready for their first client; see `serve_live`."""
    source = source_of(config)
    path = checkpoint_of(run, checkpoint)
    backbone = load_backbone(config)
    sides = opened_arms(backbone, path, weights)
    generator, codec, guide = backbone.generator, backbone.codec, source.guide
    exploration = config.exploration
    if generator.deployment.window == -1:
        limits = replace(limits, frames=min(limits.frames, source.reading(config)["num_frames"]))
    else:
        exploration = replace(exploration, resident_frames=exploration.resident_frames or RESIDENT)
    digests = [backbone.weights.base_sha256, weights if path else ""]
    if path is not None:
        digests.append(fingerprint([path]))
    numbers = repr(
        (
            digests,
            astuple(generator.deployment),
            generator.sigmas,
            generator.sigmas_first,
            config.stream.step_rule,
        )
    )

    def embed(texts: Any) -> Any:
        return backbone.texts([VideoPrompt(0, (text,), (), 1) for text in texts])

    stage = Stage(generator, codec, embed, exploration, hashlib.sha256(numbers.encode()).hexdigest())
    scheduler = Scheduler(stage, sides, limits, observer=guide.shows if guide else None)
    theatre = Theatre(scheduler, out, _info(config, backbone, sides, run, told=guide is not None))
    text_limits = source.text_limits(config)
    theatre.notice = lambda prompt: "; ".join(text_limits.notices(prompt))
    if guide is not None:
        theatre.story = lambda seed: [Cue(*act) for act in guide.story(seed)]
    return theatre


def _info(
    config: Config, backbone: Backbone, sides: Mapping[str, Side], run: Path | None, *, told: bool
) -> dict[str, Any]:
    deployment = backbone.generator.deployment
    return {
        "model": config.preset if run is None else run.name,
        "arms_there": list(sides),
        "rate": backbone.codec.frames_per_second,
        "block": deployment.block,
        "frames_per_latent": backbone.codec.frames_per_latent,
        "window": deployment.window,
        "sink": deployment.sink,
        "transition_blocks": deployment.transition_blocks,
        "routed_slots": config.exploration.routed,
        "recent": config.exploration.recent,
        "story": told,
    }
