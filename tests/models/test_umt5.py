"""Text encoder: cleaning, padding, Wan's own file layout, and the prompt cache, on a tiny random UMT5."""

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from kvpo.models.umt5 import (
    PromptCache,
    UMT5Encoder,
    clean_text,
    encoder_fingerprint,
    load_text_encoder,
    text_encoder_files,
    transformers_name,
)

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "rolls", "left", "the", "dog", "jumps", "<extra>"]
TEXT_LEN = 8


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def tiny_encoder() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=16,
        d_model=12,
        d_kv=5,
        num_heads=3,
        d_ff=20,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    model = UMT5EncoderModel(config)
    for value in model.parameters():
        value.data = torch.randn_like(value) * 0.4
    return model.eval()


OFFICIAL = {
    r"^shared": "token_embedding",
    r"^encoder\.final_layer_norm": "norm",
    r"^encoder\.block\.": "blocks.",
    r"layer\.0\.layer_norm": "norm1",
    r"layer\.0\.SelfAttention\.relative_attention_bias": "pos_embedding.embedding",
    r"layer\.0\.SelfAttention\.": "attn.",
    r"layer\.1\.layer_norm": "norm2",
    r"layer\.1\.DenseReluDense\.wi_0": "ffn.gate.0",
    r"layer\.1\.DenseReluDense\.wi_1": "ffn.fc1",
    r"layer\.1\.DenseReluDense\.wo": "ffn.fc2",
}


def official_state(model: UMT5EncoderModel) -> dict[str, torch.Tensor]:
    state = {}
    for name, value in model.state_dict().items():
        if name == "encoder.embed_tokens.weight":
            continue
        for pattern, new in OFFICIAL.items():
            name = re.sub(pattern, new, name)
        state[name] = value
    return state


@pytest.fixture
def wan_directory(tmp_path):
    root = tmp_path / "wan"
    (root / "google").mkdir(parents=True)
    tiny_tokenizer().save_pretrained(root / "google" / "umt5-xxl")
    torch.save(official_state(tiny_encoder()), root / "models_t5_umt5-xxl-enc-bf16.pth")
    return root


@pytest.fixture
def diffusers_directory(tmp_path):
    root = tmp_path / "diffusers"
    tiny_tokenizer().save_pretrained(root / "tokenizer")
    tiny_encoder().save_pretrained(root / "text_encoder")
    return root


def load(root, dtype=torch.float32) -> UMT5Encoder:
    return load_text_encoder(*text_encoder_files(root), text_len=TEXT_LEN, dtype=dtype)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\tred \n\n ball ", "a red ball"),
        ("a &amp;amp; b &lt;c&gt;", "a & b <c>"),
        ("schÃ¶n â€œquotedâ€\x9d", 'schön "quoted"'),
        ("a\u00a0ball\u3000rolls", "a ball rolls"),
        ("", ""),
    ],
)
def test_cleaning(raw, clean):
    assert clean_text(raw) == clean


def test_both_layouts_give_the_same_embeddings_and_padding_is_zero(wan_directory, diffusers_directory):
    official, converted = load(wan_directory), load(diffusers_directory)
    text = "  a red &amp;amp; ball "
    embedding = official.encode(text)
    assert embedding.shape == (TEXT_LEN, 12) and not embedding.requires_grad
    assert torch.equal(embedding, converted.encode(text))
    assert torch.equal(embedding[5:], torch.zeros(3, 12))  # a, red, &, ball, </s>
    assert embedding[:5].abs().min(dim=1).values.gt(0).all()
    # By hand: the model on the tokens alone, without any padding.
    tokens = torch.tensor([[3, 4, 2, 5, 1]])
    with torch.no_grad():
        expected = tiny_encoder()(input_ids=tokens).last_hidden_state[0]
    assert (embedding[:5] - expected).abs().max() < 1e-5


def test_long_prompts_are_cut_with_the_end_token_kept(wan_directory):
    encoder = load(wan_directory)
    long = " ".join(["red ball"] * 9)
    assert encoder.encode(long).any(dim=1).all()
    assert torch.equal(encoder.encode(long), encoder.encode(" ".join(["red ball"] * 3 + ["red"])))


def test_the_embedding_table_stays_one_tensor_and_the_model_is_frozen(wan_directory):
    model = load(wan_directory, torch.bfloat16).model
    assert model.shared.weight is model.encoder.embed_tokens.weight
    assert not any(value.requires_grad for value in model.parameters()) and not model.training
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_the_official_name_map_covers_the_encoder_at_its_real_size():
    config = UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        num_heads=64,
        d_ff=10240,
        num_layers=24,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    names = set(model.state_dict()) - {"encoder.embed_tokens.weight"}
    block = ["norm1", "attn.q", "attn.k", "attn.v", "attn.o", "pos_embedding.embedding", "norm2"]
    block += ["ffn.gate.0", "ffn.fc1", "ffn.fc2"]
    official = [f"blocks.{i}.{part}.weight" for i in range(24) for part in block]
    official += ["token_embedding.weight", "norm.weight"]
    assert {transformers_name(name) for name in official} == names and len(official) == len(names)
    assert sum(value.numel() for value in model.parameters()) == 5_680_910_336
    assert (config.dense_act_fn, config.layer_norm_epsilon) == ("gelu_new", 1e-6)


