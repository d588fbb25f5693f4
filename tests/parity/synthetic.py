"""Fixtures in the golden format for every combination of metadata, their answers from the slot reference.

The reference is itself held to the shipped golden fixtures; beyond them it says what the spec says.
"""

import copy

import torch
from torch import Tensor

from kvpo.models.causal_wan import CausalWan, WanShape
from tests.models.tiny import tiny_model
from tests.parity.fixtures import CONTEXT_NOISE, segments_of
from tests.parity.reference import SIGMAS, ReferenceStream, Route, context_pass, generate, noised
from tests.parity.runs import cached_segment, routing_tape, stream_tape

SMALL = dict(
    dim=24, num_heads=2, num_layers=2, ffn_dim=32, freq_dim=16, text_len=5, text_dim=8, channels=3,
    patch_size=(1, 2, 2), latent_height=4, latent_width=4,
)  # fmt: skip
FRAME = (3, 4, 4)


def small_model(meta: dict) -> CausalWan:
    """Random weights in the fixture's precision, attention sharp and strong enough for history to show."""
    shape = WanShape(**SMALL, relative_positions=meta["relative_positions"])
    model = tiny_model(shape).requires_grad_(False)
    for block in model.blocks:
        for norm in (block.self_attn.norm_q, block.self_attn.norm_k, block.norm3):
            norm.weight += 1.2
        block.self_attn.o.weight *= 4
    return model.to(getattr(torch, meta["dtype"]))


def reference_of(meta: dict, model: CausalWan, slots: int) -> ReferenceStream:
    return ReferenceStream(model.state_dict(), meta, num_heads=model.shape.num_heads, slots=slots)


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prompts_for(meta: dict, dtype: torch.dtype) -> Tensor:
    """Strongly different prompt embeddings ``[n, 1, L, D]``, the last token padding."""
    embeds = 2 * draw(len(meta["switches"]) + 1, 1, SMALL["text_len"], SMALL["text_dim"], dtype=dtype, seed=1)
    embeds[..., -1, :] = 0
    return embeds


def stream_fixture(meta: dict, model: CausalWan, num_frames: int, given: int = 0) -> dict[str, Tensor]:
    """A stream of ``num_frames`` generated frames, after ``given`` frames to extend."""
    dtype = getattr(torch, meta["dtype"])
    data = {
        "prompt_embeds": prompts_for(meta, dtype),
        "noise": draw(1, num_frames, *FRAME, dtype=dtype, seed=2),
        "renoise": draw(num_frames, 3, *FRAME, dtype=dtype, seed=3),
    }
    if given:
        data["initial_latents"] = draw(1, given, *FRAME, dtype=dtype, seed=4)
    total = given + num_frames
    stream = reference_of(meta, model, meta["window"] if meta["window"] != -1 else total)
    prompts = [embeds[0] for embeds in data["prompt_embeds"]]
    clean = data["initial_latents"][0] if given else torch.zeros(0, *FRAME, dtype=dtype)
    for start in range(0, given, 3):
        context_pass(stream, clean[start : start + 3], prompts[0], start)
    segments = segments_of(meta, total, given)
    data["latents"] = generate(stream, stream_tape(data), prompts, segments, clean, total)[None]
    return data


