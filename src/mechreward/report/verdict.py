"""What the top of the page says: the verdict in words, the arms at a glance, how far the run came, and why a section
is empty. Colours follow the paired test, never the wording (`formats.paired_tone`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mechreward.report import formats as f
from mechreward.report.data import Run


@dataclass(frozen=True)
class Headline:
    """The verdict in words, one line under it, and its tone: `good`, `bad` or `neutral`."""

    text: str
    detail: str
    tone: str

    @property
    def sentences(self) -> list[str]:
        """The verdict's sentences, each for a line of its own."""
        return re.split(r"(?<=[.!?])\s+(?=[A-Z])", self.text)


@dataclass(frozen=True)
class ArmCard:
    """One arm before and after, ready to print."""

    arm: str
    label: str
    before: str
    after: str
    before_interval: str
    after_interval: str
    n: str
    change: str
    p: str
    tone: str


def headline(run: Run) -> Headline:
    """The verdict of results.json where there is one; otherwise where the run stopped, and why."""
    verdict = (run.results or {}).get("verdict")
    gate = run.gate["verdict"] if run.gate else None
    if verdict and arm_cards(run):
        return Headline(sentence(verdict), _gate_line(run), _tone(run, gate))
    if verdict:  # It was not trained: "what happened: why", the gate's reason being part of the why.
        what, _, why = verdict.partition(": ")
        return Headline(sentence(what), sentence(why), _tone(run, gate))
    if gate is None and not run.is_given_pack:
        return Headline("Unfinished: Gate 1 was not reached.", "Nothing can be said about the reward yet.", "neutral")
    if gate not in ("pass", None) and run.train is None:
        return Headline("Not trained: Gate 1 did not pass.", _gate_line(run), "bad" if gate == "fail" else "neutral")
    where = "training has not begun" if run.train is None else "the final evaluation was not reached"
    return Headline(f"Unfinished: {where}.", _gate_line(run), "neutral")


def _gate_line(run: Run) -> str:
    if run.is_given_pack:
        return given_gate(run)
    if not run.gate:
        return "Gate 1 was not run: the reward was trained without proof that it tells right from wrong."
    line = f"Gate 1: {run.gate['verdict']}. {sentence(run.gate.get('reason') or '')}".strip()
    return line if run.gate["verdict"] == "pass" else line + _all_the_same(run)


def given_gate(run: Run) -> str:
    """What is known of the pack that the run was given."""
    pack = run.given_pack
    if pack is None:
        return "A pack was given."
    line, found = f"The pack was given; {pack.status}.", pack.validation
    if found is not None and found.interval is not None:
        low, high = found.interval
        line += f" Its AUROC within a question was {f.number(found.within_auroc)} ({f.number(low)} to {f.number(high)})"
        line += f" on {f.count(found.n_questions)} questions."
    return line if pack.gate_passed else line + _all_the_same(run)


def _all_the_same(run: Run) -> str:
    """That an arm which takes the pack was trained without its gate; outcome only needs none."""
    trained = set() if run.train is None else set(run.train["arm"]) - {"outcome"}
    return " Trained all the same (ungated)." if trained else ""


def sentence(text: str) -> str:
    """The text with a capital at its start and a stop at its end."""
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith((".", "!", "?")) else text + "."


def _tone(run: Run, gate: str | None) -> str:
    tones = {card.tone for card in arm_cards(run)}
    if not tones:
        return "bad" if gate == "fail" else "neutral"
    return "good" if "good" in tones else "bad" if "bad" in tones else "neutral"


def arm_cards(run: Run) -> list[ArmCard]:
    """One card an arm of results.json."""
    found = (run.results or {}).get("arms") or {}
    return [_card(name, found[name]) for name in run.arms if name in found]


def _card(name: str, arm: dict[str, Any]) -> ArmCard:
    before, after, paired = arm["before"], arm["after"], arm.get("paired") or {}
    low, high = paired.get("low"), paired.get("high")
    return ArmCard(
        arm=name,
        label=f.arm_label(name),
        before=f.percent(before["accuracy"]),
        after=f.percent(after["accuracy"]),
        before_interval=f.percent_interval(before["low"], before["high"]),
        after_interval=f.percent_interval(after["low"], after["high"]),
        n=f"{f.count(after['n_questions'])} questions, {f.count(after['n_responses'])} responses",
        change=f"{f.points(paired.get('difference'))} points ({f.points_interval(low, high)})",
        p=f.p_value(paired.get("p_value")),
        tone=f.paired_tone(paired),
    )


