"""`mechreward eval`: accuracy on questions; with `--fuzz`, whether it and a pack's signal survive another wording."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

from mechreward.cli.asking import answered, asked, load_given_reward
from mechreward.cli.eval_settings import EvalSettings
from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.terminal import RichProgress, console, print_path
from mechreward.errors import InputError
from mechreward.files import make_folder, write_json

if TYPE_CHECKING:
    from mechreward.chains import Examiner
    from mechreward.tasks import Question, Variation


def evaluate(arguments: list[str], prog: str) -> int:
    """Asks, judges, prints and writes; 1 if a pack is brittle."""
    settings = parse_settings(EvalSettings, arguments, prog)
    quiet()
    from mechreward.features import save_pack
    from mechreward.gates import check_held_out
    from mechreward.gates.reading import read_scores
    from mechreward.gates.rephrasing import ORIGINAL, FamilyAnswer, accuracies, consistency, judge_signal
    from mechreward.inputs import verifier_of
    from mechreward.models import load_model
    from mechreward.rollout import check_answers, save_responses, tokenise_prompts, verify_responses
    from mechreward.tiny import model_path

    _check(settings)
    verifier = verifier_of(settings.verifier, settings.strictness)
    assert settings.questions is not None
    questions = asked(settings, settings.questions, settings.limit)
    check_answers(questions, verifier)
    reward = None
    if settings.pack is not None:
        reward = load_given_reward(settings, settings.pack, settings.model, settings.device)
    variations, left_out = _vary(settings, settings.questions) if settings.fuzz else ([], {})
    make_folder(settings.out)
    loaded = load_model(
        model_path(settings.model), adapter=settings.adapter, dtype=settings.dtype, device=settings.device
    )
    if reward is not None:
        reward.check_model(loaded.model)
        prompts = tokenise_prompts(loaded, questions, max_new_tokens=settings.max_new_tokens, chat=settings.chat)
        check_held_out(reward.pack, prompts)
    every = [*questions, *(variation.question for variation in variations)]
    total = len(every) * settings.samples
    with RichProgress().stage(f"ask {len(every)} questions x {settings.samples}", total) as advance:
        drawn = answered(settings, loaded, every, settings.samples, advance)
    responses = verify_responses(drawn, every, verifier)
    save_responses(settings.out / "responses.parquet", responses)
    family = {q.id: (q.id, ORIGINAL) for q in questions} | {v.question.id: (v.of, v.kind) for v in variations}
    answers = [FamilyAnswer(*family[r.question_id], r.question_id, bool(r.correct)) for r in responses]
    found: dict[str, Any] = {"n_questions": len(questions), "accuracy": accuracies(answers)}
    if settings.fuzz:
        found["n_variations"] = len(variations)
        found["agreement"] = consistency(answers)
    if settings.examiner is not None:
        found["examiner"] = {"name": settings.examiner_model or settings.examiner, "left_out": left_out}
    if reward is not None:
        with RichProgress().stage(f"read {len(responses)} answers"):
            scores = read_scores(reward, [], responses, loaded).judged_N
        signal = judge_signal(answers, list(scores), seed=settings.seed)
        found |= {"signal": asdict(signal), "spec_hash": reward.spec_hash}
        mark = {"rephrasing": signal.mark(reward.spec_hash, answers)}
        save_pack(reward.pack.model_copy(update=mark), settings.out / "pack.json")
    write_json(settings.out / "eval.json", _finite(found))
    _show(found)
    for name in ("eval.json", "responses.parquet", *(["pack.json"] if reward is not None else [])):
        print_path("wrote", settings.out / name)
    return 1 if reward is not None and found["signal"]["verdict"] == "brittle" else 0


def _check(settings: EvalSettings) -> None:
    if settings.questions is None:
        raise InputError("questions: is needed; give a file, tiny:easy, reasoning-gym:NAME or a dataset id")
    if settings.kinds and not settings.fuzz:
        raise InputError(f"kinds: {', '.join(settings.kinds)} are asked for without --fuzz; give both or neither")
    if settings.examiner is not None and not settings.fuzz:
        raise InputError(f"examiner: {settings.examiner} has nothing to put in other words without --fuzz")
    if settings.examiner_model is not None and not _is_endpoint(settings):
        raise InputError(f"examiner_model: {settings.examiner_model} is asked at an address; give it as --examiner")
    if _is_endpoint(settings) and settings.examiner_model is None:
        raise InputError(f"examiner_model: is needed; name the model to ask at {settings.examiner}")
    if settings.pack is not None and not settings.fuzz:
        raise InputError("pack: its signal is compared on variations; give --fuzz too, or judge it by mechreward gate")
    if settings.pack is not None and settings.samples < 2:
        raise InputError(
            f"samples: {settings.samples} answer a question allows no comparison within it; give 2 or more"
        )


def _vary(settings: EvalSettings, source: str) -> tuple[list[Variation], dict[str, str]]:
    """What is varied is the bare question: in the prompt's format an aside would land before its worked examples.

    Returns:
        The variations, and which questions the examiner gave none of, by id, with the reason.
    """
    from mechreward.tasks.fuzz import allowed_kinds, fuzz
    from mechreward.tasks.load import PLACEHOLDER

    questions = asked(settings.model_copy(update={"prompt_format": PLACEHOLDER}), source, settings.limit)
    kinds = settings.kinds or allowed_kinds(questions)
    if not settings.kinds:
        console.print(f"kinds: {', '.join(kinds)}, those that the questions' text allows")
    made = fuzz(questions, kinds, settings.variations, settings.seed)
    left_out: dict[str, str] = {}
    if settings.examiner is not None:
        reworded, left_out = _reworded(settings, questions)
        made += reworded
    prompts = [settings.prompt_format.replace(PLACEHOLDER, one.question.prompt) for one in made]
    told = [replace(v, question=replace(v.question, prompt=p)) for v, p in zip(made, prompts, strict=True)]
    return told, left_out


def _reworded(settings: EvalSettings, questions: list[Question]) -> tuple[list[Variation], dict[str, str]]:
    from mechreward.chains import reword

    examiner = _examiner(settings)
    make_folder(settings.out)
    with RichProgress().stage(f"{len(questions)} questions in the words of {examiner.name}"):
        made, left_out = reword(examiner, questions, path=settings.out / "claims.jsonl")
    if not made:
        raise InputError(
            f"examiner: {examiner.name} gave no usable paraphrase of {len(questions)} questions: "
            f"{next(iter(left_out.values()))}"
        )
    if left_out:
        console.print(f"{len(left_out)} of {len(questions)} paraphrases are left out; eval.json has the reasons")
    return made, left_out


def _examiner(settings: EvalSettings) -> Examiner:
    from mechreward.chains import EndpointExaminer, LocalExaminer
    from mechreward.models import load_model
    from mechreward.tiny import model_path

    assert settings.examiner is not None
    if settings.examiner_model is not None:
        return EndpointExaminer(settings.examiner, settings.examiner_model, key=os.environ.get("OPENAI_API_KEY"))
    loaded = load_model(model_path(settings.examiner), dtype=settings.dtype, device=settings.device)
    return LocalExaminer(loaded, chat=loaded.tokenizer.chat_template is not None)


def _is_endpoint(settings: EvalSettings) -> bool:
    return settings.examiner is not None and settings.examiner.startswith(("http://", "https://"))


def _finite(value: Any) -> Any:
    """Undefined statistics (NaN) as None, which is what JSON has for them."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and value != value else value


def _show(found: dict[str, Any]) -> None:
    table = Table("", "value", "95 %", "n", box=None)
    for kind, row in found["accuracy"].items():
        table.add_row(f"accuracy, {kind}", f"{row['value']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}", str(row["n"]))
    for where, row in found.get("agreement", {}).items():
        name = "answers to two wordings agree" if where == "across" else "answers to one wording agree"
        table.add_row(
            name, f"{row['value']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}", f"{row['n_families']} families"
        )
    if "signal" in found:
        for name, label in (("originals", "AUROC, originals"), ("variations", "AUROC, variations"), ("kept", "kept")):
            row = found["signal"][name]
            n = f"{found['signal']['n_mixed']} mixed families"
            table.add_row(label, f"{row['value']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}", n)
    console.print(table)
    if "signal" in found:
        console.print(f"[bold]under another wording the pack's signal: {found['signal']['verdict']}[/]")
