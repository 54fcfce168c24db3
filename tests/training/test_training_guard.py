"""The guards inside the trainer: on by default, acting in the same step, stopping, going back, and resuming alike."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from mechreward.errors import InputError
from mechreward.files import read_jsonl
from mechreward.hacking import DualVerifier, GuardConfig, HackingDetector, HackingReport, Regularizers
from mechreward.models import LoadedModel
from mechreward.probes import LinearProbe
from mechreward.reward import FeatureReward, OutcomeReward
from mechreward.tasks import Question
from mechreward.training import DenseConfig, TrainConfig, last_good, train_arm

WEIGHTS = {3: 1.0, 7: -0.5, 11: 2.0, 40: 1.0, 60: -1.5}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def even_tokens(completion_ids, **_) -> list[float]:
    return [float(sum(token % 2 == 0 for token in ids) > len(ids) / 2) for ids in completion_ids]


def probe(bias=0.0, **fields) -> LinearProbe:
    return LinearProbe(torch.zeros(32), bias, 32, "p", layer=2, **fields)


def suspicious(reward, action="zero", **options) -> DualVerifier:
    """Claims that all is right, where its probe sees nothing right: flags every rollout."""
    dual = DualVerifier(reward, probe(-5.0), action=action, **options)
    dual.calibration = (0.0, 5.0)
    return dual


def test_watches_by_default_and_leaves_a_calm_batch_alone(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    outs = []
    for on in (True, False):
        torch.manual_seed(3)
        dense = DenseConfig() if on else DenseConfig(guard=GuardConfig(on=False))
        rewards = [FeatureReward(WEIGHTS, sae), even_tokens]
        trainer = make(tmp_path, copy.deepcopy(model), rewards, char_tokenizer, dense=dense)
        outs.append(score(trainer))
        assert ("guard/flagged" in trainer._metrics["train"]) == on
        assert ("guard/fvu" in trainer._metrics["train"]) == on
    assert torch.equal(outs[0]["advantages"], outs[1]["advantages"])


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_flagged_rollouts_get_nothing_in_the_same_step(
    peft_config, tmp_path, model, sae, char_tokenizer, make, score
) -> None:
    reward = FeatureReward(WEIGHTS, sae)
    guard = GuardConfig(window=1)
    trainer = make(
        tmp_path, model, [reward, even_tokens], char_tokenizer, dense=DenseConfig(guard=guard),
        dual=suspicious(reward), peft_config=peft_config,
    )  # fmt: skip
    assert score(trainer)["advantages"].count_nonzero() > 0  # the reference
    assert score(trainer)["advantages"].count_nonzero() == 0
    metrics = trainer._metrics["train"]
    assert metrics["guard/disagreement"] == [1.0, 1.0] and metrics["guard/flagged"] == [0.0, 1.0]
    assert trainer.guard.report.findings[0].name == "disagreement"


def test_drop_leaves_the_loss_and_downweight_scales(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    reward, found = FeatureReward(WEIGHTS, sae), {}
    for action in ("zero", "downweight", "drop"):
        trainer = make(
            tmp_path, copy.deepcopy(model), [reward, even_tokens], char_tokenizer,
            dense=DenseConfig(guard=GuardConfig(window=1)), dual=suspicious(reward, action, downweight_factor=0.5),
        )  # fmt: skip
        score(trainer)
        torch.manual_seed(5)
        found[action] = score(trainer)
    trainer = make(tmp_path, copy.deepcopy(model), [reward, even_tokens], char_tokenizer, dense=DenseConfig())
    score(trainer)
    torch.manual_seed(5)
    plain = score(trainer)
    torch.testing.assert_close(found["downweight"]["advantages"], 0.5 * plain["advantages"])
    assert found["drop"]["completion_mask"].sum() == 0 and found["zero"]["completion_mask"].sum() > 0


@pytest.mark.parametrize("flagged", [[], [0, 3]])
def test_tokens_of_dropped_rollouts_do_not_count(
    flagged, tmp_path, model, sae, char_tokenizer, make, score, monkeypatch
) -> None:
    rows_B = torch.zeros(8).bool()
    rows_B[flagged] = True
    dense = DenseConfig(guard=GuardConfig(action="drop"))
    trainer = make(tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer, dense=dense)
    report = HackingReport(rows_B, {}, [], 0, False, True)
    monkeypatch.setattr(trainer.guard.detector, "check", lambda _batch: report)
    out = score(trainer)
    assert (out["completion_mask"].sum(1) == 0).tolist() == rows_B.tolist()
    assert trainer.loss_type == "dapo" and int(out["num_items_in_batch"]) == int(out["completion_mask"].sum())


def test_flagged_steps_get_nothing(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    reward = FeatureReward(WEIGHTS, sae)
    dual = suspicious(reward, steps=True)
    trainer = make(tmp_path, model, [reward, even_tokens], char_tokenizer, dual=dual)
    assert score(trainer)["advantages"].count_nonzero() == 0  # all steps are flagged, at once
    dual.calibration = (0.0, -5.0)
    assert score(trainer)["advantages"].count_nonzero() > 0


def test_nothing_acts_where_the_reward_does_not_train(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    reward = FeatureReward(WEIGHTS, sae)
    dense = DenseConfig(weight=0.0, guard=GuardConfig(window=1))
    trainer = make(tmp_path, model, [reward, even_tokens], char_tokenizer, dense=dense, dual=suspicious(reward))
    for _ in range(2):
        out = score(trainer)
        assert out["advantages"].ndim == 1 and "guard/flagged" not in trainer._metrics["train"]


def test_the_frozen_reader_reads_the_starting_model(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    start, reward = copy.deepcopy(model), FeatureReward(WEIGHTS, sae)
    looks = LinearProbe(torch.randn(32), 0.0, 32, "p", layer=3, pooling="min")
    dual = DualVerifier(reward, looks)
    trainer = make(tmp_path, model, [reward, even_tokens], char_tokenizer, dual=dual)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    out = score(trainer)
    mask = out["completion_mask"].bool()
    found = trainer.guard._read_frozen(out, mask)
    for row in range(3):
        prompt = out["prompt_ids"][row][out["prompt_mask"][row].bool()]
        ids = torch.cat([prompt, out["completion_ids"][row][mask[row]]])
        with torch.no_grad():
            states = start(ids[None], output_hidden_states=True).hidden_states
            layer3 = start.model.layers[3](
                states[3], position_embeddings=start.model.rotary_emb(states[3], torch.arange(len(ids))[None])
            )
        layer3 = layer3[0] if isinstance(layer3, tuple) else layer3
        whole = torch.ones(1, len(ids) - len(prompt)).bool()
        expected = reward.compute(states[2][:, len(prompt) :], whole)
        assert found["reward"][row].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-3)
        seen = looks.row_proba(layer3[:, len(prompt) :], whole)
        assert found["probe"][row].item() == pytest.approx(seen.item(), rel=1e-3, abs=1e-4)


def test_a_probe_of_a_block_that_is_not_there(tmp_path, model, sae, char_tokenizer, make) -> None:
    reward = FeatureReward(WEIGHTS, sae)
    dual = DualVerifier(reward, replace(probe(), layer=9))
    with pytest.raises(InputError, match="layer: 9 is out of range"):
        make(tmp_path, model, [reward, even_tokens], char_tokenizer, dual=dual)


QUESTIONS = [Question(f"q{i}", text, "1") for i, text in enumerate(("12+3=", "a", "what is 7?", "xy"))]


def train(folder, model, tokenizer, reward, steps=6, kill=None, rate=1e-2, **options):
    """Trains the tiny Llama for `steps`; `kill` stops it after that step, as if killed."""

    def evaluate(_policy, step):
        if step == kill:
            raise KeyboardInterrupt

    config = TrainConfig(
        steps=steps, questions_per_step=2, generations=4, max_new_tokens=7, save_every=2, eval_every=1,
        learning_rate=rate, beta=0.0,
    )  # fmt: skip
    outcome = OutcomeReward(lambda _p, completion, _a: completion.count("1") > 0)
    return train_arm(
        LoadedModel(copy.deepcopy(model), tokenizer, "tiny"), QUESTIONS, [reward, outcome], config, folder / "arm",
        metrics_path=folder / "metrics.jsonl", evaluate=evaluate, **options,
    )  # fmt: skip


def test_a_run_that_hacks_is_stopped_says_why_and_goes_back(tmp_path, model, sae, char_tokenizer) -> None:
    reward = FeatureReward(WEIGHTS, sae)
    dense = DenseConfig(guard=GuardConfig(window=1, keep_every=1))
    policy = train(tmp_path, model, char_tokenizer, reward, dense=dense, dual=suspicious(reward))
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    events = [row for row in rows if row["kind"] == "guard"]
    # Step 1 is the reference; 2, 3 and 4 have findings in a row, and 4 is the last.
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
    assert [(row["step"], row["stop"]) for row in events] == [(2, False), (3, False), (4, True)]
    assert "100% of the rollouts flagged for disagreement" in events[-1]["findings"]
    # The policy after step 1 wrote the first flagged batch; the one before it, the start, is the last good one.
    assert json.loads((tmp_path / "arm" / "good" / "step.json").read_text())["step"] == 0
    assert not list((tmp_path / "arm").glob("good-pending-*"))
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_a_sign_in_the_last_batch_ends_the_run_where_it_was_good(tmp_path, model, sae, char_tokenizer) -> None:
    reward = FeatureReward(WEIGHTS, sae)
    dense = DenseConfig(guard=GuardConfig(window=1, keep_every=1))
    policy = train(tmp_path, model, char_tokenizer, reward, steps=3, dense=dense, dual=suspicious(reward))
    events = [row for row in read_jsonl(tmp_path / "metrics.jsonl") if row["kind"] == "guard"]
    assert [(row["step"], row["stop"]) for row in events] == [(2, False), (3, True)]
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


@pytest.mark.parametrize(
    ("window", "steps", "ended"),
    [(1, 9, 4), (2, 9, 5), (1, 3, 3)],
    ids=["at a checkpoint", "between two", "at the end"],
)
def test_a_stopped_run_stays_stopped(window, steps, ended, tmp_path, model, sae, char_tokenizer) -> None:
    reward = FeatureReward(WEIGHTS, sae)
    dense, seen = DenseConfig(guard=GuardConfig(window=window, keep_every=1)), []
    for _ in range(3):
        policy = train(tmp_path, model, char_tokenizer, reward, steps=steps, dense=dense, dual=suspicious(reward))
        seen.append(read_jsonl(tmp_path / "metrics.jsonl"))
        start = dict(model.named_parameters())
        assert all(torch.equal(value, start[name]) for name, value in policy.model.named_parameters())
    assert [row["step"] for row in seen[0] if row["kind"] == "train"] == list(range(1, ended + 1))
    assert seen[0] == seen[1] == seen[2]


def outcome_changed(monkeypatch: pytest.MonkeyPatch, z: float) -> None:
    """Every batch that has a window of two beside the reference says so of the outcome, and nothing of the reward."""
    said = ((0.0, 0.0), (0.1 * z, z))
    monkeypatch.setattr(HackingDetector, "_rises", lambda self: said if self.evaluations > 3 else None)


def test_a_copy_is_good_after_as_many_batches_not_steps(
    tmp_path, model, sae, char_tokenizer, make, monkeypatch
) -> None:
    outcome_changed(monkeypatch, 0.0)
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, _args, state, _control, **_) -> None:
            seen.append((state.global_step, trainer.guard.detector.evaluations, last_good.good_step(tmp_path)))

    trainer = make(
        tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer,
        config={"num_iterations": 4, "max_steps": 14, "save_strategy": "steps", "save_steps": 100},
        dense=DenseConfig(guard=GuardConfig(keep_every=1, window=2)),
    )  # fmt: skip
    trainer.add_callback(Look())
    trainer.train()
    # A batch is four steps. Two batches after the copies of steps 1 to 4, at step 9, there is no window beside the
    # reference to tell by, and they go; of those of steps 5 to 8 the fourth batch, at step 13, can.
    assert seen == [(step, (step + 3) // 4, 8 if step > 12 else 0) for step in range(1, 15)]


@pytest.mark.parametrize(("z", "kept"), [(0.0, 4), (-2.0, 0)], ids=["as right as before", "less"])
def test_a_policy_that_is_less_often_right_is_not_gone_back_to(
    z, kept, tmp_path, model, sae, char_tokenizer, monkeypatch
) -> None:
    outcome_changed(monkeypatch, z)
    dense = DenseConfig(guard=GuardConfig(keep_every=1, window=2))
    train(tmp_path, model, char_tokenizer, FeatureReward(WEIGHTS, sae), steps=6, rate=1e-5, dense=dense)
    assert last_good.good_step(tmp_path / "arm") == kept
    waiting = sorted(path.name for path in (tmp_path / "arm").glob("good-*"))
    assert waiting == ["good-pending-5", "good-pending-6"], "what was due is kept or gone"


def test_copies_of_the_policy_stay_here(tmp_path, model, sae, char_tokenizer, make, monkeypatch) -> None:
    pushed = []
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *_a, **_k: None)
    trainer = make(
        tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer,
        config={"save_strategy": "steps", "save_steps": 100, "push_to_hub": True, "hub_model_id": "x/y"},
        dense=DenseConfig(guard=GuardConfig(keep_every=1)),
    )  # fmt: skip
    monkeypatch.setattr(trainer, "push_to_hub", lambda *_a, **_k: pushed.append(trainer.state.global_step))
    monkeypatch.setattr(trainer, "_push_from_checkpoint", lambda *_a, **_k: None)
    trainer.train()
    assert (tmp_path / "good" / "model.safetensors").exists() and not pushed


def test_only_the_main_process_tells(tmp_path, model, sae, char_tokenizer, make, score, monkeypatch) -> None:
    reward, events, rollouts = FeatureReward(WEIGHTS, sae), [], []
    trainer = make(
        tmp_path, model, [reward, even_tokens], char_tokenizer, dense=DenseConfig(guard=GuardConfig(window=1)),
        dual=suspicious(reward), on_guard=events.append, on_rollouts=rollouts.append,
    )  # fmt: skip
    for _ in range(2):
        score(trainer)
    assert (len(events), len(rollouts)) == (1, 2)
    monkeypatch.setattr(type(trainer.accelerator), "is_main_process", property(lambda _self: False))
    score(trainer)
    assert (len(events), len(rollouts)) == (1, 2)


@pytest.mark.parametrize(("steps_per_generation", "iterations", "lasts"), [(1, 1, 1), (2, 1, 2), (2, 3, 6)])
def test_the_last_batch_is_the_one_that_training_ends_with(
    steps_per_generation, iterations, lasts, tmp_path, model, sae, char_tokenizer, make
) -> None:
    trainer = make(
        tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer,
        config={"steps_per_generation": 2 * steps_per_generation, "num_iterations": iterations},
    )  # fmt: skip
    trainer.state.max_steps, found = 20, []
    for step in range(20):
        trainer.state.global_step = step
        found.append(trainer.guard._is_last())
    assert found == [step >= 20 - lasts for step in range(20)]
    trainer.state.max_steps = 0
    assert not trainer.guard._is_last()


def test_a_calm_run_goes_to_its_end_and_keeps_what_is_good(tmp_path, model, sae, char_tokenizer) -> None:
    reward = FeatureReward(WEIGHTS, sae)
    dense = DenseConfig(guard=GuardConfig(keep_every=1, window=2))
    policy = train(tmp_path, model, char_tokenizer, reward, steps=4, rate=1e-5, dense=dense)
    # A copy is good once the two batches after it are sound, which needs a window of two beside the reference's: that
    # of step 2, at step 4.
    assert last_good.good_step(tmp_path / "arm") == 2
    assert sorted(path.name for path in (tmp_path / "arm").glob("good*")) == [
        "good", "good-pending-3", "good-pending-4",
    ]  # fmt: skip
    ended = load_file(tmp_path / "arm" / "good-pending-4" / "model.safetensors")
    found = policy.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in ended.items()), "the policy it ended with"
    assert all(row["kind"] == "train" for row in read_jsonl(tmp_path / "metrics.jsonl"))


def test_a_killed_run_judges_as_one_never_killed(tmp_path, model, sae, char_tokenizer) -> None:
    reward, found = FeatureReward(WEIGHTS, sae), []
    for kill in (None, 3):
        folder = tmp_path / str(kill)
        folder.mkdir()

        def go(kill, folder=folder):
            dual = DualVerifier(reward, probe(-5.0))
            return train(folder, model, char_tokenizer, reward, steps=5, kill=kill, dual=dual)

        if kill is not None:
            with pytest.raises(KeyboardInterrupt):
                go(kill)
        policy = go(None)
        rows = [
            {name: value for name, value in row.items() if name.startswith("guard") or name in ("step", "kind")}
            for row in read_jsonl(folder / "metrics.jsonl")
        ]
        found.append((rows, [parameter.detach().clone() for parameter in policy.model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("term", ["variance", "diversity", "entropy", "kl"])
def test_regularisers_change_the_rewards_that_train(term, tmp_path, model, sae, char_tokenizer, make, score) -> None:
    rewards, found = [FeatureReward(WEIGHTS, sae), even_tokens], []
    for weight in (0.0, 5.0):
        torch.manual_seed(3)
        dense = DenseConfig(regularizers=Regularizers(**{term: weight}))
        trainer = make(tmp_path, copy.deepcopy(model), rewards, char_tokenizer, peft_config=LORA, dense=dense)
        if term == "kl":
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if "lora_B" in name:
                        parameter.add_(0.3)
        found.append(score(trainer)["advantages"])
        assert ("guard/regularisation" in trainer._metrics["train"]) == (weight > 0)
    assert found[0].shape == found[1].shape or term == "kl"
    assert not torch.equal(found[0], found[1])


def test_guards_gap_and_rollouts_see_what_was_read(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    found = []
    for regularizers in (Regularizers(), Regularizers(entropy=5.0, variance=1.0)):
        torch.manual_seed(3)
        rollouts = []
        trainer = make(
            tmp_path, copy.deepcopy(model), [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer,
            peft_config=LORA, on_rollouts=rollouts.append,
            dense=DenseConfig(gap_every=1, regularizers=regularizers, guard=GuardConfig(window=1)),
        )  # fmt: skip
        for _ in range(2):
            out = score(trainer)
        metrics = trainer._metrics["train"]
        assert metrics["dense/reader_gap_rms"] == pytest.approx([0.0, 0.0], abs=1e-4)
        assert not trainer.guard.report.reasons["reader drift"].any()
        found.append((rollouts, metrics["guard/flagged"], out["advantages"]))
    assert found[0][:2] == found[1][:2] and not torch.equal(found[0][2], found[1][2])


def test_kl_without_a_reference(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    dense = DenseConfig(regularizers=Regularizers(kl=0.1))
    trainer = make(tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer, dense=dense)
    with pytest.raises(
        InputError, match="regularizers.kl: needs a reference; set beta above 0, or train a new adapter"
    ):
        score(trainer)


@pytest.mark.parametrize(
    ("options", "dense", "warned"),
    [
        ({}, {}, True),
        ({"beta": 0.1}, {}, False),
        ({}, {"regularizers": Regularizers(kl=0.1)}, False),
        ({}, {"guard": GuardConfig(on=False)}, False),
    ],
    ids=["nothing holds", "beta", "regulariser", "guard off"],
)
def test_a_trainer_without_kl_says_so_once(
    options, dense, warned, tmp_path, model, sae, char_tokenizer, make, caplog
) -> None:
    rewards = [FeatureReward(WEIGHTS, sae), even_tokens]
    trainer = make(
        tmp_path, model, rewards, char_tokenizer, peft_config=LORA, config=options, dense=DenseConfig(**dense)
    )
    assert trainer.beta == options.get("beta", 0.0)  # what the user gave stays
    trainer.train()
    said = [record for record in caplog.records if record.getMessage().startswith("beta: is 0, and so is reg")]
    assert len(said) == warned
