"""A whole training run in its directory: what it leaves, a kill in its middle, and mistakes found before it begins."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mechreward.sae.run as run_module
from mechreward.errors import InputError
from mechreward.files import read_json, read_jsonl
from mechreward.models import load_model
from mechreward.recipe import SAERecipe
from mechreward.rollout import load_responses
from mechreward.sae import TrainedSAE, TrainingPoint, load_sae
from mechreward.sae.run import Teller, prepare, run_recipe
from mechreward.sae.run import _rows as rows_of
from mechreward.settings import make_settings
from mechreward.tiny import MODEL

QUICK: dict[str, Any] = {
    "task": ("tiny:easy",),
    "limit": 24,
    "layer": 1,
    "own_answers": 1,
    "max_new_tokens": 8,
    "expansion": 2,
    "k": 8,
    "tokens": 640,
    "batch_size": 64,
    "lr": 2e-3,
    "held_out_tokens": 60,
    "eval_every": 2,
    "save_every": 3,
}


class Killed(Exception):
    """Stands for a kill: nothing of ours catches it."""


def recipe(out: Path, **changes: Any) -> SAERecipe:
    return make_settings(SAERecipe, {**QUICK, "out": out, **changes})


def killed_after(tokens: int) -> Teller:
    def on_step(seen: int, _loss: float) -> None:
        if seen >= tokens:
            raise Killed

    return Teller(on_step=on_step)


def left_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainedSAE, list[TrainingPoint]]:
    out, points = tmp_path_factory.mktemp("sae") / "run", []
    trained = run_recipe(recipe(out), Teller(on_point=points.append))
    return out, trained, points


def test_the_folder_is_an_sae_that_sae_lens_loads_and_encodes_identically(whole: tuple[Path, TrainedSAE, Any]) -> None:
    from sae_lens import SAE as LensSAE

    out, trained, _ = whole
    ours, theirs = load_sae(out), LensSAE.load_from_disk(out)
    assert ours.weights_hash == trained.sae.weights_hash
    h = torch.randn(64, 128) * 3
    assert torch.equal(ours.encode(h), trained.sae.encode(h))
    torch.testing.assert_close(ours.encode(h), theirs.encode(h), atol=1e-5, rtol=1e-5)
    assert ours.meta.release == str(out)
    assert (ours.meta.layer, ours.meta.hook_name, ours.meta.model_name) == (1, "model.layers.1", "tiny")
    torch.testing.assert_close(ours.frequency_F, trained.sae.frequency_F, atol=1e-6, rtol=1e-5)


def test_the_records_of_a_run(whole: tuple[Path, TrainedSAE, list[TrainingPoint]]) -> None:
    out, trained, points = whole
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "manifest.json", "responses.parquet", "metrics.jsonl", "results.json", "cfg.json",
        "sae_weights.safetensors", "sparsity.safetensors",
    }  # fmt: skip
    assert read_jsonl(out / "metrics.jsonl") == [vars(point) for point in points]
    assert [point.step for point in points] == [2, 4, 6, 8, 10]
    last = points[-1]
    numbers = {"fvu": last.fvu, "l0": last.l0, "dead_share": last.dead_share}
    assert read_json(out / "results.json") == {**numbers, "n_held_out": 60}
    assert (trained.fvu, trained.n_held_out) == (last.fvu, 60)
    assert len(load_responses(out / "responses.parquet")) == 24
    assert set(read_json(out / "manifest.json")["hashes"]) == {"rows", "model"}


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "jumprelu"])
def test_a_killed_run_goes_on_to_the_very_same_result(tmp_path: Path, architecture: str) -> None:
    # Long enough for features to count as dead (ten steps without firing) across a kill.
    options = {"architecture": architecture, "own_answers": 0, "tokens": 24 * 64, "save_every": 8}
    run_recipe(recipe(tmp_path / "whole", **options))
    # Killed in step 12, after the checkpoint of step 8 and the measurement of step 10; and again in step 20.
    for tokens, resume in ((12 * 64, False), (20 * 64, True)):
        with pytest.raises(Killed):
            run_recipe(recipe(tmp_path / "killed", **options, resume=resume), killed_after(tokens))
        assert (tmp_path / "killed" / "checkpoint.pt").exists()
        assert not (tmp_path / "killed" / "cfg.json").exists()
    steps: list[int] = []
    run_recipe(
        recipe(tmp_path / "killed", **options, resume=True),
        Teller(on_step=lambda tokens, _: steps.append(tokens // 64)),
    )
    assert steps == list(range(17, 25))
    left, wanted = left_in(tmp_path / "killed"), left_in(tmp_path / "whole")
    # The folder's own name is in the configuration.
    for files in (left, wanted):
        files["cfg.json"] = files["cfg.json"].replace(b"killed", b"whole")
    assert left == wanted


def test_a_run_killed_while_it_sampled_goes_on_to_the_same_result(
    tmp_path: Path, whole: tuple[Path, TrainedSAE, Any]
) -> None:
    def on_answers(done: int, total: int) -> None:
        assert (done <= total, total) == (True, 24)
        raise Killed

    with pytest.raises(Killed):
        run_recipe(recipe(tmp_path / "run"), Teller(on_answers=on_answers))
    trained = run_recipe(recipe(tmp_path / "run", resume=True))
    assert trained.sae.weights_hash == whole[1].sae.weights_hash


@pytest.mark.slow
def test_a_process_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from mechreward.recipe import SAERecipe\nfrom mechreward.sae.run import Teller, run_recipe\n"
        "kill = lambda seen, loss: os.kill(os.getpid(), signal.SIGKILL) if seen >= 8 * 64 else None\n"
        "run_recipe(SAERecipe.model_validate_json(sys.argv[1]), Teller(on_step=kill))\n"
    )
    killed = recipe(tmp_path / "killed", own_answers=0)
    process = subprocess.run([sys.executable, "-c", script, killed.model_dump_json()], capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL
    resumed = run_recipe(killed.model_copy(update={"resume": True}))
    assert resumed.sae.weights_hash == run_recipe(recipe(tmp_path / "whole", own_answers=0)).sae.weights_hash


def test_a_finished_run_is_not_trained_again(whole: tuple[Path, TrainedSAE, Any]) -> None:
    out, trained, _ = whole
    again = run_recipe(recipe(out, resume=True), killed_after(0))
    assert (again.sae.weights_hash, again.fvu, again.l0) == (trained.sae.weights_hash, trained.fvu, trained.l0)


def test_another_seed_another_sae_of_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"Ada buys {n} apples" for n in range(40)))
    same = {"text": (str(tmp_path / "a.txt"),), "task": (), "own_answers": 0}
    hashes = [run_recipe(recipe(tmp_path / str(seed), seed=seed, **same)).sae.weights_hash for seed in (0, 1)]
    assert hashes[0] != hashes[1]


def test_a_resumed_run_keeps_its_settings_and_its_data(tmp_path: Path, whole: tuple[Path, TrainedSAE, Any]) -> None:
    with pytest.raises(InputError, match="out: .* holds a run already"):
        run_recipe(recipe(whole[0]))
    with pytest.raises(InputError, match=r"k: 9 is not what the run in .* was started with \(8\)"):
        run_recipe(recipe(whole[0], k=9, resume=True))
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Ada buys {n} apples" for n in range(40)))
    options = {"text": (str(path),), "task": (), "own_answers": 0}
    with pytest.raises(Killed):
        run_recipe(recipe(tmp_path / "run", **options), killed_after(64))
    path.write_text("\n\n".join(f"Ben buys {n} apples" for n in range(40)))
    with pytest.raises(InputError, match="resume: rows changed since the run in"):
        run_recipe(recipe(tmp_path / "run", **options, resume=True))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run_recipe(recipe(tmp_path, own_answers=0), killed_after(4 * 64))
    path = tmp_path / "checkpoint.pt"
    for damaged in (path.read_bytes()[:5000], b"", b"no checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="resume: .*checkpoint.pt is damaged or cut short"):
            run_recipe(recipe(tmp_path, own_answers=0, resume=True))


def test_sources_are_mixed_and_kept_apart_by_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Ada buys {n} apples" for n in range(40)))
    mixed = recipe(tmp_path / "run", text=(str(path),), task=("tiny:easy", "tiny:long"), own_answers=0)
    sources = prepare(mixed)
    assert (len(sources.texts), len(sources.questions), len({q.id for q in sources.questions})) == (24, 48, 48)
    training, held_out = rows_of(mixed, sources, [])
    tokenizer = load_model(MODEL).tokenizer
    texts = [tokenizer.decode(completion) for _, completion in training]
    assert {"Ada buys" in text for text in texts} == {True, False}
    # One in twenty of all 72 documents: of the text, of the first and of the second task.
    assert held_out == [row for document in [*sources.texts, *sources.asked][::20] for row in document]
    assert len(training) + len(held_out) == 72
    solved = [text for text in texts if "####" in text]
    asked = {q.prompt for q in sources.questions}
    # BOS is the row's prompt, so the text is whole: the question, a space, the chain.
    assert all(any(text.strip().startswith(prompt) for prompt in asked) for text in solved)
    assert len(solved) == 46


def test_packed_rows_train_as_well(tmp_path: Path) -> None:
    packed = recipe(tmp_path / "run", own_answers=0, packed=True, row_tokens=100)
    training, held_out = rows_of(packed, prepare(packed), [])
    assert {len(completion) for _, completion in training[:-1]} == {99}
    assert run_recipe(packed).n_held_out <= sum(len(completion) for _, completion in held_out)


@pytest.mark.parametrize(("context", "longest"), [(256, 256), (4096, 512), (None, 512)])
def test_rows_are_as_long_as_a_short_context_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: int | None, longest: int
) -> None:
    asked: list[int] = []

    def text_documents(_tokenizer: object, _texts: object, max_tokens: int) -> None:
        asked.append(max_tokens)
        raise InputError("stop")

    monkeypatch.setattr(run_module, "context_length", lambda _model: context)
    monkeypatch.setattr(run_module, "text_documents", text_documents)
    with pytest.raises(InputError, match="stop"):
        prepare(recipe(tmp_path / "run"))
    assert asked == [longest]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ()}, "text, task: neither was given"),
        ({"task": (), "text": ("none.txt",)}, "own_answers: 1 answers to no question"),
        ({"task": ("none.jsonl",)}, "there is no file none.jsonl"),
        ({"text": ("none.txt",)}, "text: there is no file none.txt"),
        ({"layer": 9}, "layer: 9 is out of range; the model has blocks 0 to 4"),
        ({"k": 999}, "k: 999 is not between 1 and the SAE's 256 features"),
        ({"widths": (9,)}, r"widths: \[9\] are for matryoshka"),
        ({"tokens": 10}, "tokens: 10 is less than one batch of 64"),
        ({"row_tokens": 10**6}, "row_tokens: 1000000 is more than the model reads"),
        ({"max_new_tokens": 10**6}, "questions: 0:tiny-easy-0-0 needs"),
        ({"limit": 5}, "rows: 5 are too few to train and measure an SAE on"),
        ({"chat": True}, "chat: the tokenizer of .* has no chat template"),
        ({"model": "./nowhere"}, "model: there is no folder ./nowhere"),
        ({"device": "tpu9"}, "device: 'tpu9' is not a torch device"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_recipe(recipe(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_hybrid_decoder_from_its_own_folder(
    tmp_path: Path, tiny_model: Callable[[str], Any], char_tokenizer: Any
) -> None:
    tiny_model("qwen3_5").save_pretrained(tmp_path / "model")
    char_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": f"{a}+{b}={a + b}; {b}-1={b - 1}"} for a in range(6) for b in range(7)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"model": str(tmp_path / "model"), "text": (str(tmp_path / "t.jsonl"),), "task": (), "own_answers": 0}
    trained = run_recipe(recipe(tmp_path / "run", **source, layer=2, limit=None, row_tokens=64, k=4))
    assert load_sae(tmp_path / "run").meta.hook_name == "model.layers.2"
    assert (trained.sae.d_model, trained.sae.d_sae) == (32, 64)
    assert 0 < trained.fvu < 1
