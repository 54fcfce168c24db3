"""A GRPO step in which TRL really calls a tool: its output is context, and neither paid nor counted."""

from __future__ import annotations

import copy

import pytest
import torch

from mechreward.models import find_blocks
from mechreward.reward import FeatureReward
from mechreward.training import DenseConfig

WEIGHTS = {3: 1.0, 7: -0.5, 11: 2.0, 40: 1.0, 60: -1.5}
GROUP, SHARE = 4, 0.3
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}#{{ m.content }}#{% else %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)
PROMPTS = [[{"role": "user", "content": text}] for text in ("12+3=", "a", "what is 7?", "xy")]


def total(a: int, b: int) -> str:
    """Adds two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return f"sum {a + b}"


def short_ones(completion_ids, **_) -> list[float]:
    return [1.0 / len(ids) for ids in completion_ids]


@pytest.fixture
def calling_tokenizer(char_tokenizer):
    """Reads a call of the tool out of every answer that begins with an even token."""
    tokenizer = copy.deepcopy(char_tokenizer)
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, {"made": "by the test"}

    def parse(ids, prefix=None, tools=None) -> dict:
        assert prefix and tools == [total]
        said = {"role": "assistant", "content": tokenizer.decode(ids)}
        call = {"type": "function", "function": {"name": "total", "arguments": {"a": ids[0], "b": len(ids)}}}
        return said if ids[0] % 2 else {**said, "tool_calls": [call]}

    tokenizer.parse_response = parse
    return tokenizer


@torch.no_grad()
def whole_forward(model, reward: FeatureReward, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    kept = []
    handle = find_blocks(model)[reward.layer].register_forward_hook(lambda _m, _i, output: kept.append(output))
    model.eval()(input_ids=torch.cat([prompt, completion])[None], use_cache=False)
    handle.remove()
    acts = reward.sae.encode(kept[0][0, len(prompt) :])
    return sum(weight * acts[:, i] for i, weight in WEIGHTS.items())


def by_loops(rewards: list[list[float]], outcome: list[float]) -> list[list[float]]:
    """Advantages of the policy's own tokens, which are all that is given."""
    centred = []
    for start in range(0, len(rewards), GROUP):
        group = rewards[start : start + GROUP]
        baseline = sum(sum(row) / len(row) for row in group) / GROUP
        centred += [[value - baseline for value in row] for row in group]
    rms = (sum(sum(v * v for v in row) / len(row) for row in centred) / len(centred)) ** 0.5
    outcome_rms = (sum(a * a for a in outcome) / len(outcome)) ** 0.5
    return [[a + SHARE * outcome_rms / rms * v for v in row] for a, row in zip(outcome, centred, strict=True)]


