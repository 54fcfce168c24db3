"""`mechreward serve` on the bundled reasoner: a process of its own, and what it refuses before it loads anything."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mechreward.cli.main import main
from mechreward.cli.serve import _is_loopback, load_scorer
from mechreward.cli.serve_settings import ServeSettings
from mechreward.features import FeaturePack, PackFeature, sae_ref, save_pack
from mechreward.integrations.client import RewardClient
from mechreward.integrations.protocol import Row
from mechreward.sae import load_sae
from mechreward.tiny import SAE_FOLDER

ROW = Row(prompt="3 + 4 =", completion=" #### 7", answer="7")


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    sae = load_sae(SAE_FOLDER)
    features = [PackFeature(id=111, weight=1.0, scale=100.0), PackFeature(id=353, weight=-1.0, scale=100.0)]
    path = tmp_path_factory.mktemp("packs") / "plus.json"
    save_pack(FeaturePack(name="plus", model_name="tiny", sae=sae_ref(sae), features=features), path)
    return path


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *map(str, arguments)])
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_process_that_serves_and_ends_with_ctrl_c(pack, tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hush\n")
    flags = f"--pack {pack} --ungated --port 0 --verifier gsm8k_exact_match --token-file {secret} --device cpu"
    flags += " --mode sum --weight 0.25 --max-rows 7"
    command = [sys.executable, "-m", "mechreward", "serve", *flags.split()]
    # What a shell puts in the background ignores SIGINT, and so do its children.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})
    signal.signal(signal.SIGINT, handler)
    try:
        assert process.stdout is not None
        url = next(line.strip() for line in process.stdout if line.startswith("MECHREWARD_URL="))
        client = RewardClient(url.removeprefix("MECHREWARD_URL="), "hush")
        [score] = asyncio.run(client.score([ROW]))
        spec = asyncio.run(client.spec())
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    options = {"verifier": "gsm8k_exact_match", "device": "cpu", "mode": "sum", "weight": 0.25}
    scorer = load_scorer(ServeSettings(pack=str(pack), ungated=True, **options))
    assert [score] == scorer.score(scorer.read([ROW]))
    assert score.outcome == 1.0 and score.features and score.score == 1.0 + 0.25 * score.features
    assert any(score.token_rewards) and spec == scorer.spec(7)
    assert (spec.verifier, spec.model, spec.mode, spec.weight) == ("gsm8k_exact_match", "tiny", "sum", 0.25)


def test_a_pack_without_a_passed_gate_is_not_served(pack, capsys) -> None:
    said = refused(capsys, "--pack", pack, "--port", 0)
    assert "carries no passed gate" in said and said.endswith("serve it all the same with --ungated")


def test_others_are_not_let_in_without_a_secret(pack, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("MECHREWARD_TOKEN", raising=False)
    said = refused(capsys, "--pack", pack, "--host", "0.0.0.0")
    assert said.startswith("error host: 0.0.0.0 can be reached by others")
    empty = tmp_path / "empty"
    empty.write_text(" \n")
    assert refused(capsys, "--pack", pack, "--token-file", empty).endswith("is empty; a secret is needed")
    assert refused(capsys, "--pack", pack, "--token-file", tmp_path / "no").startswith("error token_file: cannot read")


@pytest.mark.parametrize(
    "host,inside",
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("10.0.0.1", False), ("example.org", False), ("127.0.0.1.example.org", False)],
)  # fmt: skip
def test_loopback(host, inside) -> None:
    assert _is_loopback(host) is inside


def test_what_is_wrong_is_said_before_anything_is_loaded(pack, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"error host, port: cannot listen on 127.0.0.1:{port}" in refused(capsys, "--pack", pack, "--port", port)
    assert refused(capsys, "--pack", pack, "--port", 70000).startswith("error port: 70000 is not allowed")
    assert refused(capsys, "--pack", "no.json", "--port", 0).startswith("error pack: ")
    assert refused(capsys, "--pack", pack, "--port", 0, "--verifier", "gsm").startswith("error verifier: ")
    assert refused(capsys, "--pack", pack, "--weight", -1).startswith("error weight: -1.0 is not allowed")


def test_without_the_extra(pack, capsys, monkeypatch) -> None:
    monkeypatch.setattr("mechreward.cli.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    assert refused(capsys, "--pack", pack).endswith('install them with pip install "mechreward[serve]"')


def test_a_pack_of_the_first_mechreward_takes_layer_and_size_from_its_sae(tmp_path) -> None:
    sae = load_sae(SAE_FOLDER)
    reference = {"release": sae.meta.release, "sae_id": sae.meta.sae_id}
    path = tmp_path / "first.json"
    path.write_text(json.dumps({"name": "m/first", "model_name": "tiny", **reference, "feature_weights": {"111": 0.5}}))
    scorer = load_scorer(ServeSettings(pack=str(path), ungated=True, device="cpu"))
    spec = scorer.spec(1)
    assert (spec.name, spec.layer, spec.feature_ids) == ("m/first", sae.meta.layer, [111])
