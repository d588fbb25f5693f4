"""The causal Wan transformer: geometry, positions, rows, and what must not change its numbers."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from kvpo.models.causal_wan import (
    CausalWan,
    WanShape,
    cos_sin,
    rotary_angles,
    rotate,
    timestep_sinusoid,
)
from kvpo.models.context import PageContext
from kvpo.world.codec import PixelCodec
from kvpo.world.vocabulary import FRAME_SIZE
from tests.engine import tiny
from tests.engine.tiny import SHAPE, sensitive_model
from tests.models.tiny import NoHistory

WAN_1_3B = WanShape(
    dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, freq_dim=256, text_len=512, text_dim=4096,
    channels=16, patch_size=(1, 2, 2), latent_height=60, latent_width=104,
)  # fmt: skip


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def text(rows=2, dtype=torch.float64):
    return torch.stack([tiny.texts(dtype)[segment] for segment in tiny.SEGMENTS[:rows]])


def history(model, dtype=torch.float64, frames=4, rows=2):
    """A context of random pages before frame 9."""
    generator = replace(tiny.generator(dtype), transformer=model)
    cache = generator.new_cache(rows * frames)
    shape = (SHAPE.num_layers, rows, frames, SHAPE.tokens_per_frame, SHAPE.num_heads, SHAPE.head_dim)
    pages = cache.write(draw(*shape, seed=5, dtype=dtype), draw(*shape, seed=6, dtype=dtype))
    return PageContext(cache, torch.tensor(pages), torch.full((rows,), 9))


def test_golden_1_3b_keys_and_shapes(golden_file):
    expected = json.loads(golden_file("wan_1_3B_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        model = CausalWan(WAN_1_3B)
    found = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert found == {name: list(shape) for name, shape in expected.items()}
    assert len(found) == 825
    assert sum(value.numel() for value in model.parameters()) == 1_418_996_800
    assert WAN_1_3B.tokens_per_frame == 1560 and WAN_1_3B.head_dim == 128


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dim=30, num_heads=4), r"geometry: dim: must be a multiple of 2 \* num_heads = 8, got 30"),
        (dict(dim=6, num_heads=2), "geometry: dim: must be .*, got 6"),
        (dict(patch_size=(2, 2, 2)), r"geometry: patch_size: must be 1 frame deep: .*, got \[2, 2, 2\]"),
        (dict(latent_height=5), r"stream.size: must be multiples of the patch size 2 x 2, got \[5, 4\]"),
    ],
)
def test_impossible_geometry_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        CausalWan(replace(SHAPE, **change))


def test_the_default_shape_is_that_of_the_embedded_world():
    latents = PixelCodec().encode(torch.zeros(1, 1, 3, FRAME_SIZE, FRAME_SIZE))
    shape = WanShape()
    assert latents.shape[2:] == (shape.channels, shape.latent_height, shape.latent_width)


def test_timestep_features_are_cosines_then_sines():
    t, dim = torch.tensor([0.0, 937.5]), 8
    features = timestep_sinusoid(t, dim)
    for n in range(dim // 2):
        angle = t.double() * 10000 ** (-n / (dim // 2))
        assert torch.allclose(features[:, n], angle.cos()) and torch.allclose(features[:, 4 + n], angle.sin())


@pytest.mark.parametrize("frame", [1, 905, 100_000])
def test_angles_of_late_frames_are_as_exact_as_those_of_the_first(frame):
    """Angles grow with the frame: one rounded to float32 is off by up to 4e-3 radians at frame 100,000."""
    head_dim, (rows, columns) = 44, (2, 3)
    angles = rotary_angles(torch.tensor([[frame]]), (rows, columns), head_dim)

    def part(position, width):
        return [position * 10000 ** (-2 * n / width) for n in range(width // 2)]

    tokens = [(row, column) for row in range(rows) for column in range(columns)]
    expected = [[*part(frame, 16), *part(row, 14), *part(column, 14)] for row, column in tokens]
    expected = torch.tensor(expected, dtype=torch.float64)[None]
    assert angles.dtype == torch.float64
    torch.testing.assert_close(angles, expected, rtol=1e-13, atol=0)
    cos, sin = cos_sin(angles).unbind(-1)
    assert cos.dtype == sin.dtype == torch.float32
    # Half a unit in the last place of float32, and what float64 leaves of an angle of 100,000.
    assert (cos[:, :, 0] - expected.cos()).abs().max() < 6.1e-8
    assert (sin[:, :, 0] - expected.sin()).abs().max() < 6.1e-8


def test_timestep_features_are_computed_in_double_precision():
    timestep = torch.tensor([1000 / 3], dtype=torch.float64)
    angle = (1000 / 3) * 10000 ** -(torch.arange(4, dtype=torch.float64) / 4)
    features = timestep_sinusoid(timestep, 8)
    torch.testing.assert_close(features[0], torch.cat([angle.cos(), angle.sin()]), rtol=0, atol=1e-12)


def test_attention_scores_depend_on_relative_position_only():
    """Rotated q . k is unchanged when both move by the same number of frames."""
    q, k = draw(1, 6, 2, 44, seed=1), draw(1, 6, 2, 44, seed=2)

    def scores(q_frame, k_frame):
        rotated = [
            rotate(x, cos_sin(rotary_angles(torch.tensor([[frame]]), (2, 3), 44)))
            for x, frame in ((q, q_frame), (k, k_frame))
        ]
        return torch.einsum("rqnd,rknd->rnqk", *rotated)

    assert (scores(7, 2) - scores(905, 900)).abs().max() < 1e-4
    assert (scores(7, 2) - scores(7, 3)).abs().max() > 1e-2
    assert torch.allclose(scores(0, 0).diagonal(dim1=2, dim2=3), (q * k).sum(-1).transpose(1, 2), atol=1e-6)


def test_unpatchify_undoes_the_patch_order():
    model = sensitive_model()
    x_RFCHW = draw(2, 3, *tiny.FRAME)
    (rows, columns), (_, height, width) = SHAPE.grid, SHAPE.patch_size
    patches = x_RFCHW.unflatten(3, (rows, height)).unflatten(5, (columns, width))
    tokens = patches.permute(0, 1, 3, 5, 4, 6, 2).flatten(4).flatten(1, 3)
    assert torch.equal(model.unpatchify(tokens, 3), x_RFCHW)


def test_rows_do_not_see_each_other():
    model = sensitive_model()
    x, sigma, texts = draw(2, 3, *tiny.FRAME), torch.tensor([0.9, 0.3]), text()
    context = history(model)
    with torch.no_grad():
        together = model(x, sigma, texts, context)
        for row in range(2):
            alone = PageContext(context.cache, context.pages[row : row + 1], context.start_R[row : row + 1])
            one = model(x[row : row + 1], sigma[row : row + 1], texts[row : row + 1], alone)
            assert (together[row] - one[0]).abs().max() <= 1e-12


def test_rows_that_share_a_text_need_it_once():
    model = sensitive_model()
    x, sigma, context = draw(3, 3, *tiny.FRAME), torch.full((3,), 0.5), NoHistory(torch.zeros(3))
    rows = torch.tensor([1, 0, 1])
    with torch.no_grad():
        shared = model(x, sigma, text(), context, text_rows=rows)
        assert torch.equal(shared, model(x, sigma, text()[rows], context))
        assert (shared - model(x, sigma, text()[1 - rows], context)).abs().max() > 1e-2


def test_history_text_position_and_noise_level_all_matter():
    model = sensitive_model()
    x, sigma, context = draw(2, 3, *tiny.FRAME), torch.full((2,), 0.5), history(model)
    with torch.no_grad():
        here = model(x, sigma, text(), context)
        moved = model(x, sigma, text(), replace(context, start_R=context.start_R + 6))
        others = [
            moved,
            model(x, sigma, text().flip(0), context),
            model(x, sigma / 2, text(), context),
            model(x, sigma, text(), replace(context, pages=context.pages.flip(0))),
        ]
    assert all((here - other).abs().max() > 1e-2 for other in others)


def test_what_encode_returns_is_what_each_layer_computed():
    """The clean pass leaves out the last layer's output, not its keys."""
    model = sensitive_model()
    x, zero, context = draw(2, 3, *tiny.FRAME), torch.zeros(2), history(model)
    seen = []

    class Recorder:
        start_R = context.start_R

        def read(self, layer, q, k, v):
            seen.append((k, v))
            return context.read(layer, q, k, v)

    with torch.no_grad():
        model(x, zero, text(), Recorder())
        keys, values = model(x, zero, text(), context, encode=True)
    assert keys.shape == (2, 2, 3, SHAPE.tokens_per_frame, SHAPE.num_heads, SHAPE.head_dim)
    for layer, (k, v) in enumerate(seen):
        assert torch.equal(keys[layer].flatten(1, 2), k) and torch.equal(values[layer].flatten(1, 2), v)


