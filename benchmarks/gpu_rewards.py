"""Measure the cost of large rewards on a GPU, in process and behind a server on the same card.

    python benchmarks/gpu_rewards.py [--clips 9] [--frames 60] [--repeats N] [--json PATH]
    python benchmarks/gpu_rewards.py --tiny     the same code with tiny sizes on the CPU: a check

Runs HPSv3 (Qwen2-VL-7B) and VideoAlign (Qwen2-VL-2B with its adapter) on 480 x 832 clips, with the same
random weights in both processes. The tokenizer has one token per byte, and the template is a stand-in of the
usual length.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gpu import Clock
from measuring import alternated, machine, reward_server, section, table, write_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

from kvpo.app.sources.wan import REWARD_BYTES, SCORING
from kvpo.prompts import ClipPrompt
from kvpo.rewards import hpsv3 as hpsv3_module
from kvpo.rewards import videoalign as videoalign_module
from kvpo.rewards.hpsv3 import HPSv3Scorer
from kvpo.rewards.protocol import Scorer
from kvpo.rewards.qwen_reward import QwenReward, tokenizer_with
from kvpo.rewards.videoalign import VideoAlignScorer

TINY = "KVPO_BENCHMARK_TINY"
"""Environment variable, set if the networks are tiny and on the CPU."""
GB = 1e9
MEDIA = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE_TOKENS = 400
VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
SIZES = {
    "hpsv3": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
              "num_attention_heads": 28, "num_key_value_heads": 4},
    "videoalign": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                   "num_attention_heads": 12, "num_key_value_heads": 2},
}  # fmt: skip
"""Qwen2-VL-7B and Qwen2-VL-2B."""
VOCABULARY = 151_936


def is_tiny() -> bool:
    """True if this only checks the code."""
    return TINY in os.environ


def device() -> str:
    """Device of the networks."""
    return "cpu" if is_tiny() else "cuda"


def configuration(name: str, tokenizer: Any) -> Qwen2VLConfig:
    """Configuration of the Qwen2-VL that a reward is built on."""
    text, vision = dict(SIZES[name]), dict(VISION)
    sections = [16, 24, 24]
    if is_tiny():
        text |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
        vision |= {"depth": 2, "embed_dim": 32, "num_heads": 2}
        sections = [1, 1, 2]
    special = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    return Qwen2VLConfig(
        text_config=text | {"vocab_size": VOCABULARY, "rope_parameters": rope, "bos_token_id": 0,
                            "eos_token_id": 1},
        vision_config=vision | {"hidden_size": text["hidden_size"]},
        image_token_id=special("<|image_pad|>"),
        video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"),
        vision_end_token_id=special("<|vision_end|>"),
    )  # fmt: skip


def byte_tokenizer(tokens: Sequence[str]) -> Any:
    """A tokenizer with one token per byte and the given special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>")
    fast.add_tokens(list(MEDIA), special_tokens=True)
    with tempfile.TemporaryDirectory() as directory:
        fast.save_pretrained(directory)
        return tokenizer_with(Path(directory), tokens)


def filled(model: QwenReward) -> QwenReward:
    """Fill with random weights on the device: the backbone in bfloat16, the head in float32."""
    draws = torch.Generator(device()).manual_seed(0)
    for part, dtype in ((model.backbone, torch.bfloat16), (model.head, torch.float32)):
        for owner in part.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                value = torch.empty(parameter.shape, device=device(), dtype=dtype)
                value.normal_(0, 0.02 if value.ndim < 2 else 0.5 / value.shape[-1] ** 0.5, generator=draws)
                if "norm" in type(owner).__name__.lower() and name == "weight":
                    value += 1
                setattr(owner, name, torch.nn.Parameter(value, requires_grad=False))
    return model.to(device()).eval()


