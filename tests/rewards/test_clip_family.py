"""CLIP rewards from directories and files of a tiny model: the same paths as the public checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from tiny_rewards import gliding, random_weights, save_byte_tokenizer, texture
from transformers import CLIPConfig, CLIPModel

from kvpo.prompts import ClipPrompt
from kvpo.rewards import clip_family
from kvpo.rewards.images import CLIP_MEAN, CLIP_STD, fit_and_crop, fit_and_pad
from tests.rewards.tiny_rewards import build_rewards

SPECIALS = ("<|startoftext|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    save_byte_tokenizer(directory, SPECIALS)
    config = CLIPConfig(
        text_config={
            "vocab_size": 260,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 77,
            "bos_token_id": 256,
            "eos_token_id": 2,
            "pad_token_id": 256,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        projection_dim=12,
    )
    model = CLIPModel(config)
    weights = random_weights(model) | {"logit_scale": torch.tensor(4.6)}
    model.load_state_dict(weights)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def clips():
    return torch.stack([gliding(40, 60, 10, 2, 1, seed=s) for s in range(2)])


def test_clip_score_is_the_mean_cosine(clip_directory, clips):
    scorer = clip_family.load_clip_score(clip_directory)
    model = CLIPModel.from_pretrained(clip_directory).eval()
    frames = clips[0][[0, 1, 3, 4, 5, 6, 8, 9]]
    pixels = (fit_and_crop(frames, 28) - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[
        :, None, None
    ]
    ids = scorer.tokenizer("a fox", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels)
    expected = F.cosine_similarity(output.image_embeds, output.text_embeds).mean()
    assert scorer(clips[:1], ["a fox"])["clip_score"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_pickscore_carries_the_logit_scale(clip_directory, clips):
    plain = clip_family.load_clip_score(clip_directory)(clips, ["a", "b"])["clip_score"]
    scaled = clip_family.load_pickscore(clip_directory, clip_directory)(clips, ["a", "b"])["pickscore"]
    assert torch.allclose(scaled, plain * torch.tensor(4.6).exp(), rtol=1e-5)


def open_clip_names(model: CLIPModel) -> dict[str, torch.Tensor]:
    """A CLIPModel's weights as OpenCLIP would store them."""
    state, released = model.state_dict(), {}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(2):
            source, target = f"{tower}.encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
            for kind in ("weight", "bias"):
                joint = [state[f"{source}self_attn.{part}_proj.{kind}"] for part in "qkv"]
                released[f"{target}attn.in_proj_{kind}"] = torch.cat(joint)
                for ours, theirs in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    released[f"{target}{theirs}.{kind}"] = state[f"{source}{ours}.{kind}"]
    for kind in ("weight", "bias"):
        released[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        released[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        released[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
    embeddings = "vision_model.embeddings."
    return released | {
        "logit_scale": state["logit_scale"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].t(),
        "visual.class_embedding": state[f"{embeddings}class_embedding"],
        "visual.positional_embedding": state[f"{embeddings}position_embedding.weight"],
        "visual.conv1.weight": state[f"{embeddings}patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].t(),
    }


def test_hpsv2_reads_open_clip_weights(clip_directory, clips, tmp_path):
    model = CLIPModel.from_pretrained(clip_directory)
    released = open_clip_names(model)
    assert len(released) == len(model.state_dict()) - 4 * 2 * 2  # q, k and v are one
    torch.save({"state_dict": released, "epoch": torch.tensor(1)}, tmp_path / "HPS.pt")
    scorer = clip_family.load_hpsv2(tmp_path / "HPS.pt", clip_directory)
    assert all(torch.equal(a, model.state_dict()[n]) for n, a in scorer.model.state_dict().items())
    square = clips[..., :40]  # cropping and padding agree on squares
    plain = clip_family.load_clip_score(clip_directory)(square, ["a", "b"])["clip_score"]
    assert torch.allclose(scorer(square, ["a", "b"])["hpsv2"], plain, atol=1e-6)
    assert not torch.allclose(scorer(clips, ["a", "b"])["hpsv2"], plain, atol=1e-6)
    torch.save({"state_dict": released | {"visual.extra": torch.zeros(1)}}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"unexpected \(1\): visual.extra"):
        clip_family.load_hpsv2(tmp_path / "more.pt", clip_directory)
    del released["transformer.resblocks.1.mlp.c_fc.bias"]
    torch.save({"state_dict": released}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"missing \(1\): text_model.encoder.layers.1.mlp.fc1.bias"):
        clip_family.load_hpsv2(tmp_path / "less.pt", clip_directory)


def test_aesthetic_is_the_linear_chain_on_unit_features(clip_directory, clips, tmp_path):
    head = clip_family.rating_head(12, device="cpu")
    head.load_state_dict(random_weights(head))
    torch.save({f"layers.{n}": v for n, v in head.state_dict().items()}, tmp_path / "head.pth")
    scorer = clip_family.load_aesthetic(tmp_path / "head.pth", clip_directory)
    features = clip_family.image_features(scorer.model, clips[0][[0, 1, 3, 4, 5, 6, 8, 9]], fit_and_crop)
    assert torch.allclose(features.norm(dim=1), torch.ones(8), atol=1e-5)
    expected = features
    for layer in (0, 2, 4, 6, 7):
        expected = expected @ head[layer].weight.t() + head[layer].bias
    assert scorer(clips[:1], [""])["aesthetic"].item() == pytest.approx(expected.mean().item(), abs=1e-5)
    torch.save({"layers.0.weight": torch.zeros(1)}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"missing \(9\)"):
        clip_family.load_aesthetic(tmp_path / "cut.pth", clip_directory)


def test_embeddings_of_clip_and_prompt_add_up_to_the_cosine(clip_directory, clips):
    scorer, prompts = clip_family.load_clip_score(clip_directory), ["a fox", "a cat"]
    with torch.no_grad():
        features = scorer.features(clips, prompts)
        assert torch.allclose(features.sum(1), scorer(clips, prompts)["clip_score"], atol=1e-5)
    assert features.shape[0] == 2 and features.shape[1] > 1


def test_the_best_frames_are_averaged(clip_directory, clips, tmp_path):
    best = {"clip_score.weights": str(clip_directory)}
    (scorer,) = build_rewards(["clip_score"], best, top_share=0.25)
    each = torch.cat([scorer(clips[:1, n : n + 1], ["a"])["clip_score"] for n in (0, 1, 3, 4, 5, 6, 8, 9)])
    expected = each.sort().values[-2:].mean().item()
    assert scorer(clips[:1], ["a"])["clip_score"].item() == pytest.approx(expected, abs=1e-6)
    head = clip_family.rating_head(12, device="cpu")
    head.load_state_dict(random_weights(head))
    torch.save({f"layers.{n}": v for n, v in head.state_dict().items()}, tmp_path / "head.pth")
    sources = {"aesthetic.weights": str(tmp_path / "head.pth"), "aesthetic.base": str(clip_directory)}
    (scorer,) = build_rewards(["aesthetic"], sources, top_share=0.1)
    each = torch.cat([scorer(clips[:1, n : n + 1], [""])["aesthetic"] for n in (0, 1, 3, 4, 5, 6, 8, 9)])
    assert scorer(clips[:1], [""])["aesthetic"].item() == pytest.approx(each.max().item(), abs=1e-5)


def test_a_clip_scores_alone_as_in_company(clip_directory, clips):
    scorer = clip_family.load_clip_score(clip_directory)
    together = scorer(clips, ["a", "much longer"])["clip_score"]
    assert torch.equal(together[1:], scorer(clips[1:], ["much longer"])["clip_score"])
    assert torch.equal(together.flip(0), scorer(clips.flip(0), ["much longer", "a"])["clip_score"])


def test_gradients_reach_the_pixels(clip_directory, clips):
    scorer = clip_family.load_clip_score(clip_directory)
    video = clips[:1].clone().requires_grad_()
    scorer(video, ["a"])["clip_score"].sum().backward()
    assert video.grad is not None and video.grad.isfinite().all() and video.grad.abs().sum() > 0


def test_long_prompts_are_cut_and_switches_respected(clip_directory, clips):
    scorer = clip_family.load_clip_score(clip_directory)
    assert scorer(clips[:1], ["x" * 500])["clip_score"].isfinite().all()
    straddling = scorer(clips[:1], [ClipPrompt("now", "before", 4)])["clip_score"]
    assert torch.equal(straddling, scorer(clips[:1, 4:], ["now"])["clip_score"])


def test_a_directory_that_does_not_fit_is_named(clip_directory, tmp_path):
    model = CLIPModel.from_pretrained(clip_directory)
    state = model.state_dict()
    lost = state.pop("visual_projection.weight")
    model.save_pretrained(tmp_path / "cut", state_dict=state)
    with pytest.raises(ValueError, match=r"missing \(1\): visual_projection.weight"):
        clip_family.load_clip_score(tmp_path / "cut")
    state |= {"visual_projection.weight": lost, "x": lost.clone()}
    model.save_pretrained(tmp_path / "more", state_dict=state)
    with pytest.raises(ValueError, match=r"unexpected \(1\): x"):
        clip_family.load_clip_score(tmp_path / "more")
    model.save_pretrained(tmp_path / "no_tokenizer")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        clip_family.load_clip_score(tmp_path / "no_tokenizer")
    cut = tmp_path / "cut" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cut: cannot be loaded as CLIPModel .*not fully covered"):
        clip_family.load_clip_score(tmp_path / "cut")
    with pytest.raises(ValueError, match="nothing"):
        clip_family.load_clip_score(tmp_path / "nothing")


def test_frames_are_cropped_or_padded_to_squares():
    picture = texture(100, 200)[None]
    cropped, padded = fit_and_crop(picture, 50), fit_and_pad(picture, 50)
    assert cropped.shape == padded.shape == (1, 3, 50, 50)
    assert (
        torch.allclose(padded[:, :, :12], torch.zeros(())) and (padded[:, :, 12:37] > 0).float().mean() > 0.9
    )
    middle = F.interpolate(picture[..., 50:150], (50, 50), mode="area")
    assert (cropped - middle).abs().mean() < 0.02
    whole = F.interpolate(picture, (25, 50), mode="area")
    assert (padded[:, :, 12:37] - whole).abs().mean() < 0.02


def test_prompts_that_are_cut_are_reported_once(clip_directory, clips, caplog):
    scorer, long = clip_family.load_clip_score(clip_directory), "a fox " * 40
    scorer(clips[:1], ["a fox"])
    assert not caplog.messages
    scorer(clips, [long, long])
    (said,) = caplog.messages
    count = len(scorer.tokenizer(long, verbose=False)["input_ids"])
    assert f"clip_score reads 77 tokens of a prompt and ignores the rest; this one has {count}" in said
    clip_family.load_clip_score(clip_directory)(clips[:1], [long])
    assert len(caplog.messages) == 2, "another scorer says so too"
