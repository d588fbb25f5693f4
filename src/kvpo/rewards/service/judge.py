"""A vision-language model as a reward, behind a URL with OpenAI's chat completions API.

vLLM, SGLang and llama.cpp serve such models. A rubric defines the question, the frames shown, and how an
answer becomes a number.
"""

import asyncio
import base64
import hashlib
import io
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from kvpo.files import read_text
from kvpo.prompts import ClipPrompt
from kvpo.rewards.images import resized
from kvpo.rewards.protocol import JUDGES, Declaration, Sampling
from kvpo.rewards.reward import Reward
from kvpo.rewards.sampling import checked_batch, present_frames
from kvpo.rewards.service.client import Link, in_parallel
from kvpo.rewards.service.messages import Body, eight_bit
from kvpo.rewards.service.patience import PATIENCE, Failed, Patience, RequestRefused

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the API key; no key is sent if it is not set."""
AT_ONCE = 8
"""Questions in flight."""
LIKELIEST = 20
"""Number of most likely tokens to request at each position of an answer."""


@dataclass(frozen=True)
class Rubric:
    """A question and how to read its answer, in YAML under these fields; only the first two are required."""

    question: str
    """``{prompt}`` and ``{before}`` are replaced by the texts of the clip and of the segment before it."""
    scale: dict[str, float]
    """Answer -> its value; YAML may also give [lowest, highest] for a range of integers."""
    frames: int = 8
    """Frames shown, spread evenly."""
    pixels: int = 480 * 832
    """Maximum frame area; larger frames are shrunk."""
    read: str = "last"
    """Answer that counts: the first or the last from the scale, or the group of a regular expression."""
    expectation: bool = True
    """Average answers by their probabilities, if the server reports them, for values between the steps."""
    tokens: int = 256
    """Maximum number of tokens in an answer."""
    transition: bool = False
    """Show frames before and after a prompt switch; clips without one get the scale's middle, unasked."""

    @property
    def middle(self) -> float:
        """The middle of the scale."""
        return (min(self.scale.values()) + max(self.scale.values())) / 2

    def value(self, answer: str) -> str | None:
        """Find an answer from the scale in a text, as the scale spells it; None if there is none."""
        if self.read not in ("first", "last"):
            match = re.search(self.read, answer, re.IGNORECASE)
            answer = match[1] or "" if match else ""
        words = "|".join(re.escape(word) for word in sorted(self.scale, key=len, reverse=True))
        found = re.findall(rf"(?<![\w./-])(?:{words})(?![\w-]|\.\d)", answer, re.IGNORECASE)
        return self.spelling(found[0 if self.read == "first" else -1]) if found else None

    def spelling(self, word: str) -> str | None:
        """A word as the scale spells it; None if the scale does not have it."""
        return {own.casefold(): own for own in self.scale}.get(word.strip().casefold())


def read_rubric(path: Path) -> Rubric:
    """Read a rubric from a YAML file. Raises ValueError, naming the field."""
    try:
        given = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    kinds: dict[str, Any] = {field.name: field.type for field in fields(Rubric)}
    if not isinstance(given, dict) or not {"question", "scale"} <= given.keys():
        raise ValueError(f"{path}: a rubric needs question and scale, and may have {', '.join(kinds)}")
    if unknown := sorted(map(str, given.keys() - kinds.keys())):
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; there are {', '.join(kinds)}")
    for name, value in given.items():
        wrong = name != "scale" and type(value) is not kinds[name]
        if wrong or kinds[name] is int and value < 1 or value == "":
            raise ValueError(f"{path}: {name} must be of type {kinds[name].__name__}, got {value!r}")
    rubric = Rubric(**given | {"scale": _scale(given["scale"], path)})
    if rubric.read not in ("first", "last"):
        try:
            groups = re.compile(rubric.read).groups
        except re.error as error:
            raise ValueError(f"{path}: read: not a regular expression ({error})") from error
        if groups != 1:
            raise ValueError(f"{path}: read: first, last, or a regular expression with one group")
    return rubric


def _scale(given: Any, path: Path) -> dict[str, float]:
    if isinstance(given, list) and len(given) == 2 and all(type(end) is int for end in given):
        found = {str(n): float(n) for n in range(given[0], given[1] + 1)}
    elif isinstance(given, dict) and all(type(value) in (int, float) for value in given.values()):
        names = {True: "yes", False: "no"}  # YAML reads yes and no as booleans
        found = {names[k] if isinstance(k, bool) else str(k): float(v) for k, v in given.items()}
    else:
        raise ValueError(f"{path}: scale must be [lowest, highest] or answers with their values, got {given}")
    if len(set(found.values())) < 2 or not all(map(math.isfinite, found.values())):
        raise ValueError(f"{path}: scale needs two different values at least, got {given}")
    return found


