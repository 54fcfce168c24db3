"""The rewards of a study's arms, all with the token interface of a FeatureReward, so that one trainer runs them all.

A direction is a ReLU SAE of two features, w . h + b = relu(w . h + b) - relu(-(w . h + b)): hash, gate, training and
report take it as they take any pack, and nothing beside FeatureReward is needed. Three controls read no feature
(`ControlReward`):

- `length`     every token is paid the completion's number of tokens
- `certainty`  every token is paid KL(uniform || p) of the policy's next-token distribution there: the self-certainty of
               INTUITOR (2505.19590), taken with the policy's own last norm and head
- `noise`      every token is paid a standard normal number that depends on the completion's states and nothing else,
               so that a resumed run draws the same

The trainer gives every dense advantage the same RMS as a share of the outcome's, which is "the same spread"; not under
the credit `stage3`, whose lambda is no share and whose outcome term is another one, too.
Deviation from INTUITOR: certainty is added to the outcome, per token, in place of being the only reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mechreward.errors import InputError
from mechreward.features import ContrastTable, FeaturePack, PackFeature, discover, random_packs, sae_ref
from mechreward.features.crossfit import PENALTY, centred
from mechreward.files import sha256_bytes
from mechreward.gates import read_scores
from mechreward.gates.dense import raw_direction
from mechreward.models import (
    LoadedModel,
    block_name,
    capture_blocks,
    d_model,
    eval_mode,
    find_final_norm,
    n_blocks,
    norm_outliers,
    text_config,
    unwrap,
)
from mechreward.reward import FeatureReward
from mechreward.reward.feature_reward import TokenRewards
from mechreward.rollout import Response
from mechreward.sae import SAE, SAEMeta
from mechreward.studies.config import Kind

Array = NDArray[np.float64]
Scorer = Callable[[Tensor, Tensor], Tensor]
"""From h_BTD and mask_BT to r_BT."""
SAME_LOGITS = 0.05
"""How far logits made in half precision may lie from the model's own, as a share of the largest."""


def direction_sae(weight_D: Array, bias: float, meta: SAEMeta) -> SAE:
    """Two ReLU features whose difference is weight . h + bias."""
    up_D = torch.tensor(np.asarray(weight_D), dtype=torch.float32)
    if not up_D.isfinite().all() or not up_D.norm() > 0:
        raise InputError("direction: its weights must be finite and not all 0")
    encoder_DF = torch.stack([up_D, -up_D], dim=1)
    decoder_FD = encoder_DF.T / up_D.norm() ** 2
    bias_F = torch.tensor([bias, -bias], dtype=torch.float32)
    return SAE("relu", encoder_DF, bias_F, decoder_FD, torch.zeros_like(up_D), meta, apply_b_dec_to_input=False)


def direction_reward(weight_D: Array, bias: float, meta: SAEMeta, name: str, scale: float = 1.0) -> FeatureReward:
    """Token reward (weight . h + bias) / scale.

    Args:
        weight_D: [D], in the residual's units.
        meta: of the SAE whose block is read; release and id give way to the direction's name.
        scale: in the reward's own units, e.g. its standard deviation over tokens.

    Raises:
        InputError: for a direction of 0, or one that is not finite.
    """
    sae = direction_sae(weight_D, bias, replace(meta, release=f"direction:{name}", sae_id=""))
    features = [PackFeature(id=place, weight=sign, scale=scale) for place, sign in enumerate((1.0, -1.0))]
    return FeatureReward(
        FeaturePack(name=name, model_name=meta.model_name, sae=sae_ref(sae), features=features), sae, name=name
    )


class ControlReward(FeatureReward):
    """A reward that reads no feature: `score` gives r_BT from the states of `layer`; masked tokens get 0."""

    def __init__(self, name: str, score: Scorer, layer: int, width: int, model_name: str, hook: str) -> None:
        meta = SAEMeta(release=f"control:{name}", sae_id="", layer=layer, model_name=model_name, hook_name=hook)
        blank = direction_sae(np.eye(1, width)[0], 0.0, meta)
        features = [PackFeature(id=0, weight=1.0, scale=1.0)]
        super().__init__(FeaturePack(name=name, model_name=model_name, sae=sae_ref(blank), features=features), blank)
        self.name = self.__name__ = name
        self._score = score

    @property
    def spec_hash(self) -> str:
        """Hash of the control's name and block: of its pack it reads nothing."""
        return sha256_bytes(f"{self.name}:{self.layer}".encode())

    @torch.no_grad()
    def score_tokens(self, h_BTD: Tensor, mask_BT: Tensor) -> TokenRewards:
        """r_BT, and the tokens without massive norm among `mask_BT`, as every reward leaves those out."""
        readable_BT = norm_outliers(h_BTD, mask_BT)
        return self._score(h_BTD, mask_BT).float().masked_fill(~readable_BT, 0.0), readable_BT