@pytest.mark.parametrize("iterations", [1, 2], ids=["forward", "tapped"])
def test_what_a_tool_says_is_context_only(iterations, tmp_path, model, sae, calling_tokenizer, make) -> None:
    start, reward, rollouts = copy.deepcopy(model), FeatureReward(WEIGHTS, sae), []
    trainer = make(
        tmp_path,
        model,
        [reward, short_ones],
        calling_tokenizer,
        prompts=PROMPTS,
        tools=[total],
        config={"max_completion_length": 40, "max_tool_calling_iterations": 1, "num_iterations": iterations},
        dense=DenseConfig(weight=SHARE, gap_every=0, sample_rollouts=8),
        on_rollouts=rollouts.append,
    )
    trainer.train()
    assert not all(torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True))
    # The first generation again, with the weights it was sampled from.
    trainer.model.load_state_dict(start.state_dict())
    trainer.model.train()
    batch = [{"prompt": prompt, "question_id": "q"} for prompt in PROMPTS[:2] for _ in range(GROUP)]
    out = trainer._generate_and_score_completions(batch)
    tool_BT = out["completion_mask"].bool() & ~out["tool_mask"].bool()
    called = tool_BT.any(dim=1)
    assert called.any() and not called.all(), "some rows call the tool and some do not"
    expected, places, texts = [], [], []
    for row in range(len(batch)):
        prompt = out["prompt_ids"][row][out["prompt_mask"][row].bool()]
        completion = out["completion_ids"][row][out["completion_mask"][row].bool()]
        mine = (~tool_BT[row, : len(completion)]).nonzero().flatten().tolist()
        values = whole_forward(start, reward, prompt, completion)
        expected.append(values[mine].tolist())
        places.append(mine)
        texts.append(calling_tokenizer.decode(completion[[t for t in range(len(completion)) if t not in mine]]))
        paid = torch.tensor(rollouts[-1].token_rewards[row])
        torch.testing.assert_close(paid[mine], values[mine], rtol=1e-4, atol=1e-4)
        assert paid[tool_BT[row, : len(completion)]].count_nonzero() == 0
    assert all(text.startswith("#sum ") and text.endswith("#:") for text, row in zip(texts, called, strict=True) if row)
    outcome = trainer._logs["advantages"]
    wanted = by_loops(expected, [outcome[i] for i in range(len(outcome) - 8, len(outcome))])
    for row, mine in enumerate(places):
        assert out["advantages"][row, mine].tolist() == pytest.approx(wanted[row], rel=1e-3, abs=1e-3)
        others = [t for t in range(out["advantages"].shape[1]) if t not in mine]
        assert out["advantages"][row, others].count_nonzero() == 0
    means = [sum(values) / len(values) for values in expected]
    assert trainer._metrics["train"]["rewards/feature_reward/mean"][-1] == pytest.approx(sum(means) / 8, rel=1e-3)
    assert rollouts[-1].feature_rewards == pytest.approx(means, rel=1e-3, abs=1e-3)


def test_a_rollout_function_may_mask_what_its_environment_says(tmp_path, model, sae, char_tokenizer, make) -> None:
    said = [5, 6, 7]

    def rollout(prompts, trainer) -> dict:
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        answers = [[*said, 8 + row, 9, *said, 20 - row, 1] for row in range(len(prompts))]
        masks = [[0, 0, 0, 1, 1, 0, 0, 0, 1, 1]] * len(prompts)
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None, "env_mask": masks}

    rewards = [FeatureReward(WEIGHTS, sae), lambda completions, **_: [float(i % 3) for i in range(len(completions))]]
    trainer = make(tmp_path, model, rewards, char_tokenizer, rollout_func=rollout, dense=DenseConfig(gap_every=0))
    trainer.train()
    mine = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 1, 1]).bool()
    assert trainer.seen["advantages"][:, ~mine].count_nonzero() == 0
    assert (trainer.seen["advantages"][:, mine] != 0).all()


class Game:
    """An environment that asks for itself, and leaves every fourth answer unpaid."""

    asked = paid = 0

    def reset(self, **_) -> str:
        Game.asked += 1
        return f"what is {Game.asked % 9}?"

    def get_reward(self) -> float | None:
        Game.paid += 1
        return float(Game.paid % 3) if Game.paid % 4 else None


def test_what_an_environment_asks_and_pays_is_what_is_kept(tmp_path, model, sae, calling_tokenizer, make) -> None:
    calling_tokenizer.parse_response = lambda ids, **_: {"role": "assistant", "content": calling_tokenizer.decode(ids)}
    rollouts = []
    trainer = make(
        tmp_path, model, [FeatureReward(WEIGHTS, sae)], calling_tokenizer, prompts=PROMPTS, environment_factory=Game,
        dense=DenseConfig(gap_every=0, sample_rollouts=8), on_rollouts=rollouts.append,
    )  # fmt: skip
    assert trainer.reward_func_names == ["Game"] and trainer.reward_weights.tolist() == [1.0]
    trainer.model.train()
    trainer._generate_and_score_completions([{} for _ in range(8)])  # such a dataset needs no prompts
    assert rollouts[0].outcomes == [1.0, 2.0, 0.0, None, 2.0, 0.0, 1.0, None]
    assert [prompt[-1]["content"] for prompt in rollouts[0].prompts] == [f"what is {i}?" for i in range(1, 9)]
    assert [trainer._logs["advantages"][row] for row in (3, 7)] == [0.0, 0.0]
