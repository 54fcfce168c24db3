"""Rollout: sampling responses from a policy with their token ids and log-probabilities, verifying and storing them.

Imports models, tasks and verifiers; the rooms from `chains` on may import it.
"""

from mechreward.rollout.response import Response, load_responses, prompt_hashes, save_responses
from mechreward.rollout.sampling import (
    check_streamer,
    continue_responses,
    eos_ids,
    sample_responses,
    tokenise_prompts,
)
from mechreward.rollout.verify import check_answers, verify_responses

__all__ = [
    "Response",
    "check_answers",
    "check_streamer",
    "continue_responses",
    "eos_ids",
    "load_responses",
    "prompt_hashes",
    "sample_responses",
    "save_responses",
    "tokenise_prompts",
    "verify_responses",
]
