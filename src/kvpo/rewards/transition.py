"""CLIP-based rewards for prompt switches: the new prompt is followed, and the rest stays as it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase

from kvpo.prompts import ClipPrompt
from kvpo.rewards.clip_family import image_features, load_clip_score, spread_frames, text_features
from kvpo.rewards.images import fit_and_crop
from kvpo.rewards.sampling import checked_batch, present_frames


@dataclass(frozen=True)
class TransitionScorer:
    """Compares the features of frames before (b) and after (a) a prompt switch; has two components.

    ``transition_follow`` measures how much closer the frames move to the new text t than to the old text s:
    cos(a, t) - cos(a, s) - cos(b, t) + cos(b, s). ``transition_keep`` is the cosine of a and b without their
    parts along t - s, and so covers what the prompts leave alone. A clip without a switch scores 0 and 1.
    """

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    components: tuple[str, ...] = ("transition_follow", "transition_keep")

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B]; ValueError for a switch outside the clip."""
        checked_batch(video_BTCHW, prompts, 1)
        both = torch.stack([self._score(*one) for one in zip(video_BTCHW, prompts, strict=True)])
        found = {"transition_follow": both[:, 0], "transition_keep": both[:, 1]}
        return {name: found[name] for name in self.components}

    def _score(self, video_TCHW: Tensor, prompt: ClipPrompt) -> Tensor:
        after_TCHW = present_frames(video_TCHW, prompt)
        if not prompt.switch or not prompt.before:
            return video_TCHW.new_tensor([0.0, 1.0], dtype=torch.float32)
        before_D, after_D = (
            F.normalize(image_features(self.model, spread_frames(frames), fit_and_crop).mean(0), dim=-1)
            for frames in (video_TCHW[: prompt.switch], after_TCHW)
        )
        old_D, new_D = (
            text_features(self.model, self.tokenizer, text, self.components[0])
            for text in (prompt.before, str(prompt))
        )
        asked_D = F.normalize(new_D - old_D, dim=-1)
        follow = (after_D - before_D) @ (new_D - old_D)
        rest = [feature_D - (feature_D @ asked_D) * asked_D for feature_D in (before_D, after_D)]
        return torch.stack([follow, F.cosine_similarity(*rest, dim=-1)]).cpu()


def load_transition(directory: Path, *, device: str = "cpu") -> TransitionScorer:
    """Load the scorer with the CLIP model in ``directory``. Raises ValueError if weights do not fit."""
    similarity = load_clip_score(directory, device=device)
    return TransitionScorer(similarity.model, similarity.tokenizer)