def routing_fixture(meta: dict, model: CausalWan, num_frames: int) -> dict[str, Tensor]:
    """Branches and anchor after a shared prefix, over a cache of ``resident_frames`` slots."""
    dtype, first = getattr(torch, meta["dtype"]), meta["branch_chunk_start"]
    data = {
        "prompt_embeds": prompts_for(meta, dtype),
        "noise": draw(1, num_frames, *FRAME, dtype=dtype, seed=2),
        "prefix_noises": draw(4 * first // 3, 3, *FRAME, dtype=dtype, seed=3),
        "branch_noises": draw(4 * (num_frames - first) // 3, 3, *FRAME, dtype=dtype, seed=4),
    }
    prompts = [embeds[0] for embeds in data["prompt_embeds"]]
    segments = segments_of(meta, num_frames)
    tape = routing_tape(meta, data)
    root = reference_of(meta, model, meta["resident_frames"])

    def grow(stream: ReferenceStream, clean: Tensor, end: int) -> Tensor:
        return generate(stream, tape, prompts, segments, clean, end, context_noise=CONTEXT_NOISE)

    data["prefix_latents"] = grow(root, torch.zeros(0, *FRAME, dtype=dtype), first)[None]
    for k, used in enumerate([*meta["used_frames"], None]):
        stream = copy.deepcopy(root)
        if used is not None:
            stop = meta["fork_frame"] + 3 * meta["perturbed_blocks"]
            nearest = meta["nearest_counting_current_block"]
            stream.route = Route(used, nearest, meta["fork_frame"], stop)
        name = "latents_anchor" if used is None else f"latents_branch_{k}"
        data[name] = grow(stream, data["prefix_latents"][0], num_frames)[None]
    return data


def replay_fixture(meta: dict, model: CausalWan, branches: int, blocks: int) -> dict[str, Tensor]:
    """Random states and targets after a grown history, scored under two adapters."""
    fork, slots = meta["fork_frame"], 33
    data = {
        "prompt_embeds": prompts_for(meta, torch.float32),
        "noisy_inputs": draw(branches, blocks, 4, 3, *FRAME, dtype=torch.float32, seed=5),
        "clean_predictions": draw(branches, blocks, 4, 3, *FRAME, dtype=torch.float32, seed=6),
        "context_noise": draw(branches * (blocks - 1), 3, *FRAME, dtype=torch.float32, seed=7),
    }
    adapters = {"old": adapter(model, 8), "theta": adapter(model, 9)}
    for name, own in adapters.items():
        data |= {f"{name}.base_model.model.{key}": tensor for key, tensor in own.items()}
    weights = {name: adapted(model.state_dict(), own) for name, own in adapters.items()}
    text = data["prompt_embeds"][cached_segment(meta), 0]

    root = ReferenceStream(weights["old"], meta, num_heads=model.shape.num_heads, slots=slots)
    noise = draw(fork, *FRAME, dtype=torch.float32, seed=2)
    for start in range(0, fork, 3):
        context_pass(root, noise[start : start + 3], text, start)
    for layer in range(root.layers):
        for kind, stored in (("k", root.keys[layer]), ("v", root.values[layer])):
            filled = torch.stack([slot for slot in stored if slot is not None])
            padded = torch.cat([filled, torch.zeros(slots - len(filled), *filled.shape[1:])])
            data[f"history_{kind}_layer{layer}"] = padded.flatten(0, 1)[None]
    for name in ("old", "theta"):
        root.weights = weights[name]
        data[f"log_score_{name}"] = torch.stack(
            [reference_score(root, data, n, text) for n in range(branches)]
        )
    data["log_score_at_old"] = data["log_score_old"]
    return data


def reference_score(root: ReferenceStream, data: dict[str, Tensor], branch: int, text: Tensor) -> Tensor:
    """One branch's public log-score: own predictions as history, the text keys that ``root`` has cached."""
    stream, score = copy.deepcopy(root), torch.zeros(())
    states, targets = data["noisy_inputs"][branch], data["clean_predictions"][branch]
    for block in range(len(states)):
        start = root.global_end + 3 * block
        for step, sigma in enumerate(SIGMAS):
            velocity = stream.call(states[block, step], sigma, text, start, write=False)
            clean = states[block, step] - sigma * velocity
            score = score - (targets[block, step] - clean).square().mean() / 2
        if block < len(states) - 1:
            noise = data["context_noise"][branch * (len(states) - 1) + block]
            context_pass(stream, noised(clean, noise, CONTEXT_NOISE), text, start)
    return score


def adapter(model: CausalWan, seed: int) -> dict[str, Tensor]:
    """Random rank-2 adapter halves of every attention and feed-forward layer."""
    generator = torch.Generator().manual_seed(seed)
    halves = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks."):
            halves[f"{name}.lora_A.weight"] = 0.2 * torch.randn(2, module.in_features, generator=generator)
            halves[f"{name}.lora_B.weight"] = 0.2 * torch.randn(module.out_features, 2, generator=generator)
    return halves


def adapted(weights: dict[str, Tensor], halves: dict[str, Tensor]) -> dict[str, Tensor]:
    """W + B A."""
    weights = dict(weights)
    for name in [key.removesuffix(".lora_A.weight") for key in halves if ".lora_A." in key]:
        product = halves[f"{name}.lora_B.weight"] @ halves[f"{name}.lora_A.weight"]
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + product
    return weights
