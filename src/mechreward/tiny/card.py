"""The tiny reasoner's model card, written from its measurements."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined

TEMPLATE = """\
---
license: apache-2.0
---
# The tiny reasoner

A Llama of {{ "{:,}".format(parameters) }} parameters ({{ recipe.layers }} blocks of width {{ recipe.width }}) that solves
word problems in one sentence a step, and a TopK SAE of its residual stream. It exists so that methods which read a model's
inside can be tried, on a CPU and in seconds, where the truth is known: whether an answer is right comes from a choice the
model makes and has to remember, and that choice leaves no trace in words, length or log-probability.

Made by `python -m mechreward.tiny.build --seed {{ recipe.seed }}` in {{ seconds }} seconds. Licence: Apache-2.0.

## The choice

Each day of a story is read in one of two ways. *Careful*: gains are added and losses taken away. *Shortcut*: the other way
round, for the whole day. Which one is a fair coin at the day's first operator; all that follows is forced. A day has as
many gains as losses (or one more of either), and every number written has two digits, so both ways write the same
words in chains of the same length and probability.

## Data and training

Problems and chains are drawn fresh from `mechreward.tiny.world` (16 families of stories, 16 names), never repeated on
purpose, {{ recipe.steps }} steps of {{ recipe.batch_size }}. The loss counts chain tokens only. Final training loss
{{ "%.4f"|format(loss) }} nats a token; the entropy of the data is {{ "%.4f"|format(floor) }}.

## What it does

Sampled at temperature 1, {{ easy.n_questions }} problems of each setting, 8 responses each.

| | easy (3-5 steps, 1 day) | long (8-12 steps, 3 days) |
|---|---|---|
| accuracy | {{ "%.3f"|format(easy.accuracy) }} | {{ "%.3f"|format(long.accuracy) }} |
| questions with right and wrong answers | {{ "%.3f"|format(easy.mixed_questions) }} | {{ "%.3f"|format(long.mixed_questions) }} |
| chains that follow a strategy to the letter | {{ "%.3f"|format(easy.follows_a_strategy) }} | {{ "%.3f"|format(long.follows_a_strategy) }} |
{% if easy.probes is defined %}
## Where the choice can be read

AUROC of right against wrong answers *within* a question. Probes and bag of words are logistic, cross-fitted by question.

| score | easy | long |
|---|---|---|
{% for name in easy.baselines %}| {{ name }} | {{ "%.3f"|format(easy.baselines[name]) }} | {{ "%.3f"|format(long.baselines[name]) }} |
{% endfor %}{% for name in easy.probes %}| probe, {{ name }} | {{ "%.3f"|format(easy.probes[name]) }} | {{ "%.3f"|format(long.probes[name]) }} |
{% endfor %}{% endif %}
## The SAE

TopK, block {{ sae_recipe.layer }}, {{ sae.d_sae }} features ({{ sae_recipe.expansion }}x), k {{ sae_recipe.k }}, trained on
{{ "{:,}".format(sae_recipe.n_tokens) }} tokens of the model's own prompts and responses with SAE Lens. Held out: fraction of
variance unexplained {{ "%.4f"|format(sae.fvu) }}, L0 {{ "%.1f"|format(sae.l0) }}, dead features {{ "%.3f"|format(sae.dead_share) }}.
"""


def model_card(measurements: dict[str, Any]) -> str:
    """Markdown with the numbers of `build`'s measurements filled in."""
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    return environment.from_string(TEMPLATE).render(**measurements)