@dataclass(frozen=True)
class Judge:
    """A rubric and the model that answers it; the one component has the reward's name."""

    name: str
    rubric: Rubric
    link: Link
    model: str

    @property
    def components(self) -> tuple[str, ...]:
        return (self.name,)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B]. Raises ValueError: see ``begin``."""
        return self.begin(video_BTCHW, prompts)()

    def begin(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Callable[[], dict[str, Tensor]]:
        """Ask about clips, several at a time; the returned function waits for component -> [B].

        Raises:
            ValueError: the server refuses, is away for too long, or gives no answer from the scale.
        """
        checked_batch(video_BTCHW, prompts, 1)
        answers = self.link.begin(self._ask(video_BTCHW.detach(), prompts))
        return lambda: {self.name: torch.tensor(answers())}

    async def _ask(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> list[float]:
        async def ask(video_TCHW: Tensor, prompt: ClipPrompt) -> float:
            if self.rubric.transition and not prompt.switch:
                return self.rubric.middle
            async with self.link.in_flight:
                body = await asyncio.to_thread(self._question, video_TCHW, prompt)
                return await self.link.ask("POST", "/chat/completions", self._read, body)

        return await in_parallel(ask(*one) for one in zip(video_BTCHW, prompts, strict=True))

    def _question(self, video_TCHW: Tensor, prompt: ClipPrompt) -> Body:
        texts = {"{prompt}": str(prompt), "{before}": prompt.before}
        text = re.sub(r"\{prompt\}|\{before\}", lambda found: texts[found[0]], self.rubric.question)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        parts = {"": present_frames(video_TCHW, prompt)}
        if self.rubric.transition:
            parts = {"Frames before:": video_TCHW[: prompt.switch], "Frames after:": parts[""]}
        for label, frames in parts.items():
            content += [{"type": "text", "text": label}] if label else []
            count = min(len(frames), max(1, self.rubric.frames // len(parts)))
            for n in torch.linspace(0, len(frames) - 1, count).round().long().tolist():
                url = (
                    f"data:image/png;base64,{base64.b64encode(_png(frames[n], self.rubric.pixels)).decode()}"
                )
                content.append({"type": "image_url", "image_url": {"url": url}})
        question = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": self.rubric.tokens,
        }
        if self.rubric.expectation:
            question |= {"logprobs": True, "top_logprobs": LIKELIEST}
        return Body(json.dumps(question).encode(), memoryview(b""))

    def _read(self, answer: Any) -> float:
        """The value of a completion."""
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            said = self.rubric.value(text) if isinstance(text, str) else None
            if said is None:
                raise Failed(f"no answer of the scale {', '.join(self.rubric.scale)} in {str(text)[:100]!r}")
            places = (choice.get("logprobs") or {}).get("content") or []
            return self._expected(places, said) if self.rubric.expectation else self.rubric.scale[said]
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise Failed(f"not a chat completion: {error!r}") from error

    def _expected(self, places: Sequence[Any], said: str) -> float:
        """Expected value over the likely answers at the place of ``said``; its own value if unknown."""
        here = [place for place in places if self.rubric.spelling(place["token"]) == said]
        if not here:
            return self.rubric.scale[said]
        shares: dict[str, float] = {}
        for one in here[0 if self.rubric.read == "first" else -1]["top_logprobs"] or here[-1:]:
            word, likely = self.rubric.spelling(one["token"]), math.exp(min(0.0, float(one["logprob"])))
            if word is not None and math.isfinite(likely):
                shares[word] = shares.get(word, 0.0) + likely
        weight = sum(shares.values())
        if not weight:
            return self.rubric.scale[said]
        return sum(share * self.rubric.scale[word] for word, share in shares.items()) / weight


def _png(frame_CHW: Tensor, pixels: int) -> bytes:
    height, width = frame_CHW.shape[-2:]
    shrink = min(1.0, math.sqrt(pixels / (height * width)))
    if shrink < 1:
        frame_CHW = resized(frame_CHW[None], max(1, round(height * shrink)), max(1, round(width * shrink)))[0]
    file = io.BytesIO()
    Image.fromarray(eight_bit(frame_CHW).permute(1, 2, 0).cpu().numpy()).save(file, "PNG", compress_level=1)
    return file.getvalue()


def connect_judge(
    name: str, place: str, rubric: Rubric, *, key: str | None = None, patience: Patience = PATIENCE
) -> Reward:
    """Connect to the judge ``name`` at ``openai:URL#MODEL``; the server must answer and have the model.

    Raises ValueError if the address is invalid, no server answers, or it does not have the model.
    """
    url, _, model = place.removeprefix(JUDGES).partition("#")
    if not model:
        raise ValueError(f"judge {name}: name the model too: {JUDGES}http://HOST:PORT/v1#MODEL, got {place}")
    link = Link(url, key, patience, at_once=AT_ONCE, role="judge", kind="application/json")

    def read(content: Any) -> None:
        try:
            models = [one["id"] for one in content["data"]]
        except (KeyError, TypeError) as error:
            raise RequestRefused(f"{url}/models does not list models: {error!r}") from error
        if model not in models:
            raise RequestRefused(
                f"it does not have the model {model!r}; it has {', '.join(map(str, models))}"
            )

    try:
        link.run(link.ask("GET", "/models", read, first=True))
    except BaseException:
        link.close()
        raise
    values = rubric.scale.values()
    sampling = Sampling(rate=0.5, least=rubric.frames, most=rubric.frames)
    reads = "{prompt}" in rubric.question or "{before}" in rubric.question
    declaration = Declaration(
        name, min(values), max(values), reads, 1, rubric.pixels, sampling, eight_bit=True
    )
    decisive = json.dumps([url, model, asdict(rubric)])
    version = hashlib.blake2b(decisive.encode(), digest_size=24).hexdigest()
    return Reward(name, Judge(name, rubric, link, model), (declaration,), version)
