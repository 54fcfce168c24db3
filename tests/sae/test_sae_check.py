"""The check names each planted mistake by its own sentence, and nothing where an SAE is healthy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import mechreward.sae.check as check
from mechreward.errors import InputError
from mechreward.models import LoadedModel, load_model, norm_outliers, read_residuals
from mechreward.rollout import Response, sample_responses
from mechreward.sae import SAE, SAECheck, SAEMeta, check_sae, load_sae
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER

LAYER = 2
META = SAEMeta("r", "", LAYER, "the right model", "model.layers.2")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(MODEL))


@pytest.fixture(scope="module")
def responses(loaded: LoadedModel) -> list[Response]:
    return sample_responses(loaded, load_questions("tiny:easy", limit=8, seed=5), n=2, max_new_tokens=48, seed=3)


def states_of(model: torch.nn.Module, responses: list[Response]) -> dict[int, Tensor]:
    prompts, completions = [list(r.prompt_ids) for r in responses], [list(r.completion_ids) for r in responses]
    found = {}
    for layer in range(5):
        h_BTD, mask_BT = read_residuals(model, prompts, completions, layer)
        found[layer] = h_BTD[mask_BT]
    return found


@pytest.fixture(scope="module")
def blocks(loaded: LoadedModel, responses: list[Response]) -> dict[int, Tensor]:
    return states_of(loaded.model, responses)


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae(SAE_FOLDER)


def only(check: SAECheck) -> str:
    (sentence,) = check.findings
    return sentence


def moved(sae: SAE, layer: int) -> SAE:
    return replace(sae, meta=replace(sae.meta, layer=layer))


# --- numbers -----------------------------------------------------------------------------------------------------


def test_numbers_by_hand() -> None:
    """ReLU SAE with features x, y and one that never fires; the decoder halves y. b_dec is (1, 0)."""
    sae = SAE(
        architecture="relu",
        W_enc_DF=torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
        b_enc_F=torch.tensor([0.0, 0.0, -1.0]),
        W_dec_FD=torch.tensor([[1.0, 0.0], [0.0, 0.5], [1.0, 1.0]]),
        b_dec_D=torch.tensor([1.0, 0.0]),
        meta=META,
    )
    # h - b_dec: (2, 0), (0, 2), (1, 1), (-1, 1); active 1, 1, 2, 1 features; rebuilt (3, 0), (1, 1), (2, .5), (1, .5)
    check = check_sae(sae, torch.tensor([[[3.0, 0.0], [1.0, 2.0]], [[2.0, 1.0], [0.0, 1.0]]]))
    assert (check.n_tokens, check.layer) == (4, LAYER)
    assert check.l0 == 5 / 4
    assert check.dead_share == pytest.approx(1 / 3)
    # mean (1.5, 1): squared distances 3.25, 1.25, .25, 2.25; errors 0, 1, .25, 1 + .25
    assert check.fvu == pytest.approx(2.5 / 7)
    # rebuilt about the mean: 2.25 + 1, .25 + 0, .25 + .25, .25 + .25
    assert check.norm_ratio == pytest.approx((4.5 / 7) ** 0.5)
    assert check.encoder_decoder_cosine == pytest.approx(2 / 3)
    assert check.fvu_by_layer == {LAYER: check.fvu}


def test_numbers_on_the_bundled_model_equal_a_loop_over_tokens(sae: SAE, blocks: dict[int, Tensor]) -> None:
    h_ND = blocks[LAYER][:70]
    check = check_sae(sae, h_ND)
    mean_D, fired, active, error, total, size = h_ND.mean(0), set(), 0, 0.0, 0.0, 0.0
    for h_D in h_ND:
        acts_F = sae.encode(h_D)
        on = acts_F.nonzero()[:, 0].tolist()
        active, fired = active + len(on), fired | set(on)
        back_D = sae.b_dec_D + sum(acts_F[i] * sae.W_dec_FD[i] for i in on)
        error += (h_D - back_D).square().sum().item()
        total += (h_D - mean_D).square().sum().item()
        size += (back_D - mean_D).square().sum().item()
    assert check.l0 == active / 70
    assert check.dead_share == pytest.approx(1 - len(fired) / sae.d_sae)
    assert check.fvu == pytest.approx(error / total, rel=1e-4)
    assert check.norm_ratio == pytest.approx((size / total) ** 0.5, rel=1e-5)


def test_massive_tokens_are_left_out(sae: SAE, blocks: dict[int, Tensor]) -> None:
    plain = check_sae(sae, blocks)
    with_sink = {layer: torch.cat([h, 200 * h[:3]]) for layer, h in blocks.items()}
    assert check_sae(sae, with_sink) == plain


def test_dictionary_for_json(sae: SAE, blocks: dict[int, Tensor]) -> None:
    check = check_sae(moved(sae, 3), blocks)
    record = check.to_dict()
    assert record["fvu_by_layer"] == {str(layer): fvu for layer, fvu in check.fvu_by_layer.items()}
    assert record["findings"] == check.findings and record["l0"] == check.l0


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_a_healthy_sae_has_no_finding(sae: SAE, blocks: dict[int, Tensor]) -> None:
    check = check_sae(sae, blocks)
    assert check.findings == ()
    assert check.fvu < 0.05 and check.l0 == sae.k and 0.95 < check.norm_ratio < 1.05
    assert check.encoder_decoder_cosine > 0.5
    assert min(check.fvu_by_layer, key=lambda layer: check.fvu_by_layer[layer]) == LAYER
    assert check_sae(sae, blocks[LAYER]).findings == ()
    assert sae.check(blocks) == check


@pytest.mark.parametrize("layer", [0, 1, 3, 4])
def test_a_wrong_layer(sae: SAE, blocks: dict[int, Tensor], layer: int) -> None:
    sentence = only(check_sae(moved(sae, layer), blocks))
    assert sentence.startswith("likely a wrong layer: the SAE fits better (FVU 0.01")
    assert sentence.endswith(f"on block 2 than on block {layer}, which it says it reads")


def test_a_wrong_base_model(sae: SAE, responses: list[Response]) -> None:
    """Another random model of the same width, its residuals of the SAE's usual norm and far smaller ones."""
    for factor in (1.0, 20.0):
        states = states_of(other_model(factor), responses)
        check = check_sae(replace(sae, meta=replace(sae.meta, model_name="tiny")), states)
        sentence = only(check)
        assert sentence.startswith(f"likely a wrong base model: the SAE fits badly (FVU {check.fvu:.3g})")
        assert sentence.endswith("; it says it was made for 'tiny'")
        alone = only(check_sae(sae, states[LAYER]))
        assert alone.startswith("likely a wrong layer or a wrong base model: ")


