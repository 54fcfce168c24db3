"""How true attributions are on the bundled model: the table of docs/attribution.md.

Runs on the CPU in some minutes. Right answers to easy questions, target: the logit (or log-probability) of the answer.
"""

from __future__ import annotations

from mechreward.features import ablation_agreement, answer_target, completeness, top_against_random
from mechreward.features.targets import Target
from mechreward.models import load_model
from mechreward.rollout import sample_responses, verify_responses
from mechreward.sae import load_sae
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.verifiers import gsm8k_exact_match

SEED, N_ANSWERS = 3, 8


def main() -> None:
    loaded, sae = load_model(str(MODEL)), load_sae(SAE_FOLDER)
    questions = load_questions("tiny:easy", limit=12, seed=SEED)
    sampled = sample_responses(loaded, questions, n=3, max_new_tokens=96, seed=SEED)
    found = [(r, answer_target(loaded.tokenizer, r)) for r in verify_responses(sampled, questions, gsm8k_exact_match)]
    pairs = [(response, target) for response, target in found if response.correct and target is not None][:N_ANSWERS]
    rows = [response for response, _ in pairs]
    print(f"{len(rows)} right answers to {len({row.question_id for row in rows})} questions, seed {SEED}")
    for kind in ("logit", "logprob"):
        targets = [Target(target.start, target.end, kind) for _, target in pairs]
        for method in ("gradient", "integrated"):
            added = completeness(loaded, sae, rows, targets, method=method)
            worth = (added["clean"] - added["without_features"]).abs().sum()
            agreement = ablation_agreement(loaded, sae, rows, targets, method=method)
            top = top_against_random(loaded, sae, rows, targets, method=method)
            print(
                f"{kind:8}{method:11} Spearman {agreement.spearman:.2f} (median {agreement.spearman_each:.2f}) over "
                f"{len(agreement.feature_ids)} features; gap {added['gap'].abs().sum() / worth:.2f}; top 10 "
                f"{top.top:.1f}, random {top.random:.2f}, difference {top.difference:.1f} "
                f"({top.low:.1f} to {top.high:.1f})"
            )


if __name__ == "__main__":
    main()
