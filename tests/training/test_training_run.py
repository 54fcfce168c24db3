"""train_arm: a killed and resumed run is the run that was never killed, bit for bit; LoRA and full fine-tuning."""

from __future__ import annotations

import copy
import shutil

import pandas as pd
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, SchedulerType, TrainingArguments, get_scheduler
from trl import GRPOTrainer

from mechreward.config import ImproveConfig
from mechreward.errors import InputError
from mechreward.files import read_jsonl
from mechreward.models import LoadedModel
from mechreward.reward import FeatureReward, OutcomeReward
from mechreward.tasks import Question
from mechreward.training import DenseConfig, TrainConfig, last_checkpoint, run, train_arm
from mechreward.training.run import keep_reference, make_args, make_dataset

QUESTIONS = [Question(id=f"q{i}", prompt=f"{i}+{i}=", answer=str(2 * i)) for i in range(3)]
TIMES = {"step_time", "dense/reader_seconds", "dense/tap_difference"}
"""Not compared: seconds, and what each process measures on its first batch."""


class Killed(Exception):
    pass


def config(**options) -> TrainConfig:
    defaults = {
        "steps": 4,
        "questions_per_step": 2,
        "generations": 4,
        "micro_batch": 4,
        "max_new_tokens": 5,
        "learning_rate": 1e-2,
        "save_every": 2,
        "eval_every": 1,
    }
    return TrainConfig(**{**defaults, **options})


@pytest.fixture
def rewards(sae) -> list:
    def outcome(completion_ids, trainer_state, **_) -> list[float]:
        # A spread in the first two steps only: later steps need the RMS remembered across the checkpoint.
        if trainer_state.global_step >= 2:
            return [1.0] * len(completion_ids)
        return [float(ids[0] % 2) + 0.1 * (ids[-1] % 5) for ids in completion_ids]

    return [FeatureReward({3: 1.0, 7: -0.5, 11: 2.0}, sae), outcome]


def weights_of(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}


def comparable(path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_jsonl(path)]


@pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])
def test_killed_and_resumed_equals_uninterrupted(lora_rank, tmp_path, tiny_llama, char_tokenizer, rewards) -> None:
    setting = config(lora_rank=lora_rank)
    before = {name: value.clone() for name, value in tiny_llama.named_parameters()}

    def run(folder, evaluate) -> LoadedModel:
        return train_arm(
            LoadedModel(copy.deepcopy(tiny_llama), char_tokenizer, "tiny"),
            QUESTIONS,
            rewards,
            setting,
            folder / "checkpoints",
            dense=DenseConfig(weight=0.5, reader="frozen" if lora_rank else "policy"),
            metrics_path=folder / "metrics.jsonl",
            rollouts_path=folder / "rollouts.parquet",
            evaluate=evaluate,
        )

    seen: list[int] = []

    def watch(policy: LoadedModel, step: int) -> None:
        assert not policy.model.training
        torch.rand(7)  # an evaluation that draws must not change what is trained
        seen.append(step)

    def kill_at_three(_policy: LoadedModel, step: int) -> None:
        if step == 3:
            raise Killed

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight = run(whole, watch)
    with pytest.raises(Killed):
        run(broken, kill_at_three)
    # A kill while checkpoint 4 was being saved would leave weights but no trainer state.
    shutil.copytree(broken / "checkpoints" / "checkpoint-2", broken / "checkpoints" / "checkpoint-4")
    (broken / "checkpoints" / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    assert last_checkpoint(broken / "checkpoints").name == "checkpoint-2"
    resumed = run(broken, watch)
    assert seen == [1, 2, 3, 4, 3, 4]
    straight_weights, resumed_weights = weights_of(straight), weights_of(resumed)
    assert all(torch.equal(resumed_weights[name], value) for name, value in straight_weights.items())
    assert isinstance(straight.model, PeftModel) == bool(lora_rank) and not resumed.model.training
    if not lora_rank:
        assert not all(torch.equal(straight_weights[name], value) for name, value in before.items())
    else:
        assert any(value.abs().max() > 0 for name, value in straight_weights.items() if "lora_B" in name)
    rows = comparable(whole / "metrics.jsonl")
    assert rows == comparable(broken / "metrics.jsonl")
    assert [(row["arm"], row["seed"], row["step"], row["kind"]) for row in rows] == [
        ("dense", 0, s, "train") for s in (1, 2, 3, 4)
    ]
    assert rows[3]["dense/zero_variance_groups"] == 1.0
    assert rows[3]["dense/outcome_advantage_rms"] == rows[1]["dense/outcome_advantage_rms"] != 1.0
    pd.testing.assert_frame_equal(
        pd.read_parquet(whole / "rollouts.parquet"), pd.read_parquet(broken / "rollouts.parquet")
    )
    # A finished run called again trains no further.
    again = weights_of(run(broken, watch))
    assert seen == [1, 2, 3, 4, 3, 4] and all(
        torch.equal(again[name], value) for name, value in straight_weights.items()
    )
    assert comparable(broken / "metrics.jsonl") == rows


def test_checkpoints_of_another_run_are_refused(tmp_path, tiny_llama, char_tokenizer) -> None:
    reward = OutcomeReward(lambda _p, completion, _a: len(completion) % 2 == 0)

    def run(setting: TrainConfig) -> None:
        loaded = LoadedModel(copy.deepcopy(tiny_llama), char_tokenizer, "tiny")
        train_arm(loaded, QUESTIONS, [reward], setting, tmp_path / "checkpoints", arm="outcome")

    run(config(steps=1, save_every=1))
    with pytest.raises(InputError, match="holds checkpoints of a run with another config; use a new folder"):
        run(config(steps=1, save_every=1, learning_rate=0.5))


def test_question_order_is_seeded_permutations() -> None:
    rows = make_dataset(QUESTIONS, config(steps=3))["question_id"]
    assert len(rows) == 6 and sorted(rows[:3]) == sorted(rows[3:]) == ["q0", "q1", "q2"]
    assert list(make_dataset(QUESTIONS, config(steps=3))["question_id"]) == list(rows)
    orders = {tuple(make_dataset(QUESTIONS, config(steps=3, seed=seed))["question_id"]) for seed in range(6)}
    assert len(orders) > 2
    chat = make_dataset(QUESTIONS, config(steps=1, chat=True))["prompt"][0]
    assert chat[0]["role"] == "user" and chat[0]["content"].endswith("=")


def test_a_step_is_one_generation_batch(tmp_path) -> None:
    args = make_args(config(questions_per_step=3, generations=4, micro_batch=5), tmp_path, torch.device("cpu"))
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 3)
    assert args.generation_batch_size == 12 and not args.bf16 and not args.gradient_checkpointing
    assert not args.shuffle_dataset  # the order is make_dataset's


def test_a_step_is_of_all_processes_together(tmp_path) -> None:
    cpu = torch.device("cpu")
    args = make_args(config(questions_per_step=4, generations=2, micro_batch=3), tmp_path, cpu, 2)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 2)
    with pytest.raises(
        InputError, match="questions_per_step, generations: 3 x 3 completions cannot be shared out even"
    ):
        make_args(config(questions_per_step=3, generations=3), tmp_path, cpu, 2)