def noisy(h_ND: Tensor, share: float) -> Tensor:
    """With noise of so much of its variance, which no SAE explains: it stands for text the SAE was not trained on."""
    g = torch.Generator().manual_seed(0)
    return h_ND + h_ND.std() * share**0.5 * torch.randn(h_ND.shape, generator=g)


def test_other_text(sae: SAE, blocks: dict[int, Tensor]) -> None:
    """A bad fit that is best at the trained block: seen on SmolLM2-135M with an SAE trained on sums, reading prose."""
    states = {layer: noisy(h, 2.0) for layer, h in blocks.items()}
    check = check_sae(sae, states)
    assert 0.5 < check.fvu < 1
    sentence = only(check)
    assert sentence.startswith("likely other text than it was trained on: the SAE fits badly")
    assert sentence.endswith("though better at block 2 than at any other")


def test_a_neighbouring_layer(sae: SAE, blocks: dict[int, Tensor]) -> None:
    """Not half the FVU, but clearly lower at the trained block: .24 against .41 on SmolLM2-135M, one block off."""
    states = {2: noisy(blocks[2], 0.6), 4: blocks[4]}
    check = check_sae(moved(sae, 4), states)
    assert 0.5 * check.fvu < check.fvu_by_layer[2] < min(0.5, 0.8 * check.fvu)
    assert only(check).startswith("likely a wrong layer: the SAE fits better (FVU 0.")
    closer = check_sae(moved(sae, 4), {**states, 2: noisy(blocks[2], 1.3)})
    assert closer.fvu_by_layer[2] < 0.5
    assert 0.8 * closer.fvu < closer.fvu_by_layer[2] < closer.fvu
    assert only(closer).startswith("likely a wrong base model: ")