def test_the_clean_pass_leaves_out_what_only_the_velocity_needs():
    model, ran = sensitive_model(), []
    for module in (*(block.ffn for block in model.blocks), model.head):
        module.register_forward_hook(lambda module, *_: ran.append(module))
    with torch.no_grad():
        model(draw(2, 3, *tiny.FRAME), torch.zeros(2), text(), history(model), encode=True)
    assert ran == [block.ffn for block in model.blocks[:-1]]


def test_fresh_modulations_shrink_with_the_width():
    torch.manual_seed(0)
    shape = replace(SHAPE, dim=256, num_heads=2)
    model = CausalWan(shape)
    for modulation in (*(block.modulation for block in model.blocks), model.head.modulation):
        assert float(modulation.detach().std()) == pytest.approx(1 / 16, rel=0.1)


def test_all_of_a_layer_but_its_attention_is_compiled_for_any_number_of_rows(monkeypatch):
    import torch._dynamo.config as dynamo

    compiled = []

    def compile(function, *, dynamic):
        compiled.append((function, dynamic))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    model = sensitive_model()
    with dynamo.patch(recompile_limit=8, specialize_float=False):
        model.compile_blocks()
        assert dynamo.recompile_limit >= 64 and dynamo.specialize_float
    assert compiled == [
        (part, True)
        for block in model.blocks
        for part in (type(block).project.__get__(block), type(block).update.__get__(block))
    ]