def between_lines(run: Run) -> list[str]:
    """Arms against the one they have to beat, question by question after training."""
    return [
        f"{f.arm_label(row['arm'])} against {f.arm_label(row['against'])}: {f.points(row['difference'])} points "
        f"({f.points_interval(row['low'], row['high'])}), {f.p_value(row['p_value'])}"
        for row in (run.results or {}).get("between") or ()
    ]


def stages(run: Run) -> list[tuple[str, bool]]:
    """The run's stages in order, and whether it has left their files."""
    making = [
        ("Known answers", "known" in run.responses),
        ("Features", run.pack is not None or run.features is not None),
        ("Gate 1", run.gate is not None),
    ]
    return [
        ("Questions", run.questions is not None),
        ("Baseline answers", "baseline" in run.responses),
        *([] if run.is_given_pack else making),
        ("Training", run.train is not None),
        ("Evaluation", bool(arm_cards(run))),
    ]


def missing(run: Run, file: str, stage: str) -> str:
    """Why a section is empty, in one or two sentences."""
    stopped = f"{file} is not in this run directory: the run did not reach {stage}."
    trains = stage in ("training", "the final evaluation")
    if trains and run.gate and run.gate["verdict"] != "pass" and run.train is None:
        return f"{stopped} It stopped after Gate 1, whose verdict is “{run.gate['verdict']}”."
    done = [name for name, reached in stages(run) if reached]
    return f"{stopped} The last stage with files is “{done[-1]}”." if done else stopped


def baseline_line(run: Run) -> str:
    """The untrained model's right answers, as plain counts: all that can be said of accuracy before training."""
    frame = run.responses.get("baseline")
    if frame is None:
        return ""
    right, questions = int(frame["correct"].fillna(False).astype(bool).sum()), frame["question_id"].nunique()
    return f"Before training, {right} of {len(frame)} answers to {questions} UNKNOWN questions were right."


def facts(run: Run) -> list[tuple[str, str]]:
    """The summary's name-value pairs; a fact that no file holds is left out."""
    config, pack = run.config or {}, run.pack or {}
    runtime = (run.results or {}).get("runtime_s")
    found = [
        ("Model", config.get("model") or pack.get("model_name")),
        ("Task", config.get("questions")),
        ("Tested on", config.get("eval_questions")),
        ("Questions", _split_counts(run)),
        ("SAE", _sae_words(pack)),
        ("SAE quality", _quality_words(run.sae)),
        ("Pack", _pack_words(pack)),
        ("Arms", ", ".join(map(f.arm_label, run.arms)) or None),
        ("Seed", (run.manifest or {}).get("seed", config.get("seed"))),
        ("Device", (run.manifest or {}).get("device", config.get("device"))),
        ("Runtime, last start", None if runtime is None else f.duration(runtime)),
    ]
    return [(name, f.scalar(value)) for name, value in found if value is not None]


def _split_counts(run: Run) -> str | None:
    if run.questions is None:
        return None
    counts = run.questions["split"].value_counts()
    return f"{counts.get('known', 0)} KNOWN, {counts.get('unknown', 0)} UNKNOWN"


def _sae_words(pack: dict[str, Any]) -> str | None:
    sae = pack.get("sae")
    if not sae:
        return None
    name = " / ".join(part for part in (sae.get("release"), sae.get("sae_id")) if part)
    return f"{name}, block {sae['layer']}, {sae['d_model']} → {f.count(sae['d_sae'])}"


def _quality_words(sae: dict[str, Any] | None) -> str | None:
    if sae is None:
        return None
    return f"FVU {f.number(sae['fvu'])}, L0 {f.number(sae['l0'], 1)}, dead {f.percent(sae['dead_share'])}"


def _pack_words(pack: dict[str, Any]) -> str | None:
    if not pack:
        return None
    total = len(pack["features"])
    return f"{total} feature{'' if total == 1 else 's'}, {pack.get('pooling', 'mean')} pooled"