def other_model(factor: float) -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4, "intermediate_size": 256}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(factor)
    return model


@pytest.mark.parametrize("scale", [2**-6.5, 0.0173, 300.0])
def test_inputs_it_was_trained_on_were_scaled(sae: SAE, blocks: dict[int, Tensor], scale: float) -> None:
    """A TopK SAE with its biases scaled reads scaled residuals as it read the plain ones."""
    scaled = replace(sae, b_dec_D=sae.b_dec_D * scale, b_enc_F=sae.b_enc_F * scale)
    sentence = only(check_sae(scaled, blocks))
    assert sentence.startswith("likely a missing normalisation: the SAE fits better")
    named = float(sentence.split("residuals times ")[1].split(",")[0])
    assert scale / 1.15 < named < scale * 1.15
    # sqrt(128) = 11.3 is the mean norm that sae-lens scales to; block 2 has a mean norm of about 650.
    assert ("as sae-lens' expected_average_only_in" in sentence) == (scale == 0.0173)


def worded(sae_norm: str, seed: int = 0) -> tuple[SAE, Tensor]:
    """Tokens that are one of 16 directions each, of wildly different norms, and an SAE that fits them only at norm 4.

    Activation and decoder make up for each other at that norm: pre = 4 - 3.2, and .8 * 5 = 4.
    """
    g = torch.Generator().manual_seed(seed)
    # Rows of a Hadamard matrix but the constant one: they have mean 0 and standard deviation 1, and norm 4.
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    words_WD = torch.kron(torch.kron(two, two), torch.kron(two, two))[1:]
    norms_N1 = torch.exp(1.5 * torch.randn(300, 1, generator=g))
    h_ND = norms_N1 * words_WD[torch.randint(15, (300,), generator=g)]
    sae = SAE(
        architecture="relu",
        W_enc_DF=words_WD.T / 4,
        b_enc_F=torch.full((15,), -3.2),
        W_dec_FD=words_WD * 5 / 4,
        b_dec_D=torch.zeros(16),
        meta=META,
        input_norm=sae_norm,  # type: ignore[arg-type]
    )
    return sae, h_ND


def test_each_token_has_to_be_normalised() -> None:
    sae, h_ND = worded("constant_norm_rescale")
    assert check_sae(sae, h_ND).findings == ()
    sentence = only(check_sae(replace(sae, input_norm="none"), h_ND))
    assert sentence.startswith("likely a missing normalisation: ")
    assert sentence.endswith("with input_norm 'constant_norm_rescale' than with 'none'")


def test_a_token_mean_has_to_be_subtracted() -> None:
    """As above with another constant added to each token: only layer_norm takes it away."""
    sae, h_ND = worded("layer_norm")
    h_ND = h_ND + 3 * torch.randn(len(h_ND), 1)
    sentence = only(check_sae(replace(sae, input_norm="none"), h_ND))
    assert sentence.endswith("with input_norm 'layer_norm' than with 'none'")


def test_a_token_mean_alone_has_to_be_subtracted() -> None:
    """As above, at one norm: SAEs of models with centered writing weights, as whose files often do not say it."""
    sae, h_ND = worded("none")
    h_ND = 4 * torch.nn.functional.normalize(h_ND, dim=-1) + 3 * torch.randn(len(h_ND), 1)
    assert check_sae(replace(sae, input_norm="center"), h_ND).findings == ()
    sentence = only(check_sae(sae, h_ND))
    assert sentence.startswith("likely a missing normalisation: ")
    assert sentence.endswith("with input_norm 'center' than with 'none'")


def test_a_normalisation_that_should_not_be(sae: SAE, blocks: dict[int, Tensor]) -> None:
    sentence = only(check_sae(replace(sae, input_norm="layer_norm"), blocks))
    assert sentence.startswith("likely a wrong normalisation: ")
    assert sentence.endswith("with input_norm 'none' than with 'layer_norm'")


def reshaped(matrix: Tensor) -> Tensor:
    """What a loader gets that reads a matrix stored the other way round by `reshape` instead of `.T`."""
    return matrix.T.contiguous().reshape(matrix.shape)