def length_score(h_BTD: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG001 (all scorers take the states)
    """The row's number of tokens, at each of them."""
    return mask_BT.sum(1, keepdim=True).expand(mask_BT.shape).float()


def noise_score(h_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Standard normal numbers, drawn from a hash of the row's states."""
    rows = []
    for h_TD, mask_T in zip(h_BTD, mask_BT, strict=True):
        digest = sha256_bytes(h_TD[mask_T].float().cpu().contiguous().numpy().tobytes())
        generator = torch.Generator().manual_seed(int(digest[:15], 16))
        # As many as there are tokens: what randn draws depends on how many it is asked for, here on the padding.
        drawn_N = torch.randn(int(mask_T.sum()), generator=generator).to(h_BTD.device)
        rows.append(torch.zeros(mask_T.shape, device=h_BTD.device).masked_scatter(mask_T, drawn_N))
    return torch.stack(rows)


def certainty_score(model: Any) -> Scorer:
    """KL(uniform || p) in nats of the next-token distribution of each last-block state, by the model's own head.

    Raises:
        InputError: if the model's logits are more than norm, head and a soft cap make of that state (Granite, Cohere).
    """
    inner, norm = unwrap(model), find_final_norm(model)
    cap = text_config(model).to_dict().get("final_logit_softcapping")  # of Gemma's configurations alone

    def logits_of(h_BTD: Tensor) -> Tensor:
        head = inner.get_output_embeddings()
        logits_BTV = head(norm(h_BTD.to(head.weight.dtype))).float()
        return logits_BTV if cap is None else cap * (logits_BTV / cap).tanh()

    def score(h_BTD: Tensor, mask_BT: Tensor) -> Tensor:  # noqa: ARG001 (all scorers take the mask)
        logits_BTV = logits_of(h_BTD)
        return -logits_BTV.log_softmax(-1).mean(-1) - float(np.log(logits_BTV.shape[-1]))

    last = n_blocks(model) - 1
    with eval_mode(inner), capture_blocks(model, [last], stop=False) as states:
        own_BTV = inner(torch.arange(4, device=inner.device)[None], use_cache=False).logits.float()
        apart = (logits_of(states[last]) - own_BTV).abs().max()
    if apart > SAME_LOGITS * own_BTV.abs().max():
        raise InputError(f"certainty: {type(inner).__name__} does more to its logits than norm and head; leave it out")
    return score


def control_reward(kind: Kind, loaded: LoadedModel, layer: int) -> FeatureReward:
    """The reward of `length`, `noise` or `certainty`; the last one reads the last block of the model in training."""
    score: Scorer
    if kind == "certainty":
        score, block = certainty_score(loaded.model), n_blocks(loaded.model) - 1
    else:
        score, block = length_score if kind == "length" else noise_score, layer
    return ControlReward(
        kind, score, block, d_model(loaded.model), loaded.name, block_name(loaded.model, block)
    )  # fmt: skip


def arm_reward(
    kind: Kind,
    found: FeatureReward,
    table: ContrastTable,
    responses: Sequence[Response],
    loaded: LoadedModel,
    seed: int,
) -> FeatureReward:
    """The reward of an arm that reads the pack's block.

    Args:
        found: the discovered pack's; given back for `sae` and `outcome` (which reads it with weight 0).
        table, responses: of the discovery half of KNOWN; nothing else is learned from.

    Raises:
        InputError: if there is nothing to learn from (one class, too few live features).
    """
    if kind in ("sae", "outcome"):
        return found
    if kind == "random":
        return FeatureReward.from_pack(random_packs(found.pack, table, 1, seed=seed)[0], found.sae)
    if kind == "shuffled":
        return FeatureReward.from_pack(shuffled_pack(found.pack, seed), found.sae)
    if kind == "failed":
        return FeatureReward.from_pack(failed_pack(found, responses, loaded, seed), found.sae)
    if kind == "direction":
        return direction_reward(raw_direction(found.pack, found.sae), 0.0, found.sae.meta, "direction")
    if kind == "probe":
        return probe_reward(found, responses, loaded)
    return control_reward(kind, loaded, found.layer)


def shuffled_pack(pack: FeaturePack, seed: int) -> FeaturePack:
    """The pack with the signs of half of its features (rounded up) turned, chosen at random."""
    n = len(pack.features)
    turned = set(np.random.default_rng(seed).permutation(n)[: (n + 1) // 2].tolist())
    features = [
        feature.model_copy(update={"weight": -feature.weight if place in turned else feature.weight})
        for place, feature in enumerate(pack.features)
    ]
    return pack.with_features("shuffled-signs", features)


def failed_pack(found: FeatureReward, responses: Sequence[Response], loaded: LoadedModel, seed: int) -> FeaturePack:
    """What discovery finds where there is nothing to find: the largest effects under shuffled labels, as many."""
    order = np.random.default_rng(seed).permutation(len(responses))
    shuffled = [replace(answer, correct=responses[at].correct) for answer, at in zip(responses, order, strict=True)]
    frame = discover(loaded, found.sae, shuffled, pooling=found.pack.pooling, seed=seed).frame
    frame = frame[frame["scale"] > 0]
    n = len(found.pack.features)
    top = frame.loc[frame["effect"].abs().nlargest(n).index]
    rows = zip(top["id"], top["effect"], top["scale"], strict=True)
    features = [PackFeature(id=int(i), weight=float(np.sign(e)) / n, scale=float(s)) for i, e, s in rows]
    return found.pack.with_features("shuffled-labels", features)


def probe_reward(found: FeatureReward, responses: Sequence[Response], loaded: LoadedModel) -> FeatureReward:
    """Logistic regression (L2, the penalty of Gate 1's dense probe) on pooled states of the same block, centred within
    the question and standardised; as a reward, its log-odds a token."""
    right_N = np.array([response.correct is True for response in responses])
    if right_N.all() or not right_N.any():
        raise InputError("correct: all answers are alike; a probe needs right and wrong ones")
    states_ND = read_scores(found, [], responses, loaded).states_ND
    x_ND = centred(states_ND, [response.question_id for response in responses])
    spread = StandardScaler().fit(x_ND)
    fitted = LogisticRegression(C=PENALTY, max_iter=500).fit(spread.transform(x_ND), right_N)
    weight_D = fitted.coef_[0] / spread.scale_
    return direction_reward(weight_D, float(-(states_ND @ weight_D).mean()), found.sae.meta, "probe")
