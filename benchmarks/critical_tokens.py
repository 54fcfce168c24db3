"""Steps and critical tokens on the bundled reasoner, where the first wrong step of every chain is known.

`long` problems: three days, each read backwards with chance 1/2, so the first wrong step is the first of a day that is
read backwards. Three ways of finding it, and how far they agree: rollouts, contrastive estimation, a value probe. The
latter two learn from responses to other problems, `easy` ones among them. docs/chains.md quotes what it prints.

    .venv/bin/python benchmarks/critical_tokens.py --wrong 200 --rollouts 16
"""

from __future__ import annotations

import argparse
import random
import time

from mechreward.chains import (
    ContrastiveConfig,
    Roller,
    Tally,
    agreement,
    contrastive_pair,
    decompose,
    first_below,
    first_wrong,
    fit_value,
    label_by_solution,
    locate,
    lowest,
    rollout_critical,
    step_of,
)
from mechreward.models import load_model
from mechreward.rollout import sample_responses, verify_responses
from mechreward.tasks import Question
from mechreward.tiny import MODEL
from mechreward.tiny.world import label_chain, make_problem, write_chain
from mechreward.verifiers import gsm8k_exact_match

BELOW = (0.01, 0.05, 0.1, 0.2, 0.5)
VALUE_LAYERS = (2, 3, 4)


def draw(n: int, name: str, setting: str):
    rng = random.Random(f"critical-{name}-{setting}")
    problems = {f"{name}-{setting}-{i}": make_problem(setting, rng) for i in range(n)}
    questions = [
        Question(key, p.prompt, str(p.answer), write_chain(p, (False,) * len(p.days))) for key, p in problems.items()
    ]
    return problems, questions


def respond(loaded, questions, n: int, seed: int):
    responses = sample_responses(loaded, questions, n=n, max_new_tokens=192, seed=seed, batch_size=512)
    return verify_responses(responses, questions, gsm8k_exact_match)


def mixture(easy, long):
    """What the adapters learn from: right responses of both kinds, and about as many wrong ones."""
    right = [[r for r in side if r.correct] for side in (easy, long)]
    wrong = [[r for r in side if r.correct is False] for side in (easy, long)]
    return right[0][:250] + right[1] + wrong[0][:200] + wrong[1][:200]


def show(name: str, tally: Tally) -> None:
    low, high = tally.interval() if tally.total else (float("nan"), float("nan"))
    share = tally.soft if tally.total else float("nan")
    print(f"{name:58} {share:.3f}  [{low:.3f}, {high:.3f}]  n {tally.total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wrong", type=int, default=200)
    parser.add_argument("--rollouts", type=int, default=16)
    options = parser.parse_args()
    loaded, started = load_model(str(MODEL)), time.perf_counter()

    problems, known = {}, {}
    for setting, n_questions in (("easy", 100), ("long", 150)):
        drawn, questions = draw(n_questions, "train", setting)
        problems |= drawn
        known[setting] = respond(loaded, questions, 8, seed=1)
    print(f"{sum(map(len, known.values()))} responses, {time.perf_counter() - started:.0f} s", flush=True)

    right_steps = all_steps = labelled = n_chains = 0
    for r in known["easy"] + known["long"]:
        problem = problems[r.question_id]
        label = label_chain(problem, r.text)
        if label.flips is None:
            continue
        want = [part.strip() for part in write_chain(problem, label.flips).replace(" . ", " .|").split("|")]
        got = [step.text.strip() for step in decompose(loaded.tokenizer, r.completion_ids)]
        all_steps, right_steps = all_steps + len(want), right_steps + len(set(enumerate(want)) & set(enumerate(got)))
        solution = write_chain(problem, (False,) * len(problem.days))
        n_chains += 1
        labelled += first_wrong(label_by_solution(got, solution)) == label.first_wrong_step
    show(f"steps split as generated ({n_chains} chains)", Tally(right_steps, all_steps))
    show("first wrong step by comparing with the solution", Tally(labelled, n_chains))

    problems, questions = draw(options.wrong, "test", "long")
    judged = respond(loaded, questions, 2, seed=2)
    wrong = [r for r in judged if r.correct is False and label_chain(problems[r.question_id], r.text).flips]
    wrong = wrong[: options.wrong]
    chains = [decompose(loaded.tokenizer, r.completion_ids) for r in wrong]
    truth = [label_chain(problems[r.question_id], r.text).first_wrong_step for r in wrong]
    guess = max(set(truth), key=truth.count)
    show(f"always step {guess} (the commonest)", locate([guess] * len(truth), truth).recall)

    def steps(tokens):
        return [None if t is None else step_of(chain, t) for chain, t in zip(chains, tokens, strict=True)]

    found = {}
    mark = time.perf_counter()
    config = ContrastiveConfig(epochs=3, lr=5e-3, batch_size=32)
    with contrastive_pair(loaded, mixture(**known), config) as pair:
        scores = pair.scores(wrong)
    print(f"cDPO: {time.perf_counter() - mark:.0f} s with training", flush=True)
    found["cDPO, lowest"] = [lowest(s) for s in scores]
    for threshold in BELOW:
        found[f"cDPO, first below {threshold}"] = [first_below(s, threshold) for s in scores]
    mark = time.perf_counter()
    for layer in VALUE_LAYERS:
        falls = fit_value(loaded, known["long"][:600], layer).falls(loaded, wrong)
        found[f"value, block {layer}, largest fall"] = [lowest([-f for f in row]) for row in falls]
        found[f"value, block {layer}, first fall above .1"] = [first_below([-f for f in row], -0.1) for row in falls]
    print(f"value: {time.perf_counter() - mark:.0f} s", flush=True)
    for name, tokens in found.items():
        located = locate(steps(tokens), truth)
        show(f"{name}: precision", located.precision)
        show(f"{name}: recall", located.recall)

    mark = time.perf_counter()
    roller = Roller(loaded, questions, gsm8k_exact_match, max_new_tokens=192, batch_size=512, seed=3)
    lost = rollout_critical(roller, wrong, chains, n=options.rollouts)
    print(f"rollouts: {time.perf_counter() - mark:.0f} s", flush=True)
    tokens = [None if place is None else place.token for place in lost]
    located = locate(steps(tokens), truth)
    show("rollouts: precision", located.precision)
    show("rollouts: recall", located.recall)
    for name, others in found.items():
        show(f"rollouts and {name}: same step", agreement(steps(tokens), steps(others)))
        show(f"rollouts and {name}: same token", agreement(tokens, others))


if __name__ == "__main__":
    main()
