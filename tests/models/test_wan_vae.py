"""VAE: normalisation, streaming decode with a state that branches, and Wan's own file layout."""

import weakref

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from kvpo.models.wan_vae import WanVAE, diffusers_name, load_wan_vae

MEAN, STD = [0.3, -0.2, 0.1, 0.5], [1.5, 0.7, 2.0, 1.1]


def tiny_model(num_res_blocks: int = 2) -> AutoencoderKLWan:
    torch.manual_seed(0)
    model = AutoencoderKLWan(
        base_dim=4, z_dim=4, num_res_blocks=num_res_blocks, latents_mean=MEAN, latents_std=STD
    )
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.data = 0.1 * torch.randn_like(value)
        elif name.endswith("gamma"):
            value.data = 1 + 0.1 * torch.randn_like(value)
    model.decoder.conv_out.bias.data.zero_()
    return model


def latents(frames: int, videos: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(videos, frames, 4, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return WanVAE(tiny_model())


@torch.no_grad()
def diffusers_decode(model: AutoencoderKLWan, latents_BFCHW: torch.Tensor) -> torch.Tensor:
    """diffusers' own decode of the whole video, statistics applied by hand, pixels in [0, 1]."""
    mean, std = (torch.tensor(v).view(1, 1, -1, 1, 1) for v in (MEAN, STD))
    return (model.decode((latents_BFCHW * std + mean).transpose(1, 2)).sample.transpose(1, 2) + 1) / 2


def test_decode_is_the_full_decode_of_diffusers(vae):
    z = latents(4, videos=2)
    pixels, expected = vae.decode(z), diffusers_decode(vae.model, z)
    assert pixels.shape == (2, 13, 3, 16, 24) and pixels.dtype == torch.float32
    assert (pixels - expected).abs().max() <= 1e-5
    assert 0 <= pixels.min() and pixels.max() <= 1 and pixels.std() > 0.02


@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1), (3, 2), (2, 3), (1, 4)])
def test_streaming_equals_the_full_decode(vae, cuts):
    z = latents(5)
    state, parts, start = vae.start(), [], 0
    for cut in cuts:
        pixels, state = vae.decode_stream(z[:, start : start + cut], state)
        assert pixels.shape[1] == 4 * cut - (3 if start == 0 else 0)
        parts.append(pixels)
        start += cut
    assert state.frames == 5
    assert (torch.cat(parts, 1) - diffusers_decode(vae.model, z)).abs().max() <= 1e-5


def test_a_state_branches_without_being_changed(vae):
    prefix = latents(3)
    tails = [latents(2, seed=seed) for seed in (5, 6, 7)]
    _, fork = vae.decode_stream(prefix, vae.start())
    before = [f.clone() if isinstance(f, torch.Tensor) else f for f in fork.features]
    for tail in tails:
        pixels, _ = vae.decode_stream(tail, fork)
        assert (pixels - vae.decode(torch.cat([prefix, tail], 1))[:, 9:]).abs().max() <= 1e-5
    batched, state = vae.decode_stream(torch.cat(tails), fork.rows([0, 0, 0]))
    for row, tail in enumerate(tails):
        assert (batched[row : row + 1] - vae.decode_stream(tail, fork)[0]).abs().max() <= 1e-5
    more = latents(1, seed=8)
    alone = vae.decode(torch.cat([prefix, tails[2], more], 1))[:, -4:]
    assert (vae.decode_stream(more, state.rows([2]))[0] - alone).abs().max() <= 1e-5
    for was, now in zip(before, fork.features, strict=True):
        assert torch.equal(was, now) if isinstance(was, torch.Tensor) else was == now


def test_the_state_matters(vae):
    _, state = vae.decode_stream(latents(3), vae.start())
    _, other = vae.decode_stream(latents(3, seed=2), vae.start())
    tail = latents(1, seed=5)
    assert (vae.decode_stream(tail, state)[0] - vae.decode_stream(tail, other)[0]).abs().max() > 1e-3


def test_decoding_does_not_disturb_the_models_own_decode(vae):
    z = latents(3)
    first = diffusers_decode(vae.model, z)
    vae.decode_stream(latents(2, seed=4), vae.start())
    assert torch.equal(diffusers_decode(vae.model, z), first)


