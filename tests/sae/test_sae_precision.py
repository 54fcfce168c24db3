"""A trainer's settings of precision, by either of torch's ways: without effect inside, and as they were afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mechreward.sae.precision import is_plain, plain_float32, stays_plain

MATMUL = torch.backends.cuda.matmul
# Every script runs in a process of its own: torch's two ways leave traces in each other. Each is a fork of one process
# that has imported torch and set nothing; a script that fails prints a traceback and leaves no line.
FORKS = """
import json, os, sys, torch
from threading import Event, Thread
from mechreward.sae import SAE, SAEMeta
from mechreward.sae.precision import is_plain, plain_float32

for name, script in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        exec(script)
        print(json.dumps([name, report]), flush=True)
        os._exit(0)
    os.wait()
"""

# SETTING is what a trainer writes; the last line sets what a backend without a setting of its own follows.
SCRIPT = """
def said():
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "contradiction"
    backends = torch.backends
    return [older, backends.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision]

sae = SAE("topk", torch.randn(6, 40), torch.zeros(40), torch.randn(40, 6), torch.zeros(6),
          SAEMeta("r", "", 0, "m", "model.layers.0"), k=3)
h, ids = torch.randn(4, 6), list(range(40))
pre = h.double() @ sae.W_enc_DF.double()
wanted = (pre.relu() * (pre >= pre.topk(3).values[:, -1:])).float()
SETTING
report = {"before": said()}
read = [sae.encode(h), sae.read(h, ids), sae.reader(ids)(h)]
report["right"] = all(torch.allclose(acts, wanted, atol=1e-6) for acts in read)
report["right"] &= torch.allclose(sae.decode(wanted).double(), wanted.double() @ sae.W_dec_FD.double(), atol=1e-5)
report["after"] = said()
with torch.no_grad():
    report["plain"] = is_plain(torch.device("cpu"))
with plain_float32(torch.device("cpu")):
    report["inside"], report["tf32 inside"] = said(), torch.backends.cuda.matmul.allow_tf32
torch.backends.fp32_precision = "ieee"
report["later"] = said()[2:]
"""


# Two readers at once, of which the first goes first.
THREADS = """
cpu, backends = torch.device("cpu"), torch.backends
said = lambda: [torch.get_float32_matmul_precision(), backends.cuda.matmul.fp32_precision,
                backends.mkldnn.matmul.fp32_precision, backends.cuda.matmul.allow_fp16_reduced_precision_reduction]
torch.set_float32_matmul_precision("high")
report, second_is_in, first_is_out = {"before": said()}, Event(), Event()

def first():
    with plain_float32(cpu):
        second_is_in.wait(10)
    first_is_out.set()

def second():
    with plain_float32(cpu):
        second_is_in.set()
        first_is_out.wait(10)
        report["alone"] = said()

threads = Thread(target=first), Thread(target=second)
[thread.start() for thread in threads]
[thread.join() for thread in threads]
report["after"] = said()
"""

# By name: what a trainer writes, what torch says then, whether that is plain float32, and the two backends' at the end.
SETTINGS = {
    "nothing": ("", ["highest", "none", "none", "none"], True, ["ieee", "ieee"]),
    "highest": (
        "torch.set_float32_matmul_precision('highest')",
        ["highest", "none", "ieee", "ieee"],
        True,
        ["ieee", "ieee"],
    ),
    "high": ("torch.set_float32_matmul_precision('high')", ["high", "none", "tf32", "tf32"], False, ["tf32", "tf32"]),
    "medium": (
        "torch.set_float32_matmul_precision('medium')",
        ["medium", "none", "tf32", "bf16"],
        False,
        ["tf32", "bf16"],
    ),
    "new, for all": (
        "torch.backends.fp32_precision = 'tf32'",  # as transformers does for tf32=True
        ["contradiction", "tf32", "tf32", "tf32"],
        False,
        ["ieee", "ieee"],
    ),
    "new, of one backend": (
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        ["contradiction", "none", "tf32", "none"],
        False,
        ["tf32", "ieee"],
    ),
}


Reports = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def reports() -> Reports:
    """Runs every script once; gives the report of one, by its name."""
    scripts = {name: SCRIPT.replace("SETTING", setting) for name, (setting, *_) in SETTINGS.items()}
    command = [sys.executable, "-c", FORKS, json.dumps(scripts | {"threads": THREADS})]
    run = subprocess.run(command, capture_output=True, text=True)
    found = dict(json.loads(line) for line in run.stdout.splitlines())

    def report(name: str) -> dict[str, Any]:
        assert name in found, run.stderr
        return found[name]

    return report


@pytest.mark.parametrize("name", SETTINGS)
def test_whichever_way_a_trainer_says_it(reports: Reports, name: str) -> None:
    _, before, plain, later = SETTINGS[name]
    report = reports(name)
    assert report["before"] == report["after"] == before
    assert report["right"] is True
    assert report["plain"] is plain
    # All of what torch can be asked says the same.
    assert report["inside"] == ["highest", before[1], "ieee", "ieee"]
    assert report["tf32 inside"] is False
    # What followed the setting for all still does; what had one of its own keeps it.
    assert report["later"] == later


def test_threads_that_read_at_once_neither_lose_the_precision_nor_leave_it_behind(reports: Reports) -> None:
    report = reports("threads")
    assert report["alone"] == ["highest", "ieee", "ieee", False]
    assert report["before"] == report["after"] == ["high", "tf32", "tf32", True]


def test_what_is_plain_only_while_somebody_reads_does_not_stay_so() -> None:
    cpu = torch.device("cpu")
    with torch.no_grad():
        assert stays_plain(cpu)
        with plain_float32(cpu):
            assert is_plain(cpu) and not stays_plain(cpu)
        assert stays_plain(cpu)


@pytest.fixture
def sums() -> Iterator[None]:
    """How float16 is summed, put back afterwards."""
    yield
    MATMUL.allow_fp16_accumulation, MATMUL.allow_fp16_reduced_precision_reduction = False, True


def said_of_sums() -> tuple[bool, bool]:
    return MATMUL.allow_fp16_accumulation, MATMUL.allow_fp16_reduced_precision_reduction


@pytest.mark.usefixtures("sums")
@pytest.mark.parametrize("before", [(False, True), (True, True), (True, False)])
def test_half_precision_is_summed_in_float32(before: tuple[bool, bool]) -> None:
    MATMUL.allow_fp16_accumulation, MATMUL.allow_fp16_reduced_precision_reduction = before
    with pytest.raises(KeyboardInterrupt), plain_float32(torch.device("cpu")):
        assert said_of_sums() == (False, False)
        raise KeyboardInterrupt
    assert said_of_sums() == before


def test_neither_gradient_nor_autocast() -> None:
    cpu = torch.device("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_plain(cpu)
        with plain_float32(cpu):
            assert is_plain(cpu)
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert not is_plain(cpu)
    with torch.no_grad():
        assert is_plain(cpu)