def test_last_checkpoint_takes_the_furthest_whole_one(tmp_path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, text in [(2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (11, ""), (12, '{"global_step": 10}')]:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-13").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-10"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: 0 must be"),
        ({"generations": 1}, "generations: 1; a group"),
        ({"beta": -1.0}, "beta: 0, -1.0"),
        ({"beta": float("nan")}, "beta: 0, nan"),
        ({"learning_rate": float("nan")}, "learning_rate: nan must be a positive number"),
        ({"beta": float("inf")}, "beta: 0, inf"),
        ({"seed": -1}, "seed: -1 is out of range; allowed are 0 to 4294967295"),
        ({"seed": 2**32}, "seed: 4294967296 is out of range"),
        ({"temperature": 0.0}, "temperature: 0.0 must be a positive number"),
        ({"loss_type": "ppo"}, "loss_type: 'ppo' is not one of grpo, bnpo"),
        ({"schedule": "up"}, "schedule: 'up' is not one of linear, cosine"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**options)


def test_bad_input_is_named(tmp_path, tiny_llama, char_tokenizer) -> None:
    loaded = LoadedModel(copy.deepcopy(tiny_llama), char_tokenizer, "tiny")
    right = OutcomeReward(lambda _p, completion: bool(completion))
    with pytest.raises(InputError, match="questions: there are none"):
        train_arm(loaded, [], [right], config(), tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_question_that_leaves_no_room_is_found_before_the_first_step(kind, request, tmp_path, char_tokenizer) -> None:
    model = copy.deepcopy(request.getfixturevalue(f"tiny_{kind}"))
    model.config.max_position_embeddings = 128
    asked = []

    def reward(completions, **_) -> list[float]:
        asked.append(completions)
        return [0.0] * len(completions)

    fits, long = (Question(f"q{n}", "1" * n, "1") for n in (123, 124))
    setting = config(steps=1, questions_per_step=1, max_new_tokens=5, beta=0.0)
    loaded = LoadedModel(model, char_tokenizer, kind)
    sentence = "^questions: q124 needs 124 prompt tokens . 5 new ones; the model reads at most 128$"
    with pytest.raises(InputError, match=sentence):
        train_arm(loaded, [*QUESTIONS, long], [reward], setting, tmp_path / "long")
    assert not asked and not (tmp_path / "long").exists()
    train_arm(loaded, [fits], [reward], setting, tmp_path / "fits")
    assert len(asked) == 1


@pytest.mark.parametrize("kind", SchedulerType)
def test_a_schedule_that_would_fail_once_training_begins_is_refused(kind, tmp_path) -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1e-5)
    try:
        TrainingArguments(str(tmp_path), lr_scheduler_type=kind, use_cpu=True)
        get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=4)
    except (TypeError, ValueError):
        with pytest.raises(InputError, match=f"^schedule: '{kind.value}' is not one of linear, "):
            config(schedule=kind.value)
    else:
        assert config(schedule=kind.value).schedule == kind


def train_plain(folder, model, tokenizer, reward, **options):
    """Six steps of train_arm; gives the weights and the KL that its metrics show."""
    loaded = LoadedModel(copy.deepcopy(model), tokenizer, "tiny")
    setting = config(**{"steps": 6, "learning_rate": 1e-2, **options})
    policy = train_arm(loaded, QUESTIONS, [reward], setting, folder / "c", metrics_path=folder / "m.jsonl")
    return weights_of(policy), [row.get("kl") for row in read_jsonl(folder / "m.jsonl")]


def even(completion_ids, **_) -> list[float]:
    return [float(ids[0] % 2) + 0.1 * (ids[-1] % 5) for ids in completion_ids]


@pytest.mark.parametrize("lora_rank", [0, 2], ids=["full", "lora"])
def test_a_default_run_is_held_by_a_kl_term(lora_rank, tmp_path, tiny_llama, char_tokenizer, monkeypatch) -> None:
    copied = []
    monkeypatch.setattr(run, "keep_reference", lambda *given: copied.append(given[1]) or keep_reference(*given))
    assert TrainConfig().beta == ImproveConfig(questions="tiny:easy").beta == 0.02
    assert tiny_llama.config.name_or_path == ""  # the reference is no model that is loaded by name
    found = {
        name: train_plain(tmp_path / name, tiny_llama, char_tokenizer, even, lora_rank=lora_rank, **options)
        for name, options in {"default": {}, "off": {"beta": 0.0}, "strong": {"beta": 5.0}}.items()
    }
    weights, kl = found["default"]
    assert copied == ([] if lora_rank else [0.02, 5.0]), "with an adapter the reference is the model without it"
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[1] > 0
    assert found["off"][1] == [None] * 6 and found["strong"][1][-1] < kl[-1] / 2
    assert not all(torch.equal(found["off"][0][name], value) for name, value in weights.items())


def test_an_adapter_from_before_is_what_the_kl_term_compares_with(tmp_path, tiny_llama, char_tokenizer) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(tiny_llama), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    _, kl = train_plain(tmp_path, adapted, char_tokenizer, even)
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[-1] > 1e-4


def test_the_outcome_arm_is_trls_own_with_its_kl_term(tmp_path, tiny_llama, char_tokenizer) -> None:
    tiny_llama.save_pretrained(tmp_path / "start")
    setting = config(steps=6, learning_rate=1e-2)
    ours, _ = train_plain(tmp_path, tiny_llama, char_tokenizer, even)
    stock = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "start"),
        reward_funcs=[even],
        args=make_args(setting, tmp_path / "stock", torch.device("cpu")),
        train_dataset=make_dataset(QUESTIONS, setting),
        processing_class=char_tokenizer,
    )
    stock.train()
    assert stock.ref_model is not None and stock.beta == 0.02
    for name, parameter in stock.model.named_parameters():
        assert torch.equal(parameter, ours[name]), name
