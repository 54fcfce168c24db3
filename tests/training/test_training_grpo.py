"""The dense trainer against stock TRL, an independent forward, and naive loops, on tiny random models."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from trl import GRPOTrainer

from mechreward.errors import InputError
from mechreward.integrations.trl_grpo import MechRewardGRPOTrainer as AtTheSeedsPath
from mechreward.reward import CompositeReward, FeatureReward, LinearAnnealSchedule, OutcomeReward, stage3_advantages
from mechreward.sae import SAE
from mechreward.training import DenseConfig, MechRewardGRPOTrainer

LAYER, GROUP = 1, 4
PROMPTS = ["12+3=", "a", "what is 7?", "xy"]
WEIGHTS = {3: 1.0, 7: -0.5, 11: 2.0, 40: 1.0, 60: -1.5}


def even_tokens(completion_ids, **_) -> list[float]:
    return [sum(1.0 for token in ids if token % 2 == 0) / len(ids) for ids in completion_ids]


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_broadcast_advantages_train_bit_for_bit_like_stock_trl(
    loss_type, tmp_path, model, sae, char_tokenizer, make
) -> None:
    start, config = weights_of(model), {"loss_type": loss_type}
    flat = FeatureReward({3: 0.0}, sae)  # always 0: the dense part vanishes, the shape [B, T] stays
    stock = make(tmp_path, copy.deepcopy(model), even_tokens, char_tokenizer, config=config, stock=True)
    stock.train()
    ours = make(tmp_path, copy.deepcopy(model), [flat, even_tokens], char_tokenizer, config=config)
    ours.train()
    assert ours.seen["advantages"].shape == ours.seen["completion_ids"].shape
    assert ours.seen["advantages"].count_nonzero() > 0
    trained = weights_of(ours.model)
    assert all(torch.equal(trained[name], value) for name, value in weights_of(stock.model).items())
    assert not all(torch.equal(trained[name], value) for name, value in start.items())


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_one_hot_advantage_gives_exactly_that_tokens_gradient(
    loss_type, tmp_path, model, sae, char_tokenizer, make, score
) -> None:
    trainer = make(tmp_path, model, [FeatureReward(WEIGHTS, sae)], char_tokenizer, config={"loss_type": loss_type})
    out = score(trainer)
    row = int(out["completion_mask"].sum(1).argmax())
    token = 1
    out["advantages"] = torch.zeros_like(out["advantages"])
    out["advantages"][row, token] = 1.0
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    model.zero_grad()
    trainer._compute_loss(trainer.model, out).backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    # Independently: the token's log-probability from a plain forward over the unpadded row.
    prompt = out["prompt_ids"][row][out["prompt_mask"][row].bool()]
    length = int(out["completion_mask"][row].sum())
    ids = torch.cat([prompt, out["completion_ids"][row, :length]])
    reference = copy.deepcopy(model)
    reference.zero_grad()
    hidden = reference.get_decoder()(ids[None]).last_hidden_state
    logps = reference.lm_head(hidden)[0].log_softmax(dim=-1)
    place = len(prompt) + token
    if loss_type == "grpo":
        divisor = len(out["advantages"]) * length * trainer.args.steps_per_generation
    else:
        divisor = int(out["completion_mask"].sum())
    (-logps[place - 1, ids[place]] / divisor).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=2e-7, rtol=1e-3)


def token_by_token(model, sae: SAE, prompt: list[int], completion: list[int]) -> list[float]:
    rewards = []
    for t in range(len(completion)):
        with torch.no_grad():
            states = model(torch.tensor([prompt + completion[: t + 1]]), output_hidden_states=True).hidden_states
        acts = sae.encode(states[LAYER + 1][0, -1])
        rewards.append(sum(weight * acts[i].item() for i, weight in WEIGHTS.items()))
    return rewards


def naive_dense(rewards: list[list[float]], outcome: list[float], share: float) -> list[list[float]]:
    """Per-token credit by plain loops over unmasked tokens only."""
    centred: list[list[float]] = []
    for start in range(0, len(rewards), GROUP):
        group = rewards[start : start + GROUP]
        means = [sum(row) / len(row) for row in group if row]
        centred += [[value - sum(means) / len(means) for value in row] for row in group]
    squares = [sum(v * v for v in row) / len(row) for row in centred if row]
    rms = (sum(squares) / len(squares)) ** 0.5
    spread = [
        a
        for start in range(0, len(outcome), GROUP)
        for a in outcome[start : start + GROUP]
        if len(set(outcome[start : start + GROUP])) > 1
    ]
    outcome_rms = (sum(a * a for a in spread) / len(spread)) ** 0.5 if spread else 1.0
    return [[a + share * outcome_rms / rms * v for v in row] for a, row in zip(outcome, centred, strict=True)]


@pytest.mark.parametrize("tools", [False, True])
def test_advantages_against_an_independent_forward_and_naive_loops(
    tools, tmp_path, model, sae, char_tokenizer, monkeypatch, make, score
) -> None:
    kept, original = {}, GRPOTrainer._generate_and_score_completions

    def stock(self, inputs):
        out = original(self, inputs)
        kept["outcome"] = out["advantages"].clone()
        if tools:  # the second token of every row came from a tool
            out["tool_mask"] = torch.ones_like(out["completion_mask"])
            out["tool_mask"][:, 1] = 0
        return out

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", stock)
    rollouts = []
    trainer = make(
        tmp_path,
        model,
        [FeatureReward(WEIGHTS, sae), even_tokens],
        char_tokenizer,
        dense=DenseConfig(weight=0.3, sample_rollouts=8, read_batch_size=3),
        on_rollouts=rollouts.append,
    )
    out = score(trainer)
    lengths = out["completion_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1 and len(set(out["prompt_mask"].sum(1).tolist())) > 1  # ragged on both sides
    ended = [out["completion_ids"][row, n - 1].item() in trainer.eos_token_ids for row, n in enumerate(lengths)]
    assert True in ended and False in ended
    model.eval()
    expected, counted = [], []
    for row, n in enumerate(lengths):
        prompt = out["prompt_ids"][row][out["prompt_mask"][row].bool()].tolist()
        values = token_by_token(model, sae, prompt, out["completion_ids"][row, :n].tolist())
        expected.append(values)
        counted.append([t for t in range(n) if not (tools and t == 1)])
    assert [len(tokens) for tokens in rollouts[0].tokens] == lengths
    for row, values in enumerate(expected):
        trained = [value if t in counted[row] else 0.0 for t, value in enumerate(values)]
        assert rollouts[0].token_rewards[row] == pytest.approx(trained, rel=1e-3, abs=1e-3)
    dense = naive_dense(
        [[values[t] for t in places] for values, places in zip(expected, counted, strict=True)],
        kept["outcome"].tolist(),
        share=0.3,
    )
    for row, places in enumerate(counted):
        assert out["advantages"][row, places].tolist() == pytest.approx(dense[row], rel=1e-3, abs=1e-3)
        others = [t for t in range(out["advantages"].shape[1]) if t not in places]
        assert out["advantages"][row, others].count_nonzero() == 0
    metrics = trainer._metrics["train"]
    assert metrics["dense/advantage_rms"][-1] == pytest.approx(0.3 * metrics["dense/outcome_advantage_rms"][-1])
    assert metrics["dense/reader_seconds"][-1] > 0 and "rewards/feature_reward/mean" in metrics
    assert rollouts[0].step == 1 and rollouts[0].question_ids == PROMPTS[:1] * 4 + PROMPTS[1:2] * 4
    assert rollouts[0].outcomes[0] == pytest.approx(even_tokens([out["completion_ids"][0, : lengths[0]].tolist()])[0])


def test_rows_masked_as_truncated_are_left_alone(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    config = {"mask_truncated_completions": True}
    trainer = make(tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer, config=config)
    out = score(trainer)
    empty = out["completion_mask"].sum(1) == 0
    assert empty.any() and not empty.all()
    assert out["advantages"][empty].count_nonzero() == 0 and out["advantages"].isfinite().all()
    assert out["advantages"][~empty].count_nonzero() > 0


@pytest.mark.parametrize("credit", ["return_to_go", "potential", "step", "trajectory"])
def test_every_credit_mode_runs_and_differs_from_myopic(
    credit, tmp_path, model, sae, char_tokenizer, make, score
) -> None:
    rewards = [FeatureReward(WEIGHTS, sae), even_tokens]
    advantages = []
    for mode in ("per_token", credit):
        dense = DenseConfig(weight=0.5, credit=mode, gamma=0.9, step_end="e")
        trainer = make(tmp_path, copy.deepcopy(model), rewards, char_tokenizer, dense=dense)
        advantages.append(score(trainer)["advantages"])
    assert advantages[0].shape == advantages[1].shape and not torch.allclose(*advantages)


def test_step_ends_are_found_by_the_tokens_text(tmp_path, model, sae, char_tokenizer, make) -> None:
    dense = DenseConfig(credit="step", step_end="+")
    trainer = make(tmp_path, model, [FeatureReward(WEIGHTS, sae)], char_tokenizer, dense=dense)
    ids = torch.tensor([char_tokenizer("1+2+7", add_special_tokens=False)["input_ids"]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    ends = trainer._step_ends({"completion_ids": ids, "completion_mask": mask})
    assert ends.tolist() == [[False, True, False, True, False]]


def test_stage3_is_the_seeds_own_formula(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    reward, rollouts = FeatureReward(WEIGHTS, sae), []
    dense = DenseConfig(weight=0.2, credit="stage3", sample_rollouts=8)
    trainer = make(tmp_path, model, [reward, even_tokens], char_tokenizer, dense=dense, on_rollouts=rollouts.append)
    out = score(trainer)
    mask_BT = out["completion_mask"].bool()
    reward_BT = torch.zeros(mask_BT.shape)
    for row, values in enumerate(rollouts[0].token_rewards):
        reward_BT[row, : len(values)] = torch.tensor(values)
    outcome_B = torch.tensor(rollouts[0].outcomes)
    lengths_B = out["prompt_mask"].sum(1)
    expected = stage3_advantages(outcome_B, reward_BT, mask_BT, lengths_B, GROUP, 0.2)
    torch.testing.assert_close(out["advantages"], expected.total_BT, rtol=1e-4, atol=1e-5)
    # Without an outcome the trajectory term is that of the features alone.
    trainer = make(tmp_path, model, [reward], char_tokenizer, dense=dense)
    out = score(trainer)
    alone_BT = trainer._read(out, "train")[0]
    lengths_B = out["prompt_mask"].sum(1)
    expected = stage3_advantages(torch.zeros(8), alone_BT, out["completion_mask"].bool(), lengths_B, GROUP, 0.2)
    assert expected.outcome_rms > 0.1
    torch.testing.assert_close(out["advantages"], expected.total_BT, rtol=1e-4, atol=1e-4)


def test_stage3_leaves_out_a_row_without_an_outcome(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    def unjudged(completion_ids, **_) -> list[float | None]:
        return [None if row == 5 else score for row, score in enumerate(even_tokens(completion_ids))]

    rewards, rollouts = [FeatureReward(WEIGHTS, sae), unjudged], []
    dense = DenseConfig(weight=0.2, credit="stage3", sample_rollouts=8)
    trainer = make(tmp_path, model, rewards, char_tokenizer, dense=dense, on_rollouts=rollouts.append)
    out = score(trainer)
    reward_BT, lengths_B = trainer._read(out, "train")[0], out["prompt_mask"].sum(1)
    assert rollouts[0].outcomes[5] is None
    outcome_B = torch.tensor([float("nan") if value is None else value for value in rollouts[0].outcomes])
    expected = stage3_advantages(outcome_B, reward_BT, out["completion_mask"].bool(), lengths_B, GROUP, 0.2)
    torch.testing.assert_close(out["advantages"], expected.total_BT, rtol=1e-4, atol=1e-4)


def test_outcomes_are_those_of_each_reward_whatever_its_name(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    right, wrong = OutcomeReward(lambda _p, _c: True), OutcomeReward(lambda _p, _c: False)
    assert right.__name__ == wrong.__name__
    rollouts, dense = [], DenseConfig(weight=0.2, credit="stage3", sample_rollouts=8)
    rewards = [FeatureReward(WEIGHTS, sae), right, wrong]
    trainer = make(tmp_path, model, rewards, char_tokenizer, dense=dense, on_rollouts=rollouts.append)
    score(trainer)
    assert rollouts[0].outcomes == [1.0] * 8


def test_stage3_evaluates_more_rows_than_a_training_batch_has(tmp_path, model, sae, char_tokenizer, make) -> None:
    config = {"gradient_accumulation_steps": 1, "per_device_eval_batch_size": 8}
    rewards, dense = [FeatureReward(WEIGHTS, sae), even_tokens], DenseConfig(credit="stage3", gap_every=0)
    trainer = make(tmp_path, model, rewards, char_tokenizer, dense=dense, config=config)
    assert trainer.args.generation_batch_size == 4
    assert "eval_dense/share" in trainer.evaluate(trainer.train_dataset)


def test_lambda_follows_its_schedule(tmp_path, model, sae, char_tokenizer, make) -> None:
    dense = DenseConfig(weight=LinearAnnealSchedule(0.4, 0.0))
    config = {"max_steps": 4, "learning_rate": 0.0}
    trainer = make(
        tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer, config=config, dense=dense
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "dense/advantage_rms" in row]
    shares = [row["dense/advantage_rms"] / row["dense/outcome_advantage_rms"] for row in logs]
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1], rel=1e-3)


def test_dense_alone_trains_through_a_named_placeholder(tmp_path, model, sae, char_tokenizer, make) -> None:
    rollouts, start = [], weights_of(model)
    trainer = make(tmp_path, model, FeatureReward(WEIGHTS, sae), char_tokenizer, on_rollouts=rollouts.append)
    assert trainer.reward_func_names == ["no_outcome"] and trainer.dense_share == 0.1
    trainer.train()
    assert rollouts[0].outcomes == [None, None] and [r.step for r in rollouts] == [1, 2]
    assert not all(torch.equal(start[name], value) for name, value in weights_of(model).items())


@pytest.mark.parametrize("rewards", [[], None])
def test_no_rewards_at_all_are_trls_error(rewards, tmp_path, model, char_tokenizer, make) -> None:
    with pytest.raises(ValueError, match="No reward source"):
        make(tmp_path, model, rewards, char_tokenizer)


def test_a_composite_becomes_dense_and_scalar(tmp_path, model, sae, char_tokenizer, make) -> None:
    reward = FeatureReward(WEIGHTS, sae, aggregation="per_token")
    composite = CompositeReward([reward, even_tokens], weights=[0.2, 2.0])
    trainer = make(tmp_path, model, composite, char_tokenizer)
    assert trainer.reward_func_names == ["even_tokens"] and trainer.reward_weights.tolist() == [2.0]
    assert trainer.dense_share == pytest.approx(0.1)
    config = {"reward_weights": [0.5, 4.0]}
    trainer = make(tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer, config=config)
    assert trainer.reward_weights.tolist() == [4.0] and trainer.dense_share == 0.125
    assert AtTheSeedsPath is MechRewardGRPOTrainer


def test_weight_zero_only_watches(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    dense = DenseConfig(weight=0.0)
    trainer = make(tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer, dense=dense)
    assert score(trainer)["advantages"].dim() == 1
    assert trainer._metrics["train"]["rewards/feature_reward/std"][-1] > 0


def test_evaluation_has_groups_of_its_own_size(tmp_path, model, sae, char_tokenizer, make) -> None:
    rewards, config = [FeatureReward(WEIGHTS, sae), even_tokens], {"num_generations_eval": 2}
    trainer = make(tmp_path, model, rewards, char_tokenizer, config=config, dense=DenseConfig(credit="trajectory"))
    trainer.model.eval()
    batch = [{"prompt": prompt, "question_id": prompt} for prompt in PROMPTS for _ in range(2)]
    out = trainer._generate_and_score_completions(batch)
    outcome_B = torch.tensor(list(trainer._logs["advantages"])[-8:])
    first_B = out["advantages"][:, 0] - outcome_B
    pairs = first_B.view(4, 2).sum(dim=1)  # centred within its group of two, each pair sums to 0
    assert pairs.abs().max() < 1e-5 < 1e-3 < first_B.abs().max()
    assert "MechRewardDense" not in trainer.state.stateful_callbacks, "evaluation leaves the carried RMS alone"


def test_a_token_counts_that_every_reward_can_read(tmp_path, model, sae, sae_of_layer, char_tokenizer, make) -> None:
    rewards = [FeatureReward(WEIGHTS, sae), FeatureReward(WEIGHTS, sae_of_layer(2)), even_tokens]
    trainer = make(tmp_path, model, rewards, char_tokenizer, config={"reward_weights": [2.0, -1.0, 1.0]})
    one = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[True, True, False]])
    two = torch.tensor([[5.0, 0.0, 7.0]]), torch.tensor([[True, False, True]])
    total_BT, readable_BT = trainer._sum([one, two])
    assert total_BT.tolist() == [[-3.0, 4.0, -7.0]] and readable_BT.tolist() == [[True, False, False]]


def test_rewards_of_one_sae_share_it(tmp_path, model, sae, sae_of_layer, char_tokenizer, make) -> None:
    rewards = [FeatureReward(WEIGHTS, sae), FeatureReward({3: 1.0}, sae), FeatureReward(WEIGHTS, sae_of_layer(2))]
    make(tmp_path, model, rewards, char_tokenizer)
    assert rewards[0].sae is rewards[1].sae is not rewards[2].sae


LORA = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_frozen_reader_reads_the_starting_model(peft_config, tmp_path, model, sae, char_tokenizer, make) -> None:
    base, prompt, completion = copy.deepcopy(model), [5, 6, 7], [8, 9, 10, 11]
    expected = token_by_token(base, sae, prompt, completion)
    reads = {}
    for reader in ("frozen", "policy"):
        trainer = make(
            tmp_path,
            copy.deepcopy(model),
            [FeatureReward(WEIGHTS, sae)],
            char_tokenizer,
            peft_config=peft_config,
            dense=DenseConfig(reader=reader),
        )
        learning = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name in learning:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        trainer.model.train()
        batch = {
            "prompt_ids": torch.tensor([prompt]),
            "prompt_mask": torch.ones(1, 3).long(),
            "completion_ids": torch.tensor([completion]),
            "completion_mask": torch.ones(1, 4).long(),
        }
        reads[reader] = trainer._read(batch, "train")[0][0].tolist()
        assert [name for name, p in trainer.model.named_parameters() if p.requires_grad] == learning
        assert all(module.training for module in trainer.model.modules())
    assert reads["frozen"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert reads["policy"] != pytest.approx(expected, rel=1e-2, abs=1e-2)


def test_plain_grpo_trainer_takes_the_composite(tmp_path, model, sae, char_tokenizer, make) -> None:
    reward = FeatureReward(WEIGHTS, sae).bind(copy.deepcopy(model), char_tokenizer)
    right = OutcomeReward(lambda _prompt, completion: len(completion) % 2 == 0)
    composite = CompositeReward([reward, right], weights=[0.1, 1.0])
    start = weights_of(model)
    trainer = make(tmp_path, model, composite, char_tokenizer, config={"max_steps": 1}, stock=True)
    trainer.train()
    logs = trainer.state.log_history[0]
    parts = logs["composite_reward/feature_reward/mean"], logs["composite_reward/outcome_reward/mean"]
    assert logs["rewards/composite_reward/mean"] == pytest.approx(0.1 * parts[0] + parts[1], rel=1e-4)
    assert parts[0] != 0 and not all(torch.equal(start[name], value) for name, value in weights_of(model).items())


def test_no_gate_warns_and_a_model_that_does_not_fit_is_named(
    tmp_path, model, sae, char_tokenizer, caplog, make
) -> None:
    make(tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer)
    assert sum("carries no passed gate" in record.message for record in caplog.records) == 1
    small = SAE(
        architecture="relu",
        W_enc_DF=torch.eye(3),
        b_enc_F=torch.zeros(3),
        W_dec_FD=torch.eye(3),
        b_dec_D=torch.zeros(3),
        meta=sae.meta,
    )
    with pytest.raises(InputError, match="its residual width is 32, but the SAE reads 3"):
        make(tmp_path, model, [FeatureReward({0: 1.0}, small)], char_tokenizer)
