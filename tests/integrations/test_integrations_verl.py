"""verl's own pieces with ours in them; run where verl is installed (CONTRIBUTING.md says how), skipped elsewhere."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("verl")

from hydra import compose, initialize_config_module
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils.dataset.rl_dataset import RLHFDataset

from mechreward.errors import InputError
from mechreward.integrations.protocol import Row
from mechreward.integrations.scorer import Scorer
from mechreward.integrations.server import create_app
from mechreward.integrations.token_scores import UNIT, pack_row
from mechreward.integrations.verl import MechRewardAgentLoop
from mechreward.integrations.verl_advantage import Estimator
from mechreward.reward import FeatureReward, dense_advantages, token_credit
from mechreward.verifiers import gsm8k_exact_match


@pytest.fixture
def scorer(sae_of_layer, tiny_llama, char_tokenizer) -> Scorer:
    reward = FeatureReward({3: 1.0, 7: -0.5}, sae_of_layer(1))
    return Scorer(reward, tiny_llama, char_tokenizer, verifier=gsm8k_exact_match)


@pytest.fixture
def config():
    manager = ["source=importlib", "name=MechRewardManager", "module.path=pkg://mechreward.integrations.verl"]
    options = [f"reward.reward_manager.{option}" for option in manager]
    options += ["algorithm.adv_estimator=mechreward", "algorithm.norm_adv_by_std_in_grpo=false"]
    options += ["+algorithm.mechreward.weight=0.5", "+algorithm.mechreward.credit=per_token"]
    options += ["actor_rollout_ref.rollout.response_length=6"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=options)


def rows_of(tokenizer, *completions: str) -> tuple[list[int], list[list[int]]]:
    prompt = tokenizer("2+2=")["input_ids"]
    return prompt, [[*tokenizer(text, add_special_tokens=False)["input_ids"], 1] for text in completions]


def test_the_reward_manager_sends_the_ids_without_pads(config, scorer, char_tokenizer, serve, monkeypatch) -> None:
    monkeypatch.setenv("MECHREWARD_URL", serve(create_app(scorer)))
    manager = load_reward_manager(config, char_tokenizer)
    prompt, completions = rows_of(char_tokenizer, "#### 4", "#### 5 or")
    width = max(map(len, completions))
    batch = TensorDict(
        {
            "prompts": torch.tensor([[2, 2, *prompt]] * 2),  # verl pads prompts on the left, responses on the right
            "responses": torch.tensor([[*ids, *[2] * (width - len(ids))] for ids in completions]),
            "attention_mask": torch.tensor(
                [[0, 0, *[1] * (len(prompt) + len(ids)), *[0] * (width - len(ids))] for ids in completions]
            ),
        },
        batch_size=2,
    )
    golds = np.array([{"ground_truth": "4", "style": "rule"}] * 2, dtype=object)
    data = DataProto(batch=batch, non_tensor_batch={"reward_model": golds, "data_source": np.array(["gsm8k"] * 2)})
    expected = scorer.score(
        scorer.read([Row(prompt_ids=prompt, completion_ids=ids, answer="4") for ids in completions])
    )
    assert [score.outcome for score in expected] == [1.0, 0.0]
    for place, score in enumerate(expected):
        found = asyncio.run(manager.run_single(data[place : place + 1]))
        assert found["reward_score"] == pytest.approx(score.score, abs=1e-5)
        assert found["reward_extra_info"]["acc"] == score.outcome
        assert found["reward_extra_info"]["mechreward"] == pytest.approx(score.features, abs=1e-5)


class Engine:
    """In the place of verl's inference servers: answers every prompt with the same tokens."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.prompt_ids = ids, None

    async def generate(self, prompt_ids: list[int], **_: object) -> SimpleNamespace:
        self.prompt_ids = prompt_ids
        logs = [-0.5] * len(self.ids)
        return SimpleNamespace(
            token_ids=self.ids, log_probs=logs, num_preempted=0, routed_experts=None, extra_fields={"seen": 1}
        )


def looped(config, tokenizer, ids: list[int], answer: str):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    engine = Engine(ids)

    async def run():
        loop = MechRewardAgentLoop(
            trainer_config=DictConfigWrap(config),
            server_manager=engine,
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=RLHFDataset,
            data_config=DictConfigWrap(config.data),
        )
        messages = [{"role": "user", "content": "2+2"}]
        return await loop.run({}, raw_prompt=messages, reward_model={"ground_truth": answer})

    return asyncio.run(run()), engine


@pytest.mark.parametrize("answer,outcome", [("4", 1.0), ("5", 0.0)])
def test_the_agent_loop_lays_out_a_reward_a_token(
    answer, outcome, config, scorer, char_tokenizer, serve, monkeypatch
) -> None:
    monkeypatch.setenv("MECHREWARD_URL", serve(create_app(scorer)))
    _, [ids] = rows_of(char_tokenizer, "#### 4")
    config.actor_rollout_ref.rollout.response_length = len(ids)
    output, engine = looped(config, char_tokenizer, ids, answer)
    assert output.response_ids == ids and output.prompt_ids == engine.prompt_ids
    [score] = scorer.score(scorer.read([Row(prompt_ids=engine.prompt_ids, completion_ids=ids, answer=answer)]))
    row = output.as_dict()
    assert score.outcome == outcome and "token_rewards" not in row and "reward_score" not in row
    assert (row["rm_scores"][:-1] / UNIT).tolist() == pytest.approx(score.token_rewards[:-1], abs=1e-5)
    assert row["rm_scores"][-1] == outcome and row["rm_scores"].sum() == pytest.approx(outcome, abs=1e-3)
    assert row["responses"].tolist() == ids and row["rollout_log_probs"].tolist() == [-0.5] * len(ids)
    assert row["extra_fields"]["seen"] == 1 and row["extra_fields"]["reward_extra_info"]["acc"] == outcome


