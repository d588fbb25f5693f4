"""Drawn videos, for tests of files and encoders."""

import math

import numpy as np

COLOURS = {"red": (237, 41, 46), "yellow": (250, 235, 64), "blue": (64, 128, 255), "white": (247, 247, 247)}
SCENES = {"meadow": ((41, 76, 107), (18, 66, 20)), "sea": ((26, 51, 77), (5, 31, 77))}


def draw(frames: int, size: int, acts: list[tuple[int, str, str, str]], seed: int) -> np.ndarray:
    """uint8 [T, size, size, 3]: from each act's start, one (colour, shape) on a scene, a little noisy."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    video = np.zeros((frames, size, size, 3), np.float32)
    for frame in range(frames):
        _, colour, shape, scene = [act for act in acts if act[0] <= frame][-1]
        upper, lower = SCENES[scene]
        picture = np.where((rows < 0.6 * size)[..., None], upper, lower).astype(np.float32)
        x, y = (0.2 * size + 1.25 * frame * size / 32) % size, size * (0.5 + 0.08 * math.sin(frame / 2))
        across = np.abs((columns - x + size / 2) % size - size / 2)
        inside = np.hypot(across, rows - y) if shape == "circle" else np.maximum(across, np.abs(rows - y))
        coverage = np.clip(0.18 * size - inside, 0, 1)[..., None]
        video[frame] = picture * (1 - coverage) + coverage * np.array(COLOURS[colour], np.float32)
    noise = random.normal(0, 1.5, video.shape).astype(np.float32)
    return np.clip(video + noise, 0, 255).astype(np.uint8)