def test_encode_applies_the_statistics(vae):
    pixels = torch.rand(1, 9, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = vae.model.encode((2 * pixels - 1).transpose(1, 2)).latent_dist.mean.transpose(1, 2)
    expected = (raw - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1)
    assert vae.encode(pixels).shape == (1, 3, 4, 2, 3)
    assert torch.allclose(vae.encode(pixels), expected, atol=1e-6)
    with pytest.raises(ValueError, match="8 frames cannot be encoded"):
        vae.encode(pixels[:, :8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_frames_are_not_collected_on_the_device(dtype):
    vae, alive, decoded = WanVAE(tiny_model().to(dtype)), [], []

    def look(decoder, given, frame):
        assert sum(one() is not None for one in alive) <= 1
        alive.append(weakref.ref(frame))
        decoded.append(frame.clone())

    vae.model.decoder.register_forward_hook(look)
    pixels = vae.decode(latents(5))
    whole = torch.cat(decoded, dim=2).float().clamp(-1, 1)
    assert torch.equal(pixels, (whole.transpose(1, 2) + 1) / 2)


def test_bfloat16_gives_float32_pixels():
    vae = WanVAE(tiny_model())
    expected = vae.decode(latents(2))
    vae.model.to(torch.bfloat16)
    pixels = vae.decode(latents(2))
    assert pixels.dtype == torch.float32 and (pixels - expected).abs().max() < 0.1


Layout = dict[str, tuple[int, ...]]


def conv(name: str, *shape: int) -> Layout:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def residual(name: str, into: int, out: int) -> Layout:
    norms = {f"{name}.residual.0.gamma": (into, 1, 1, 1), f"{name}.residual.3.gamma": (out, 1, 1, 1)}
    convs = conv(f"{name}.residual.2", out, into, 3, 3, 3) | conv(f"{name}.residual.6", out, out, 3, 3, 3)
    return norms | convs | (conv(f"{name}.shortcut", out, into, 1, 1, 1) if into != out else {})


def resample(name: str, into: int, out: int, time: int | None) -> Layout:
    """A change of resolution; ``time`` is the width out of its temporal convolution, if it has one."""
    return conv(f"{name}.resample.1", out, into, 3, 3) | (
        conv(f"{name}.time_conv", time, into, 3, 1, 1) if time else {}
    )


def trunk(part: str, into: int, width: int, last: int, out: int) -> Layout:
    """First convolution, middle (``width`` wide) and head (the decoder's is ``last`` wide)."""
    first, head_in = (width, last) if part == "decoder" else (width // 4, width)
    return (
        conv(f"{part}.conv1", first, into, 3, 3, 3)
        | residual(f"{part}.middle.0", width, width)
        | {f"{part}.middle.1.norm.gamma": (width, 1, 1)}
        | conv(f"{part}.middle.1.to_qkv", 3 * width, width, 1, 1)
        | conv(f"{part}.middle.1.proj", width, width, 1, 1)
        | residual(f"{part}.middle.2", width, width)
        | {f"{part}.head.0.gamma": (head_in, 1, 1, 1)}
        | conv(f"{part}.head.2", out, head_in, 3, 3, 3)
    )


def official_layout(b: int, latent: int) -> Layout:
    """Names and shapes of Wan's own VAE file, written down from the structure of its network."""
    down = [(b, b), (b, b), (b, b, None), (b, 2 * b), (2 * b, 2 * b), (2 * b, 2 * b, 2 * b)]
    down += [(2 * b, 4 * b), (4 * b, 4 * b), (4 * b, 4 * b, 4 * b), (4 * b, 4 * b), (4 * b, 4 * b)]
    up = [(4 * b, 4 * b)] * 3 + [(4 * b, 2 * b, 8 * b), (2 * b, 4 * b), (4 * b, 4 * b), (4 * b, 4 * b)]
    up += [(4 * b, 2 * b, 8 * b), (2 * b, 2 * b), (2 * b, 2 * b), (2 * b, 2 * b), (2 * b, b, None)]
    up += [(b, b)] * 3
    layout = trunk("encoder", 3, 4 * b, 4 * b, 2 * latent) | trunk("decoder", latent, 4 * b, b, 3)
    layout |= conv("conv1", 2 * latent, 2 * latent, 1, 1, 1) | conv("conv2", latent, latent, 1, 1, 1)
    for prefix, layers in (("encoder.downsamples", down), ("decoder.upsamples", up)):
        for i, widths in enumerate(layers):
            layout |= (residual if len(widths) == 2 else resample)(f"{prefix}.{i}", *widths)
    return layout


def test_the_official_name_map_is_exact_at_the_real_size():
    with torch.device("meta"):
        model = AutoencoderKLWan()
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    layout = official_layout(96, 16)
    assert {diffusers_name(name): shape for name, shape in layout.items()} == expected
    assert len(layout) == len(expected) == 194
    converted = convert_wan_vae_to_diffusers({name: name for name in layout})
    assert converted == {diffusers_name(name): name for name in layout}


def test_both_layouts_load_to_the_same_pixels(tmp_path):
    torch.manual_seed(1)
    model = AutoencoderKLWan(base_dim=4, z_dim=16)
    back = {diffusers_name(name): name for name in official_layout(4, 16)}
    (tmp_path / "wan").mkdir()
    torch.save({back[n]: v for n, v in model.state_dict().items()}, tmp_path / "wan" / "Wan2.1_VAE.pth")
    model.save_pretrained(tmp_path / "diffusers" / "vae")
    z = torch.randn(1, 2, 16, 2, 2)
    expected = WanVAE(model).decode(z)
    for path in ("wan", "wan/Wan2.1_VAE.pth", "diffusers", "diffusers/vae"):
        vae = load_wan_vae(tmp_path / path)
        assert (vae.decode(z) - expected).abs().max() <= 1e-5
        assert not any(value.requires_grad for value in vae.model.parameters())


def test_files_that_do_not_fit_are_named(tmp_path):
    state = {name: torch.zeros(shape) for name, shape in official_layout(4, 16).items()}
    state["decoder.upsamples.3.time_conv.kernel"] = state.pop("decoder.upsamples.3.time_conv.weight")
    torch.save(state, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"missing \(1\): decoder.up_blocks.0.upsamplers.0.time_conv.weight"):
        load_wan_vae(tmp_path / "vae.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "vae.pth")
    with pytest.raises(ValueError, match="not a VAE in Wan's layout"):
        load_wan_vae(tmp_path / "vae.pth")
    with pytest.raises(ValueError, match="cannot be loaded as AutoencoderKLWan .*no file named config.json"):
        load_wan_vae(tmp_path)


def test_statistics_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="latents_mean: 16 values for z_dim = 4"):
        WanVAE(AutoencoderKLWan(base_dim=4, z_dim=4))
