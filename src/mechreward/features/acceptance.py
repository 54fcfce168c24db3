"""The contribution check: what keeps a pack out of the catalogue.

Strictness of the file is `load_pack`'s; here is what a well-formed pack needs besides, so that somebody else can doubt
it: our own passed gate for exactly this reward, the form of the prompts, and enough provenance to make it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechreward.errors import InputError
from mechreward.features.pack import FeaturePack, check_pack

if TYPE_CHECKING:
    from mechreward.sae import SAE

PROVENANCE = ("questions", "questions_license", "command", "seed", "sae_training")
"""What `provenance` has to tell: where the questions come from and under what licence, how to make the pack again, and
how its SAE was trained."""


def unacceptable(pack: FeaturePack, sae: SAE | None = None, *, reported: bool = False) -> list[str]:
    """What is wanting, a sentence each; none for a pack that may go into the catalogue.

    Args:
        pack: as loaded, so that its schema and ids hold.
        sae: its SAE, to check that they belong together.
        reported: take figures that its authors report in the place of a gate of ours, a prompt and provenance.
    """
    findings = [] if sae is None else _of_sae(pack, sae)
    if reported and pack.reported is not None:
        return findings + ([] if pack.reported.reading else ["reported.reading: is empty; say what the figures mean"])
    return findings + _of_gate(pack) + _of_making(pack)


def _of_sae(pack: FeaturePack, sae: SAE) -> list[str]:
    try:
        check_pack(pack, sae)
    except InputError as error:
        return [str(error)]
    return []


def _of_gate(pack: FeaturePack) -> list[str]:
    found = pack.validation
    if found is None:
        claimed = "" if pack.reported is None else f"; what is there is {pack.reported.status}"
        return [f"validation: Gate 1 has not judged the pack{claimed}"]
    findings = []
    if found.spec_hash != pack.spec_hash:
        findings.append(f"validation.spec_hash: is {found.spec_hash[:12]}, but the pack's is {pack.spec_hash[:12]}")
    if found.verdict != "pass":
        findings.append(f"validation.verdict: is {found.verdict}, must be pass")
    elif found.within_auroc is None or found.interval is None:
        findings.append("validation.interval: a passed gate has a within-question AUROC and its interval")
    return findings


def _of_making(pack: FeaturePack) -> list[str]:
    findings = [f"provenance.{key}: is missing" for key in PROVENANCE if pack.provenance.get(key) in (None, "")]
    if pack.prompt is None:
        findings.append("prompt: is missing; say how the questions were put")
    if pack.sae.weights_hash is None:
        findings.append("sae.weights_hash: is missing")
    return findings