@pytest.mark.parametrize("names", [["W_enc"], ["W_dec"], ["W_enc", "W_dec"]])
def test_matrices_reshaped_instead_of_transposed(sae: SAE, blocks: dict[int, Tensor], names: list[str]) -> None:
    fields = {"W_enc": ("W_enc_DF", sae.W_enc_DF), "W_dec": ("W_dec_FD", sae.W_dec_FD)}
    broken = replace(sae, **{fields[name][0]: reshaped(fields[name][1]) for name in names})
    sentence = only(check_sae(broken, blocks))
    assert sentence.startswith("likely a transposed matrix: ")
    assert sentence.endswith(f"with {' and '.join(names)} taken for stored the other way round")


@pytest.mark.parametrize("names", [["W_enc"], ["W_dec"], ["W_enc", "W_dec"]])
def test_square_matrices_transposed(names: list[str]) -> None:
    """As many features as inputs, so that no shape gives the mistake away."""
    g = torch.Generator().manual_seed(1)
    words_FD = torch.linalg.qr(torch.randn(24, 24, generator=g)).Q
    acts_NF = torch.rand(200, 24, generator=g) * (torch.rand(200, 24, generator=g) < 0.2)
    good = SAE("relu", words_FD.T, torch.zeros(24), words_FD, torch.ones(24), META)
    h_ND = acts_NF @ words_FD + 1
    assert check_sae(good, h_ND).findings == ()
    turned = {"W_enc": {"W_enc_DF": words_FD}, "W_dec": {"W_dec_FD": words_FD.T}}
    broken = replace(good, **{field: matrix for name in names for field, matrix in turned[name].items()})
    sentence = only(check_sae(broken, h_ND))
    assert sentence.startswith("likely a transposed matrix: ")
    assert f"with {' and '.join(names)} taken" in sentence


def test_turned_matrices_are_made_one_after_the_other(sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SAE] = []
    monkeypatch.setattr(check, "replace", lambda of, **changes: made.append(replace(of, **changes)) or made[-1])
    h_ND = torch.randn(5, sae.d_model)
    assert [len(made) for _ in check._matrix_readings(sae, h_ND)] == [1, 2, 3]


def test_a_decoder_in_another_order(sae: SAE, blocks: dict[int, Tensor]) -> None:
    """No reading undoes it, but encoder and decoder have nothing to do with each other."""
    order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(0))
    sentence = only(check_sae(replace(sae, W_dec_FD=sae.W_dec_FD[order]), blocks))
    assert sentence.startswith("likely a transposed matrix: the SAE fits badly")
    assert "encoder and decoder are unrelated" in sentence


def test_a_dropped_bias(sae: SAE, blocks: dict[int, Tensor]) -> None:
    sentence = only(check_sae(replace(sae, b_dec_D=torch.zeros_like(sae.b_dec_D)), blocks))
    assert sentence.startswith("likely a missing b_dec: the SAE fits better (FVU 0.01")


@pytest.mark.parametrize("right", [True, False])
def test_a_bias_used_wrongly(sae: SAE, blocks: dict[int, Tensor], right: bool) -> None:
    """`right` is how the SAE was trained. That of one trained without the subtraction: its b_enc makes up for it."""
    b_enc_F = sae.b_enc_F if right else sae.b_enc_F - sae.b_dec_D @ sae.W_enc_DF
    trained = replace(sae, b_enc_F=b_enc_F, apply_b_dec_to_input=right)
    assert check_sae(trained, blocks).findings == ()
    sentence = only(check_sae(replace(trained, apply_b_dec_to_input=not right), blocks))
    assert sentence.startswith("likely a wrong use of b_dec: ")
    assert f"with b_dec {'' if right else 'not '}subtracted from the input" in sentence


def test_a_silent_sae(sae: SAE, blocks: dict[int, Tensor]) -> None:
    sentence = only(check_sae(replace(sae, b_enc_F=torch.full_like(sae.b_enc_F, -1e9)), blocks))
    assert sentence == "likely a dead SAE: 0 features fire a token, and no more at 1024 times the scale"


