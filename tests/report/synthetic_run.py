"""A made-up run directory: invented numbers and drawn videos, for tests of the report only."""

import json
import math
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

HOSTILE = "A <script>document.title='owned'</script> \"quoted\" & 'single' prompt </script>"
SEGMENTS = [
    "A large red square drifts right over a dark meadow.",
    "It leaves, and a small yellow circle bobs above the sea.",
    "The red square comes back; the circle stays, and both keep moving.",
]
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


def metrics_lines(updates: int, seed: int) -> list[dict]:
    """Update and validation lines in the order in which a trainer writes them."""
    random = np.random.default_rng(seed)
    lines = []
    for update in range(1, updates + 1):
        progress = 1 - math.exp(-update / 25)
        if update == 1 or update % 10 == 0:
            line = {"kind": "validation", "update": update}
            for name, base, gain in (("short", 0.512, 0.11), ("long", 0.455, 0.08)):
                aligned = base + gain * progress + random.normal(0, 0.004)
                line[name] = {
                    "base_mean": base,
                    "aligned_mean": aligned,
                    "paired_gain": aligned - base,
                    "paired_se": 0.011,
                    "improved_fraction": 0.5 + 0.25 * progress,
                    "unseen_gain": 0.01,
                    "unseen_se": 0.008,
                    "components": {
                        "colour": {"base": 0.6, "aligned": 0.7},
                        "motion": {"base": 0.4, "aligned": 0.39},
                    },
                }
            line["radar"] = radar(update, progress, random)
            lines.append(line)
        noise = random.normal(0, 1, 12)
        lines.append(
            {
                "kind": "update",
                "update": update,
                "loss": -0.02 + 0.01 * noise[0],
                "reward_mean": 0.5 + 0.05 * progress + 0.02 * noise[1],
                "reward_spread": 0.012 + 0.002 * noise[2],
                "advantage_mean": 0.0,
                "energy_mean": 0.031 + 0.002 * noise[3],
                "energy_std": 0.004 + 0.0004 * noise[4],
                "entropy": 0.93 + 0.01 * noise[5],
                "ratio_mean": 1.0,
                "ratio_max": 1.0,
                "clip_fraction": 0.0,
                "simplex_kl": 0.002 * progress,
                "velocity_kl": 1e-5 * update,
                "gradient_norm": 0.4 + 0.1 * abs(noise[6]),
                "skipped_groups": int(noise[7] > 1),
                "branch_diversity": 0.2 + 0.01 * noise[8],
                "anchor_distance": 0.18 + 0.01 * noise[9],
                "share_above_anchor": 0.4 + 0.05 * noise[10],
                "learning_rate": 1e-4 * min(1, update / 5),
                "seconds": 3.1 + 0.1 * abs(noise[11]),
                "pages_in_use": 120 + update % 3,
            }
        )
    return lines


def change(base: float, gain: float, error: float) -> dict:
    """A paired change as the radar writes it."""
    return {"base": base, "spread": 0.04, "aligned": base + gain, "gain": gain, "se": error}


def radar(update: int, progress: float, random: np.random.Generator) -> dict:
    """A radar reading of a run that is being hacked: the held-out scorer first rises, then falls."""
    held = 0.05 * progress - 0.16 * progress**3 + random.normal(0, 0.003)
    hacked = update >= 40
    words = "trained reward +0.050 \u00b1 0.010, held-out fair judge +0.012 \u00b1 0.011: no alarm"
    if hacked:
        words = (
            "trained reward +0.090 \u00b1 0.010 while held-out fair judge -0.080 \u00b1 0.011 since update 10"
        )
    return {
        "verdict": words,
        "alarms": {"fair judge": {"since": 10}} if hacked else {},
        "in_a_row": 3 if hacked else 0,
        "hacked": hacked,
        "trained": change(0.5, 0.1 * progress, 0.008),
        "held_out": {"fair judge": change(0.6, held, 0.009), HOSTILE: change(0.7, 0.02 * progress, 0.006)},
        "unseen": change(0.4, held / 2, 0.01),
        "drift": {
            "brightness": change(0.3, 0.15 * progress, 0.004),
            "saturation": change(0.6, -0.01 * progress, 0.006),
            "sharpness": change(0.4, 0.002, 0.003),
            "motion": change(0.2, 0.004 * progress, 0.002),
        },
        "drifted": ["brightness"] if hacked else [],
        "agreement": {
            "brightness": {"colour": -0.41, "fair judge": -0.52, HOSTILE: 0.1, "unseen scorer": -0.2},
            "colour": {"fair judge": 0.71, HOSTILE: None, "unseen scorer": 0.35},
        },
    }


