"""Properties and needs of every reward in the catalogue, readable before anything heavy is imported."""

from math import inf

from kvpo.rewards.protocol import Declaration, Sampling

HD = 1088 * 1920
SD = 640 * 1152
FLOW_PIXELS = 256 * 448
"""Size at which motion is measured: larger frames are shrunk to it."""

VIDEOALIGN_SAMPLING = Sampling(rate=2.0, least=4, most=768, multiple=2)
"""VideoAlign's own rule (``vision_process.py``)."""
EIGHT_FRAMES = Sampling(rate=0.5, least=8, most=8)


def _videoalign(name: str) -> Declaration:
    return Declaration(name, -inf, inf, True, False, 2, HD, VIDEOALIGN_SAMPLING, eight_bit=True)


def _frames(name: str, low: float, high: float, reads_prompt: bool = True) -> Declaration:
    return Declaration(name, low, high, reads_prompt, True, 1, SD, EIGHT_FRAMES)


_ALL = (
    Declaration("hpsv3", -inf, inf, True, False, 1, HD, Sampling(rate=2.0, least=1, most=32), eight_bit=True),
    _videoalign("videoalign_vq"),
    _videoalign("videoalign_mq"),
    _videoalign("videoalign_ta"),
    _frames("hpsv2", -1.0, 1.0),
    _frames("pickscore", -100.0, 100.0),
    _frames("clip_score", -1.0, 1.0),
    _frames("aesthetic", -inf, inf, reads_prompt=False),
    _frames("image_reward", -inf, inf),
    Declaration("motion_smoothness", 0.0, 1.0, False, False, 3, FLOW_PIXELS),
    Declaration("dynamic_degree", 0.0, 1.0, False, False, 2, FLOW_PIXELS),
    Declaration(
        "subject_consistency",
        -1.0,
        1.0,
        False,
        True,
        2,
        SD,
        Sampling(rate=2.0, least=4, most=32, seconds=None),
    ),
    Declaration("flicker", 0.0, 1.0, False, True, 3, FLOW_PIXELS),
)
DECLARATIONS = {declaration.name: declaration for declaration in _ALL}
"""By reward id, in the order they are listed."""
