"""Models with SAEs that fit them, and steering written out the long way round, which everything is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mechreward.models import LoadedModel, d_model, find_blocks, load_model, read_residuals, unwrap
from mechreward.sae import SAE, SAEMeta, load_sae
from mechreward.tiny import MODEL, SAE_FOLDER

LAYER, FEATURES, EOS, PAD, BOS = 1, 48, 1, 2, 0
Change = Callable[[Tensor], Tensor]
"""From activations [N, F] to edited ones."""


def make_sae(loaded: LoadedModel, architecture: str = "topk", seed: int = 0, **changes: Any) -> SAE:
    """An SAE with random weights whose features fire on this model: inputs are scaled to its residuals."""
    width = d_model(loaded.model)
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, 60, (12,), generator=g).tolist() for _ in range(4)]
    size = read_residuals(loaded.model, [[0]] * 4, ids, LAYER)[0].std().item()
    if changes.get("input_norm", "none") != "none":
        size = 1.0
    W_enc = torch.randn(width, FEATURES, generator=g) / (size * width**0.5)
    W_dec = torch.randn(FEATURES, width, generator=g) * size * 0.6
    options: dict[str, Any] = {"k": 6} if architecture == "topk" else {}
    if architecture == "jumprelu":
        options = {"threshold_F": torch.rand(FEATURES, generator=g)}
    if architecture == "gated":
        options = {
            "b_gate_F": torch.randn(FEATURES, generator=g) - 1,
            "r_mag_F": torch.randn(FEATURES, generator=g) / 4,
        }
    biases = torch.randn(FEATURES, generator=g) / 10, torch.randn(width, generator=g) * size / 10
    meta = SAEMeta("r", "s", LAYER, "m", f"model.layers.{LAYER}")
    return SAE(architecture, W_enc, biases[0], W_dec, biases[1], meta, **{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def lora(tiny_llama: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    model = get_peft_model(copy.deepcopy(tiny_llama), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def model_of(request: pytest.FixtureRequest, tiny_model, char_tokenizer) -> Callable[[str], LoadedModel]:
    def make(name: str) -> LoadedModel:
        known = {"gpt2": "tiny_gpt2", "llama": "tiny_llama", "lora": "lora"}
        model = request.getfixturevalue(known[name]) if name in known else tiny_model(name)
        return LoadedModel(model, char_tokenizer, name)

    return make


@pytest.fixture
def llama(model_of) -> LoadedModel:
    return model_of("llama")


@pytest.fixture
def llama_sae(llama: LoadedModel) -> SAE:
    return make_sae(llama)


@pytest.fixture(scope="session")
def reasoner() -> LoadedModel:
    return load_model(str(MODEL))


@pytest.fixture(scope="session")
def reasoner_sae() -> SAE:
    return load_sae(str(SAE_FOLDER))


@contextmanager
def by_hand(
    loaded: LoadedModel,
    sae: SAE,
    change: Change,
    ids: Sequence[int],
    first: int = 0,
    closed: Sequence[int] = (BOS, PAD),
) -> Iterator[None]:
    """Edits one unpadded row: every activation encoded, changed, decoded, and the SAE's error added back."""
    places = [t for t, token in enumerate(ids) if t >= first and token not in closed]

    def edit(_module: object, _inputs: object, output: Any) -> Any:
        h_BSD = (output[0] if isinstance(output, tuple) else output).clone()
        for t in places:
            h_ND = h_BSD[0, t : t + 1]
            acts_NF = sae.encode(h_ND)
            error_ND = h_ND - sae.decode(acts_NF, h_ND)
            h_BSD[0, t : t + 1] = sae.decode(change(acts_NF.clone()), h_ND) + error_ND
        return (h_BSD, *output[1:]) if isinstance(output, tuple) else h_BSD

    handle = find_blocks(loaded.model)[sae.meta.layer].register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()


def logits_by_hand(loaded: LoadedModel, sae: SAE, change: Change, ids: Sequence[int], first: int = 0) -> Tensor:
    """[S, V] of one row."""
    with torch.no_grad(), by_hand(loaded, sae, change, ids, first):
        return unwrap(loaded.model)(torch.tensor([list(ids)]), use_cache=False).logits[0]


def greedy_by_hand(
    loaded: LoadedModel, sae: SAE, change: Change, prompt: Sequence[int], n: int, completion_only: bool = False
) -> list[int]:
    """Greedy tokens up to EOS, each by a whole forward of its own."""
    ids, first = list(prompt), len(prompt) - 1 if completion_only else 0
    while len(ids) < len(prompt) + n and (len(ids) == len(prompt) or ids[-1] != EOS):
        ids.append(int(logits_by_hand(loaded, sae, change, ids, first)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="session")
def hand() -> SimpleNamespace:
    """What is written out by hand, and the SAEs that it is tried on."""
    return SimpleNamespace(greedy=greedy_by_hand, logits=logits_by_hand, make_sae=make_sae, steered=by_hand)