def summary(short: tuple[float, float] = (0.111, 0.012), long: tuple[float, float] = (0.074, 0.010)) -> dict:
    """summary.json with the given (paired gain, standard error)."""

    def outcome(base: float, gain: float, error: float) -> dict:
        return {
            "prompts": 128,
            "base_mean": base,
            "aligned_mean": base + gain,
            "paired_gain": gain,
            "paired_se": error,
            "improved_fraction": 0.78,
            "unseen_scorer_gain": 0.014,
            "unseen_scorer_se": 0.009,
            "components": {
                name: {"base": start, "aligned": start + change}
                for name, start, change in (
                    ("colour", 0.58, 1.4 * gain),
                    ("shape", 0.49, 1.1 * gain),
                    ("motion", 0.41, 0.6 * gain),
                    ("scene", 0.63, 1.9 * gain),
                    ("count", 0.55, 0.8 * gain),
                    ("persistence", 0.47, 0.3 * gain),
                    ("smoothness", 0.71, -0.15 * gain),
                )
            },
        }

    return {
        "seed": 7,
        "updates": 60,
        "wall_s": 312.4,
        "cpu_s": 588.0,
        "peak_rss_mb": 1893.0,
        "held_out": {"short": outcome(0.512, *short), "long": outcome(0.455, *long)},
        "diversity": {
            "chr": {
                "attribute_diversity": 0.31,
                "pixel_distance": 0.062,
                "broken_share": 0.041,
                "reward_std": 0.018,
            },
            "noise": {
                "attribute_diversity": 0.44,
                "pixel_distance": 0.063,
                "broken_share": 0.092,
                "reward_std": 0.022,
            },
            "noise_fresh": {
                "attribute_diversity": 0.66,
                "pixel_distance": 0.101,
                "broken_share": 0.055,
                "reward_std": 0.035,
            },
        },
        "checks": {
            "first_ratio_max_deviation": 0.0,
            "anchor_energy_at_old": 0.0,
            "default_route_max_difference": 0.0,
        },
    }


CONFIG = {
    "preset": "demo",
    "seed": 7,
    "device": "cpu",
    "stream": {
        "block": 3,
        "window": 12,
        "sink": 3,
        "schedule": [1.0, 0.75, 0.5, 0.25],
        "shift": 5.0,
        "step_rule": "ode",
    },
    "exploration": {"branches": 8, "blocks": 2, "recent": 3, "routed": 3, "distinct": 2, "donor": 0},
    "objective": {
        "temperature": None,
        "anchor_in_pool": False,
        "clip_low": 0.1,
        "clip_high": 0.2,
        "advantages": "group",
    },
    "optim": {"train": "lora", "lora_rank": 16, "lora_targets": ["self_attn.q", "ffn.0"], "lr": 1e-4},
    "rewards": {"scorer": "world", "weights": {}},
}


