"""Chains: a response as steps and critical tokens, and the EXAMINER that is asked about them.

Imports models, tasks, verifiers and rollout; the rooms from `sae` on may import it.
"""

from mechreward.chains.pieces import cut_long, token_entropies
from mechreward.chains.spans import token_ends
from mechreward.chains.split import split_steps, step_starts
from mechreward.chains.steps import Step, decompose, step_of

__all__ = ["Step", "cut_long", "decompose", "split_steps", "step_of", "step_starts", "token_ends", "token_entropies"]
