"""Messages between reward servers and clients: what is sent is what arrives, and nothing else is accepted."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Declaration, Sampling
from kvpo.rewards.service.messages import (
    LARGEST_HEADER,
    ScoreRequest,
    decode_offers,
    decode_question,
    eight_bit,
    encode_offers,
    fractions,
)
from tests.reward_servers import encoded, numbered


def decoded(body: bytes) -> ScoreRequest:
    """The question of a body that has arrived."""
    return decode_question(memoryview(bytearray(body)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_a_question_survives_its_journey_to_the_bit(dtype: torch.dtype) -> None:
    video = (torch.rand(2, 3, 3, 4, 6) * 255).to(dtype)
    prompts = (ClipPrompt("Ein Bär, “groß”", "vorher\n", 2, 12.5, ["zuerst", "vorher\n"]), ClipPrompt(""))
    found = decoded(encoded(ScoreRequest(video, prompts, ("a", "b"))))
    assert torch.equal(found.video_BTCHW, video) and found.components == ("a", "b")
    assert [(str(p), p.before, p.switch, p.file_rate, p.earlier) for p in found.prompts] == [
        ("Ein Bär, “groß”", "vorher\n", 2, 12.5, ("zuerst", "vorher\n")),
        ("", "", 0, 0, ()),
    ]


def test_offers_survive_their_journey() -> None:
    declarations = (
        Declaration("a", -math.inf, math.inf, True, 2, 100, Sampling(2.0, 4, 32, 2, None)),
        Declaration("b", 0.0, 1.0, False, 1, 50, weight=0.5),
    )
    offers = {"both": declarations}
    sent = encode_offers({"both": tuple(replace(one, unit="metres") for one in declarations)})
    assert decode_offers(json.loads(json.dumps(sent, allow_nan=False))) == offers
    assert "unit" not in sent["both"][0], "servers and clients of earlier versions know no units"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: b"", "must be a safetensors file"),
        (lambda body: b"\xff" * 40, "must be a safetensors file"),
        (lambda body: body[:-3], "189 bytes .* are not a video"),
        (lambda body: body + b"123", "195 bytes .* are not a video"),
        (lambda body: body.replace(b"[2, 2, 3, 2, 2]", b"[2, 2, 3, 2, 0]"), "must be .* got"),
        (lambda body: body.replace(b"[2, 2, 3, 2, 2]", b"[2, 2, 3, 2,-2]"), "must be .* got"),
        (lambda body: body.replace(b"[2, 2, 3, 2, 2]", b"[2, 2, 3, 2, 3]"), "are not a video"),
        (lambda body: body.replace(b'"F32"', b'"F16"'), "are not a video"),
        (lambda body: body.replace(b'"prompts"', b'"prompps"'), "must be a safetensors file"),
        (lambda body: body.replace(b"clip 0", b'\\"\\"]..'), "must be a safetensors file"),
        (lambda body: body.replace(b'"video"', b'"audio"'), "one tensor, 'video', got audio"),
        (
            lambda body: body.replace(b"[2, 2, 3, 2, 2]", b"[2, 3, 2, 2, 2]"),
            "must be .* got \\[2, 3, 2, 2, 2\\]",
        ),
        (lambda body: body.replace(b"[2, 2, 3, 2, 2]", b"[4, 1, 3, 2, 2]"), "2 prompts for 4 clips"),
        (lambda body: body.replace(b'"F32"', b'"I32"'), "of I32"),
    ],
)
def test_a_damaged_question_is_refused(change: Any, message: str) -> None:
    video, prompts = numbered(2)
    body = encoded(ScoreRequest(video, tuple(prompts), ("own",)))
    assert change(body) != body
    with pytest.raises(ValueError, match=message):
        decoded(change(body))


def test_a_header_that_would_fill_the_memory_is_not_parsed() -> None:
    for size, message in ((LARGEST_HEADER, "not JSON"), (LARGEST_HEADER + 1, "may have 16,777,216 bytes")):
        with pytest.raises(ValueError, match=message):
            decoded(size.to_bytes(8, "little") + b"{" * size)


def test_eight_bits_of_what_is_no_colour() -> None:
    values = torch.tensor([-0.1, 0.0, 0.5 / 255, 0.51 / 255, 1.5 / 255, 1.0, 1.2])[:, None, None, None, None]
    assert eight_bit(values).flatten().tolist() == [0, 0, 0, 1, 2, 255, 255]
    whole = torch.arange(256, dtype=torch.uint8)[:, None, None, None, None]
    assert eight_bit(whole) is whole and torch.equal(eight_bit(fractions(whole)), whole)


@pytest.mark.parametrize("field", ["prompts", "components"])
@pytest.mark.parametrize("text", ["[" * 50_000, '["\\ud800"]'])
def test_bodies_that_no_scorer_should_see(field: str, text: str) -> None:
    header = {
        "__metadata__": {"prompts": '[["", "", 0, 0, []]]', "components": '["own"]', field: text},
        "video": {},
    }
    encoded_header = json.dumps(header).encode()
    body = memoryview(len(encoded_header).to_bytes(8, "little") + encoded_header)
    with pytest.raises(ValueError, match="nested too deeply|half of a character"):
        decode_question(body)
