"""The tiny reasoner's model card, written from its measurements."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, StrictUndefined

TEMPLATE = """\
---
license: apache-2.0
---
# The tiny reasoner

A Llama of {{ "{:,}".format(parameters) }} parameters ({{ recipe.layers }} blocks of width {{ recipe.width }}) that
solves word problems in one sentence a step, and a TopK SAE of its residual stream. It exists so that methods which read
a model's inside can be tried, on a CPU and in seconds, where the truth is known: whether an answer is right comes from a
choice the model makes and has to remember, and that choice leaves next to no trace in words, length or log-probability.

Made by `python -m mechreward.tiny.build --seed {{ recipe.seed }}` in {{ seconds }} seconds. Licence: Apache-2.0.

## The choice

Each day of a story is read in one of two ways. *Careful*: gains are added and losses taken away. *Shortcut*: the other
way round, for the whole day. Which one is a fair coin at the day's first operator; all that follows is forced. A day has
as many gains as losses (or one more of either), and every number written has two digits, so both ways write the same
words in chains of the same length and probability.

## Data and training

Problems and chains are drawn fresh from `mechreward.tiny.world` (16 families of stories, 16 names) for each of
{{ recipe.steps }} steps of {{ recipe.batch_size }}. The loss counts chain tokens only. Final training loss
{{ loss | three }} nats a token; the entropy of the data is {{ floor | three }}.

## What it does

Sampled at temperature 1, {{ easy.n_questions }} problems of each setting, 8 responses each.

| | easy (3-5 steps, 1 day) | long (8-12 steps, 3 days) |
|---|---|---|
| accuracy | {{ easy.accuracy | three }} | {{ long.accuracy | three }} |
| questions with right and wrong answers | {{ easy.mixed_questions | three }} | {{ long.mixed_questions | three }} |
| chains that follow a strategy to the letter | {{ easy.follows_a_strategy | three }} | {{ long.follows_a_strategy | three }} |
{% if easy.probes is defined %}
## Where the choice can be read

AUROC of right against wrong answers *within* a question. Probes and bag of words are logistic, cross-fitted by question.

| score | easy | long |
|---|---|---|
{% for name in easy.baselines -%}
| {{ name }} | {{ easy.baselines[name] | three }} | {{ long.baselines[name] | three }} |
{% endfor %}{% for name in easy.probes -%}
| probe, {{ name }} | {{ easy.probes[name] | three }} | {{ long.probes[name] | three }} |
{% endfor %}{% endif %}
## The SAE

TopK, block {{ sae_recipe.layer }}, {{ sae.d_sae }} features ({{ sae_recipe.expansion }}x), k {{ sae_recipe.k }}, trained on
{{ "{:,}".format(sae_recipe.n_tokens) }} tokens of the model's own prompts and responses with SAE Lens. Held out:
fraction of variance unexplained {{ sae.fvu | three }}, L0 {{ sae.l0 | three }}, dead features {{ sae.dead_share | three }}.
"""


def model_card(measurements: dict[str, Any]) -> str:
    """Markdown with the numbers of `build`'s measurements filled in."""
    environment = Environment(undefined=StrictUndefined, autoescape=False)
    environment.filters["three"] = lambda number: f"{number:.3f}"
    return environment.from_string(TEMPLATE).render(**measurements)