def test_an_answer_that_was_cut_is_scored_as_it_was_cut(config, scorer, char_tokenizer, serve, monkeypatch) -> None:
    monkeypatch.setenv("MECHREWARD_URL", serve(create_app(scorer)))
    _, [ids] = rows_of(char_tokenizer, "#### 4 and so on")
    output, _ = looped(config, char_tokenizer, ids, "4")
    assert output.response_ids == ids[:6] and output.as_dict()["rm_scores"].shape == (6,)


def test_dense_training_needs_a_verifier(config, scorer, char_tokenizer, serve, monkeypatch) -> None:
    silent = Scorer(scorer.reward, scorer._model, char_tokenizer)
    monkeypatch.setenv("MECHREWARD_URL", serve(create_app(silent)))
    with pytest.raises(InputError, match="^verifier: the server judges no answers"):
        looped(config, char_tokenizer, [5, 6], "4")


def batch_of(rows: list[tuple[float, list[float | None]]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores_BT, mask_BT = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.long)
    for place, (outcome, values) in enumerate(rows):
        scores_BT[place, : len(values)] = pack_row(outcome, values, [1] * len(values))
        mask_BT[place, : len(values)] = 1
    return scores_BT, mask_BT


ROWS = [(1.0, [0.5, 2.0, 9.0]), (0.0, [1.0, 9.0]), (0.0, [0.0, None, -1.0, 9.0]), (1.0, [3.0, 0.25, 9.0])]
UID = np.array(["b", "a", "b", "a"], dtype=object)


@pytest.mark.parametrize("credit", ["per_token", "return_to_go", "potential", "trajectory"])
def test_advantages_through_verl(credit, config) -> None:
    config.algorithm.mechreward.credit, config.algorithm.gamma = credit, 0.9
    scores_BT, mask_BT = batch_of(ROWS, 5)
    data = DataProto.from_dict({"token_level_rewards": scores_BT, "response_mask": mask_BT}, non_tensors={"uid": UID})
    found_BT = compute_advantage(data, "mechreward", config=config.algorithm).batch["advantages"]
    order = [1, 3, 0, 2]  # group a, then group b
    reward_BT = torch.tensor([[1.0, 0, 0, 0, 0], [3.0, 0.25, 0, 0, 0], [0.5, 2.0, 0, 0, 0], [0.0, 0, -1.0, 0, 0]])
    has_BT = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]).bool()
    outcome_B = torch.tensor([-0.5, 0.5, 0.5, -0.5])
    credit_BT = token_credit(reward_BT, has_BT, credit, 0.9)
    expected = dense_advantages(outcome_B, credit_BT, has_BT, mask_BT[order].bool(), 2, 0.5)
    assert expected.dense_BT.abs().max() > 0.05
    torch.testing.assert_close(found_BT[order], expected.total_BT, atol=1e-6, rtol=1e-5)
    assert (found_BT[mask_BT == 0] == 0).all() and found_BT[0, 2] == 0.5  # the last token has the outcome's alone


def test_without_weight_it_is_verls_grpo(config) -> None:
    scores_BT, mask_BT = batch_of(ROWS, 4)
    for by_std in (True, False):
        config.algorithm.norm_adv_by_std_in_grpo, config.algorithm.mechreward.weight = by_std, 0.0
        found_BT, returns_BT = Estimator()(scores_BT, mask_BT, config.algorithm, UID)
        outcomes_BT = torch.zeros(4, 4)
        outcomes_BT[:, 0] = torch.tensor([1.0, 0.0, 0.0, 1.0])
        stock_BT, _ = compute_grpo_outcome_advantage(outcomes_BT, mask_BT, UID, norm_adv_by_std_in_grpo=by_std)
        torch.testing.assert_close(found_BT, stock_BT)
        assert torch.equal(found_BT, returns_BT)


def test_a_batch_without_spread_is_scaled_as_the_one_before(config) -> None:
    estimator, even = Estimator(), [(1.0, values) for _, values in ROWS]
    config.algorithm.norm_adv_by_std_in_grpo = False
    first_BT, mask_BT = estimator(*batch_of(even, 4), config.algorithm, UID)[0], batch_of(even, 4)[1].bool()
    estimator(*batch_of(ROWS, 4), config.algorithm, UID)
    second_BT = estimator(*batch_of(even, 4), config.algorithm, UID)[0]
    assert first_BT[mask_BT].abs().max() > 0.1
    torch.testing.assert_close(second_BT, first_BT * 0.5)  # outcomes of +-.5, where 1 is assumed at first


def test_bad_options_and_batches(config) -> None:
    scores_BT, mask_BT = batch_of(ROWS, 4)
    estimator = get_adv_estimator_fn("mechreward")
    for change, said in {
        "credit": ("stage3", "^mechreward.credit: 'stage3' is not one of"),
        "weight": (-1, "^mechreward.weight: -1 is not a number"),
        "lambda": (1, "^mechreward.lambda: there is no such option"),
    }.items():
        value, sentence = said
        options = {**config.algorithm, "mechreward": {change: value}}
        with pytest.raises(InputError, match=sentence):
            estimator(scores_BT, mask_BT, options, UID)
    with pytest.raises(InputError, match="^use_kl_in_reward"):
        estimator(scores_BT, mask_BT, {"use_kl_in_reward": True}, UID)
    with pytest.raises(InputError, match="^uid: groups have 1 to 3 rows"):
        estimator(scores_BT, mask_BT, config.algorithm, np.array(["a", "b", "b", "b"]))
    with pytest.raises(InputError, match="^uid: is missing"):
        estimator(scores_BT, mask_BT, config.algorithm)