def gradients(model, context):
    x, sigma = draw(2, 3, *tiny.FRAME), torch.full((2,), 0.5)
    model.zero_grad()
    model(x, sigma, text(), context).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("trained", ["", "blocks.0.self_attn.q"])
def test_activation_checkpointing_changes_no_gradient(trained):
    """Also where no input of a layer carries a gradient, since all before it is frozen."""
    model = sensitive_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    context = history(model)
    plain = gradients(model, context)
    model.checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model, context), strict=True))


def test_double_precision_is_kept_throughout():
    """A model in float64 is differentiable to float64: nothing on the way rounds to float32."""
    model = sensitive_model()
    x, sigma, context = draw(1, 3, *tiny.FRAME), torch.tensor([0.5]), history(model, rows=1)
    weight = model.blocks[0].self_attn.k.weight
    direction = draw(*weight.shape, seed=9)

    def loss(step):
        with torch.no_grad():
            weight.add_(direction, alpha=step)
            value = model(x, sigma, text(1), context).square().mean()
            weight.add_(direction, alpha=-step)
        return value

    model.zero_grad()
    model(x, sigma, text(1), context).square().mean().backward()
    slope = (weight.grad * direction).sum()
    numeric = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert abs(numeric - slope) <= 1e-8 * max(1.0, abs(float(slope)))


def test_bfloat16_autocast_stays_close_and_returns_the_latents_type():
    model = sensitive_model(torch.float32)
    x, sigma = draw(2, 3, *tiny.FRAME, dtype=torch.float32), torch.full((2,), 0.5)
    context, texts = history(model, torch.float32), text(dtype=torch.float32)
    with torch.no_grad():
        exact = model(x, sigma, texts, context)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x, sigma, texts, context)
    assert rounded.dtype == torch.float32
    difference = (exact - rounded).square().mean().sqrt()
    assert 0 < difference < 0.05 * exact.std()


@pytest.mark.slow
def test_a_compiled_block_agrees():
    model = sensitive_model(torch.float32)
    x, sigma = draw(2, 3, *tiny.FRAME, dtype=torch.float32), torch.full((2,), 0.5)
    context, texts = history(model, torch.float32), text(dtype=torch.float32)
    with torch.no_grad():
        plain = model(x, sigma, texts, context)
        model.blocks = nn.ModuleList(torch.compile(block) for block in model.blocks)
        compiled = model(x, sigma, texts, context)
    assert (plain - compiled).abs().max() <= 1e-4
