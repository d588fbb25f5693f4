"""Streaming generation against the public implementations' numbers."""

import pytest
import torch

from kvpo.engine.stream import advance, give_frames, open_stream, stream_pages
from kvpo.prompts import VideoPrompt
from tests.parity.fixtures import GOLDEN, base_model, generator_of, of_kind, read


def merged(model, path):
    """Fold a rank = alpha adapter into the weights."""
    state = torch.load(path, weights_only=True)["generator_lora"]
    for name in [key for key in state if key.endswith("lora_A.weight")]:
        module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        module.weight += (state[name.replace("lora_A", "lora_B")] @ state[name]).to(module.weight.dtype)


@pytest.mark.parametrize("path", of_kind("stream"), ids=lambda path: path.stem)
def test_golden_stream(path):
    if not path.exists():
        pytest.skip(f"no stream fixtures in {GOLDEN}")
    meta, data = read(path)
    model = base_model(meta)
    if meta["lora"]:
        merged(model, GOLDEN / "tiny_lora.pt")
    generator = generator_of(meta, model)
    given = data.get("initial_latents")
    offset = 0 if given is None else given.shape[1]
    steps = len(generator.sigmas) - 1

    def tape(video, block, kind):
        block -= offset // 3
        if kind == "initial":
            return data["noise"][0, 3 * block : 3 * block + 3]
        return data["renoise"][steps * block + int(kind.split()[1]) - 1]

    num_frames = data["latents"].shape[1]
    segments = tuple(f"prompt {n}" for n in range(len(data["prompt_embeds"])))
    texts = {name: embeds[0] for name, embeds in zip(segments, data["prompt_embeds"], strict=True)}
    prompt = VideoPrompt(0, segments, tuple(meta["switches"]), num_frames)
    cache = generator.new_cache(stream_pages(generator, num_frames))
    stream = open_stream(generator, cache, prompt)
    if given is not None:
        with torch.no_grad():
            give_frames(generator, [stream], given, texts)
    while stream.start < num_frames:
        advance(generator, [stream], texts, tape, resident=meta["window"])
    latents = torch.cat(stream.latents)[None].float()
    difference = latents - data["latents"].float()
    if meta["dtype"] == "float32":
        assert difference.abs().max() <= 1e-4
    else:
        assert difference.pow(2).mean().sqrt() < 0.03
    stream.history.release()
    assert cache.pages_in_use == 0