@cache
def scorer(name: str) -> Scorer:
    """HPSv3, or the three scores of VideoAlign."""
    if name == "hpsv3":
        tokenizer = byte_tokenizer((hpsv3_module.TOKEN,))
        model = filled(hpsv3_module.empty_model(configuration(name, tokenizer), VOCABULARY))
        return HPSv3Scorer(model, tokenizer, "x" * TEMPLATE_TOKENS + "{text_prompt}" + hpsv3_module.TOKEN)
    tokenizer = byte_tokenizer(videoalign_module.TOKENS)
    model = filled(videoalign_module.empty_model(configuration(name, tokenizer), VOCABULARY))
    return VideoAlignScorer(
        model, tokenizer, "x" * TEMPLATE_TOKENS + "{text_prompt}" + "".join(videoalign_module.TOKENS)
    )


def hpsv3(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """HPSv3 as a function for the server."""
    return scorer("hpsv3")(video_BTCHW, prompts)["hpsv3"]


def videoalign(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """The sum of VideoAlign's scores as a function for the server."""
    return torch.stack(list(scorer("videoalign")(video_BTCHW, prompts).values())).sum(0)


hpsv3.eight_bit = videoalign.eight_bit = True  # type: ignore[attr-defined]


def measure(
    name: str, call: Callable[..., Tensor], video_BTCHW: Tensor, repeats: int
) -> tuple[list[object], dict[str, Any]]:
    """One line of the table: a group's clips scored here and by the server, with the same scores."""
    clips, clock = len(video_BTCHW), Clock(torch.device(device()))
    prompts = [ClipPrompt("a red fox runs over the snow")] * clips

    def here() -> Tensor:
        with torch.no_grad():
            return call(video_BTCHW, prompts).float().cpu()

    expected = here()
    clock.forget_peak()
    started = time.perf_counter()
    here()
    taken, peak = time.perf_counter() - started, clock.peak()
    sys.stderr.write(f"{name}, here: {taken / clips:.3g} s per clip, {peak / GB:.4g} GB\n")
    with reward_server(f"gpu_rewards:{name}", {}) as remote:
        found = remote(video_BTCHW, prompts)[name]
        apart = float((found - expected).abs().max() / expected.abs().max())
        if apart > 1e-2:
            raise SystemExit(f"{name}: a server gave other scores than the same function here, by {apart}")
        arms = {"here": here, "server": lambda: remote(video_BTCHW, prompts)}
        seconds = alternated(arms, repeats, clock.synchronise)
    planned = REWARD_BYTES[name] + SCORING
    line = [name, seconds["here"] / clips, seconds["server"] / clips, 1 - seconds["here"] / seconds["server"],
            planned / GB, peak / GB, apart]  # fmt: skip
    named = dict(zip(COLUMNS, line, strict=True))
    sys.stderr.write(f"{named}\n")  # survives if the rest is cut off
    return [f"{cell:.1%}" if n == 3 else cell for n, cell in enumerate(line)], named


COLUMNS = ("reward", "s per clip, here", "s per clip, server", "slower by", "planned GB", "peak GB",
           "difference of scores")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both rewards and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU: checks this benchmark")
    parser.add_argument("--clips", type=int, default=9, help="of a group (9: branches and anchor)")
    parser.add_argument("--frames", type=int, default=60, help="pixel frames (60: five blocks)")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument("--rewards", nargs="+", choices=list(SIZES), default=["videoalign", "hpsv3"])
    parser.add_argument("--json", type=Path, help="write every number to this file too")
    options = parser.parse_args(arguments)
    if options.tiny:
        os.environ[TINY] = "1"
    elif not torch.cuda.is_available():
        sys.stdout.write("no CUDA device here: nothing measured (--tiny runs the same code on the CPU)\n")
        return
    height, width = (60, 104) if options.tiny else (480, 832)
    draws = torch.Generator().manual_seed(0)
    video = torch.rand(options.clips, options.frames, 3, height, width, generator=draws)
    functions = {"hpsv3": hpsv3, "videoalign": videoalign}
    lines = [measure(name, functions[name], video, options.repeats) for name in options.rewards]
    about = machine(device())
    section(
        "Large rewards",
        f"{about['device']}, torch {about['torch']}, random weights, {options.clips} clips of "
        f"{options.frames} frames of {height} x {width}, float32 in host memory, "
        f"median of {options.repeats} rounds.",
        table(COLUMNS, [shown for shown, _ in lines]),
    )
    write_json(options.json, {"machine": about, "rows": [numbers for _, numbers in lines]})


if __name__ == "__main__":
    main()