def write_gallery(directory: Path, size: int, frames: int) -> None:
    """gallery/: four pairs; the first has a hostile prompt, the last a loss."""
    directory.mkdir()
    videos, entries = {}, []
    for i in range(4):
        segments = [HOSTILE] if i == 0 else SEGMENTS[: i + 1] if i < 3 else SEGMENTS[:1]
        switches = [frames * (k + 1) // len(segments) for k in range(len(segments) - 1)]
        starts = [0, *switches]
        right = [("red", "square", "meadow"), ("yellow", "circle", "sea"), ("red", "square", "sea")]
        wrong = [("red", "square", "meadow"), ("white", "square", "meadow"), ("blue", "circle", "sea")]
        for side, looks in (("base", wrong), ("aligned", right)):
            acts = [(start, *look) for start, look in zip(starts, looks, strict=False)]
            videos[f"{i}.{side}"] = draw(frames, size, acts, seed=10 * i + len(side))
        gain = 0.21 - 0.09 * i
        entries.append(
            {
                "title": HOSTILE if i == 0 else f"Synthetic story {i}",
                "prompt_segments": segments,
                "switches": switches,
                "base": f"{i}.base",
                "aligned": f"{i}.aligned",
                "base_reward": 0.41,
                "aligned_reward": 0.41 + gain,
                "components": {"colour": {"base": 0.3, "aligned": 0.3 + gain}},
            }
        )
    (directory / "gallery.json").write_text(json.dumps(entries))
    save_file(videos, directory / "videos.safetensors")


def write_branches(directory: Path, size: int, frames: int) -> None:
    """branches/: one group of an anchor and eight branches (one with a donor), and one causality group."""
    directory.mkdir()
    fork, switch = frames * 2 // 3 // 3 * 3, frames // 2
    videos: dict[str, np.ndarray] = {}

    def video(name: str, colour: str, shape: str, seed: int) -> str:
        acts = [
            (0, "red", "square", "meadow"),
            (switch, "yellow", "circle", "sea"),
            (fork, colour, shape, "sea"),
        ]
        videos[name] = draw(frames, size, acts, seed)
        return name

    def member(name: str, routed: list, look: tuple[str, str], order: int, prefix: str) -> dict:
        reward = 0.5 + 0.03 * math.sin(5 * order)
        return {
            "name": name,
            "video": video(f"{prefix}.{order}", *look, seed=order),
            "routed_frames": routed,
            "reward": reward,
            "local": reward + 0.01,
            "global": reward - 0.01,
            "energy": 0.0 if order == 0 else 0.02 + 0.003 * ((order * 5) % 8),
            "advantage": 0.0 if order == 0 else round(2.4 * math.sin(5 * order), 3),
            "probability": 0.0 if order == 0 else 0.05 + 0.02 * (order % 5),
        }

    looks = [("yellow", "circle"), ("red", "square"), ("yellow", "circle"), ("white", "circle")]
    first = [member("anchor", [], looks[0], 0, "group")]
    for i in range(1, 9):
        routed: list = [3 + i, 3 + i, 4 + 2 * (i % 3)]
        if i == 4:
            routed = [5, {"frame": 9, "prompt": HOSTILE}]
        first.append(member(f"branch {i}", routed, looks[i % 4], i, "group"))
    base = {
        "prompt_segments": [SEGMENTS[0], HOSTILE],
        "switches": [switch],
        "fork_frame": fork,
        "window_frames": 6,
    }
    causes = [
        member("anchor", [], ("yellow", "circle"), 0, "cause"),
        member("branch 1", [4, 5], ("red", "square"), 1, "cause"),
        member("branch 2", [6, 7], ("red", "square"), 2, "cause"),
    ]
    groups = [
        base | {"title": "Synthetic fork after the switch", "members": first},
        base | {"title": "A second fork", "members": first[:5]},
    ]
    causality = [base | {"title": "routed only to act 1", "members": causes}]
    (directory / "branches.json").write_text(json.dumps({"groups": groups, "causality": causality}))
    save_file(videos, directory / "branches.safetensors")


def write_run(directory: Path, *, size: int = 32, frames: int = 30, updates: int = 60, seed: int = 0) -> Path:
    """A finished run in ``directory`` (created)."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    lines = metrics_lines(updates, seed)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "summary.json").write_text(json.dumps(summary()))
    write_gallery(directory / "gallery", size, frames)
    write_branches(directory / "branches", size, frames)
    return directory
