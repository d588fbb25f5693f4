"""Video extension: streams that start from given latents instead of noise."""

from collections.abc import Sequence

from torch import Tensor

from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.stream import Stream, append_block, commit_banks, text_of
from kvpo.models.deployment import deployment_context, reachable_frames


def give_frames(
    generator: StreamingGenerator,
    streams: Sequence[Stream],
    latents_RTCHW: Tensor,
    *,
    resident: int = 0,
) -> None:
    """Start streams from given latents (video extension): encode them block by block, generate nothing.

    ``resident`` history frames are kept, counting the sink (0: all).

    Raises:
        ValueError: the number of frames is not a multiple of the block.
    """
    if latents_RTCHW.shape[1] % generator.block:
        raise ValueError(
            f"{latents_RTCHW.shape[1]} given latent frames do not fill blocks of {generator.block}"
        )
    text = text_of(streams)
    for clean in latents_RTCHW.split(generator.block, dim=1):
        commit_banks(generator, streams, text)
        context = deployment_context(generator.deployment, [stream.history for stream in streams])
        append_block(generator, streams, clean, text, context, None)
        for stream in streams:
            stream.history.keep(reachable_frames(generator.deployment, stream.history, resident))
