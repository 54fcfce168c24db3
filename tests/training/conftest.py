"""A trainer on tiny random models, as the tests of this folder make it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from mechreward.sae import SAE
from mechreward.training import MechRewardGRPOTrainer

GROUP = 4
PROMPTS = ["12+3=", "a", "what is 7?", "xy"]


@pytest.fixture(scope="session")
def sae(sae_of_layer) -> SAE:
    return sae_of_layer()


@pytest.fixture
def model(tiny_llama):
    model = copy.deepcopy(tiny_llama)
    model.generation_config.eos_token_id = [1, *range(40, 50)]  # so that some rows end early
    return model


class Spy(MechRewardGRPOTrainer):
    """Keeps what the trainer made, before TRL shuffles it."""

    def _generate_and_score_completions(self, inputs):
        self.seen = super()._generate_and_score_completions(inputs)
        return self.seen


@pytest.fixture(scope="session")
def make() -> Callable[..., Any]:
    """Makes a trainer that keeps, as `seen`, what it last made of a batch; with `stock`, TRL's own."""

    def build(
        folder, model, rewards, tokenizer, *, peft_config=None, config=None, stock=False, prompts=PROMPTS, **named
    ):
        options = {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": GROUP,
            "max_completion_length": 7,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "gradient_checkpointing": False,
            **(config or {}),
        }
        numbers = range(len(prompts))
        data = {"prompt": prompts, "question_id": [f"q{i}" for i in numbers], "answer": [str(i) for i in numbers]}
        return (GRPOTrainer if stock else Spy)(
            model=model,
            reward_funcs=rewards,
            args=GRPOConfig(output_dir=str(folder), **options),
            train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer,
            peft_config=peft_config,
            **named,
        )

    return build


@pytest.fixture(scope="session")
def score() -> Callable[[Any], dict[str, Any]]:
    """One generation, as the first training step would make it: two prompts, each with a group of completions."""

    def generate(trainer) -> dict[str, Any]:
        trainer.model.train()
        batch = [{"prompt": prompt, "question_id": prompt} for prompt in PROMPTS[:2] for _ in range(GROUP)]
        return trainer._generate_and_score_completions(batch)

    return generate