def test_an_sae_that_is_silent_for_want_of_scale_is_not_called_dead(sae: SAE, responses: list[Response]) -> None:
    """Of another model, whose residuals are a hundred times smaller than its thresholds."""
    jump = replace(sae, architecture="jumprelu", k=None, threshold_F=torch.full((sae.d_sae,), 100.0))
    check = check_sae(jump, states_of(other_model(1.0), responses))
    assert check.l0 == 0
    assert only(check).startswith("likely a wrong base model: ")


def test_an_sae_that_only_falls_silent_at_a_large_scale_is_not_called_dead() -> None:
    """Features that fire by their bias and against the input."""
    sae = SAE(
        "relu", -torch.eye(2), torch.full((2,), 50.0), torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.ones(2), META
    )
    check = check_sae(sae, 5 * torch.rand(100, 2, generator=torch.Generator().manual_seed(0)) + 1)
    assert check.l0 == 2
    assert only(check).startswith("likely a wrong layer or a wrong base model: ")


def test_the_fvu_that_is_named_is_that_of_all_tokens(sae: SAE, blocks: dict[int, Tensor]) -> None:
    """Other readings are tried on every third of 714 tokens and set in relation to the plain reading of the same."""
    h_ND, flipped = blocks[LAYER], replace(sae, apply_b_dec_to_input=False)
    assert len(h_ND) == 714
    want = sae.fvu(h_ND[::3]) / flipped.fvu(h_ND[::3]) * flipped.fvu(h_ND)
    sentence = only(check_sae(flipped, blocks))
    assert f"(FVU {want:.3g} against {flipped.fvu(h_ND):.3g})" in sentence
    assert f"{want:.3g}" != f"{sae.fvu(h_ND[::3]):.3g}"


def test_mostly_dead_features() -> None:
    """2 inputs, 60 features, of which 56 can never fire; 100 tokens with 2 active features each are 3.3 chances each,
    1,000 tokens are 33."""
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    words_FD = torch.cat([directions, torch.ones(56, 2)])
    b_enc_F = torch.cat([torch.zeros(4), torch.full((56,), -1e4)])
    sae = SAE("relu", words_FD.T, b_enc_F, words_FD, torch.zeros(2), META)
    h_ND = torch.randn(1000, 2)
    assert check_sae(sae, h_ND[:100]).findings == ()
    sentence = only(check_sae(sae, h_ND))
    assert sentence == (
        "likely a dead SAE: 93.3% of the features never fire on 1000 tokens, though each had 33 chances on average"
    )


def test_a_coarse_sae_is_not_accused(sae: SAE, blocks: dict[int, Tensor]) -> None:
    """With k cut to 4 it explains less, but no mistake would explain that."""
    check = check_sae(replace(sae, k=4), blocks)
    assert 0.1 < check.fvu < 0.5
    assert check.findings == ()


# --- bad input ---------------------------------------------------------------------------------------------------


def test_bad_residuals(sae: SAE, blocks: dict[int, Tensor]) -> None:
    h_ND = blocks[LAYER]
    with pytest.raises(InputError, match=r"h: the SAE reads block 2, whose residuals are not .* given \(0, 1\)"):
        check_sae(sae, {0: h_ND, 1: h_ND})
    with pytest.raises(InputError, match="the SAE reads width 128 but the residuals have width 127"):
        check_sae(sae, h_ND[:, 1:])
    with pytest.raises(InputError, match="the SAE reads width 128 but the residuals have width 4"):
        check_sae(sae, {2: h_ND, 3: h_ND[:, :4]})
    with pytest.raises(InputError, match="h: residuals hold NaN or infinity"):
        check_sae(sae, torch.cat([h_ND, torch.full((1, 128), torch.nan)]))
    with pytest.raises(InputError, match="needs at least two different tokens"):
        check_sae(sae, h_ND[:1].expand(5, -1))
    with pytest.raises(InputError, match="needs at least two different tokens; these 0"):
        check_sae(sae, h_ND[:0])


def test_norm_outliers_is_the_rule_of_the_check(blocks: dict[int, Tensor]) -> None:
    """The bundled model has no massive tokens: what `test_massive_tokens_are_left_out` adds is all that goes."""
    h_ND = blocks[LAYER]
    assert norm_outliers(h_ND[None], torch.ones(1, len(h_ND), dtype=torch.bool)).all()