def test_official_files_that_do_not_fit_are_named(wan_directory):
    path = wan_directory / "models_t5_umt5-xxl-enc-bf16.pth"
    state = official_state(tiny_encoder())
    state["blocks.1.attn.query.weight"] = state.pop("blocks.1.attn.q.weight")
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"missing \(1\): encoder.block.1.layer.0.SelfAttention.q.weight"):
        load(wan_directory)
    torch.save({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a UMT5 encoder in Wan's layout"):
        load(wan_directory)


def test_directories_that_do_not_fit_are_named(diffusers_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = diffusers_directory / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    save_file({n: v for n, v in state.items() if "block.1.layer.0.layer_norm" not in n}, weights)
    with pytest.raises(ValueError, match=r"missing \(1\): encoder.block.1.layer.0.layer_norm.weight"):
        load(diffusers_directory)
    weights.unlink()
    with pytest.raises(
        ValueError,
        match="text_encoder: cannot be loaded as UMT5EncoderModel .*no file named",
    ):
        load(diffusers_directory)
    with pytest.raises(ValueError, match="no text encoder; expected models_t5_umt5-xxl-enc-bf16.pth"):
        text_encoder_files(tmp_path)


def test_a_tokenizer_larger_than_the_table_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(20)])
    with pytest.raises(ValueError, match="32 tokens, the text encoder's table only 16"):
        UMT5Encoder(tiny_encoder(), tokenizer, TEXT_LEN)


def never() -> UMT5Encoder:
    raise AssertionError("the encoder was loaded although every prompt is in the cache")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_returns_exactly_what_was_computed(wan_directory, tmp_path, dtype):
    encoder = load(wan_directory, dtype)
    cache = PromptCache(tmp_path / "cache", "encoder a", TEXT_LEN)
    texts = ["a red ball", "the dog jumps left", "a red ball", ""]
    computed = cache.embed(texts, lambda: encoder)
    stored = cache.embed(texts, never)
    assert list(stored) == ["a red ball", "the dog jumps left", ""]
    for text, embedding in stored.items():
        assert embedding.dtype == dtype
        assert torch.equal(embedding, encoder.encode(text)) and torch.equal(embedding, computed[text])
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert torch.equal(cache.embed(["  a   red ball\n"], never)["  a   red ball\n"], stored["a red ball"])


def test_only_missing_prompts_are_computed_and_encoders_do_not_mix(wan_directory, tmp_path):
    encoder = load(wan_directory)
    cache = PromptCache(tmp_path / "cache", "encoder a", TEXT_LEN)
    cache.embed(["a red ball"], lambda: encoder)
    loads = []
    cache.embed(["a red ball", "the dog"], lambda: loads.append(1) or encoder)
    assert loads == [1]
    for other in (
        PromptCache(cache.directory, "encoder b", TEXT_LEN),
        PromptCache(cache.directory, "encoder a", 9),
    ):
        assert other.read("a red ball") is None


def test_a_damaged_cache_file_is_computed_anew(wan_directory, tmp_path):
    encoder = load(wan_directory)
    cache = PromptCache(tmp_path / "cache", "encoder a", TEXT_LEN)
    cache.embed(["a red ball"], lambda: encoder)
    path = cache.path("a red ball")
    path.write_bytes(path.read_bytes()[:-10])
    assert torch.equal(
        cache.embed(["a red ball"], lambda: encoder)["a red ball"], encoder.encode("a red ball")
    )
    assert torch.equal(cache.embed(["a red ball"], never)["a red ball"], encoder.encode("a red ball"))


def test_the_fingerprint_follows_content_and_precision_not_the_place(wan_directory, tmp_path):
    weights, tokenizer = text_encoder_files(wan_directory)
    before = encoder_fingerprint(weights, tokenizer, torch.bfloat16)
    assert before != encoder_fingerprint(weights, tokenizer, torch.float32)
    moved = wan_directory.rename(tmp_path / "moved")
    weights, tokenizer = text_encoder_files(moved)
    assert encoder_fingerprint(weights, tokenizer, torch.bfloat16) == before
    state = torch.load(weights, weights_only=True)
    state["norm.weight"][3] += 1
    torch.save(state, weights)
    assert encoder_fingerprint(weights, tokenizer, torch.bfloat16) != before
    large = tmp_path / "large.pth"
    large.write_bytes(bytes(9_000_000))
    first = encoder_fingerprint(large, tokenizer, torch.bfloat16)
    large.write_bytes(bytes(8_999_999) + b"x")
    assert encoder_fingerprint(large, tokenizer, torch.bfloat16) != first


def test_the_cache_says_what_is_cut_also_of_prompts_it_knows(wan_directory, tmp_path):
    encoder = load(wan_directory)
    cache = PromptCache(tmp_path / "cache", "encoder a", TEXT_LEN)
    fits, long, longer = "a " * 7, "a " * 8, "red ball " * 20
    texts = [fits, long, longer, long]
    assert cache.fill(texts, lambda: encoder) == {long: 9, longer: 41}  # with the end token
    assert cache.fill(texts, never) == {long: 9, longer: 41}
    assert cache.fill([fits], never) == {}


def test_processes_share_the_texts_that_are_missing(wan_directory, tmp_path):
    """Two at a time, each at a text of its own; one that has stopped leaves its text to the other."""
    cache, encoder = PromptCache(tmp_path / "cache", "encoder a", TEXT_LEN), load(wan_directory)
    texts, encoded, both = ["a red ball", "the dog", "a dog", "ball " * 20], [], Barrier(2)

    class Watched:
        def length(self, text):
            return encoder.length(text)

        def encode(self, text):
            encoded.append(text)
            if len(encoded) <= 2:
                both.wait(timeout=30)
            return encoder.encode(text)

    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda turn: cache.fill(texts, Watched), range(2)))
    assert found == [{texts[3]: 21}] * 2 and sorted(encoded) == sorted(texts)
    cache.path("the dog").unlink()
    cache.path("the dog").with_suffix(".lock").touch()  # of a process that was killed
    assert cache.fill(texts, Watched) == {texts[3]: 21} and encoded[-1] == "the dog"
    assert sorted(cache.directory.iterdir()) == sorted(cache.path(text) for text in texts)
