"""What would spoil the reading of the phantom's notebook.

Two processes, every finding in both views, fuzzing, and an oracle for the scores.
"""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from cvt2distilgpt2.phantom import (
    AFFIRM,
    DENY,
    FINDINGS,
    NAMES,
    OWN_DENIAL,
    VIEWS,
    Finding,
    _deny,
    allowed_details,
    draw,
    finding_scores,
    parse_report,
    sample_phantom,
    write_report,
)


def all_findings():
    "Every finding that can be drawn."
    findings = []
    for type in FINDINGS:
        for side in allowed_details(type)["side"]:
            details = allowed_details(type, side)
            for place in details["place"]:
                findings += [Finding(type, side, place, size) for size in details["size"]]
    return findings


ALL = all_findings()


def name_of(finding):
    return " ".join(filter(None, (finding.size, finding.side, finding.type, finding.place)))


def noiseless(phantom, view="frontal"):
    "The image that so many photons make that their noise cannot be seen."
    quiet = replace(phantom, anatomy=replace(phantom.anatomy, exposure=1e12))
    return draw(quiet, view).astype(float)


DIGEST = """
import hashlib
from cvt2distilgpt2.phantom import VIEWS, draw, sample_phantom
digest = hashlib.sha256()
for seed in range(8):
    study = sample_phantom((seed, 1))
    digest.update(repr(study).encode())
    for view in VIEWS:
        digest.update(draw(study, view, 96).tobytes())
print(digest.hexdigest())
"""


def digest_with(hash_seed):
    "The digest of eight studies that another process draws."
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.check_output([sys.executable, "-c", DIGEST], env=environment)


def test_two_processes_draw_the_same():
    assert digest_with("1") == digest_with("2")


def test_labels_and_words_are_those_of_other_machines():
    text = "\n".join(f"{p.findings} {p.report}" for p in map(sample_phantom, range(50)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2cfc850a926c50b9"


def test_order_of_drawing_does_not_matter():
    phantom = sample_phantom(3)
    first = draw(phantom, "frontal", 64)
    draw(sample_phantom(4))
    draw(phantom, "lateral", 64)
    assert (draw(phantom, "frontal", 64) == first).all()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("finding", ALL, ids=name_of)
def test_finding_is_seen_on_its_side(finding, seed):
    "The change is larger than the noise, on the right side, and in both views."
    ill = sample_phantom(seed, [finding])
    well = sample_phantom(seed, [])
    assert replace(ill.anatomy, heart=0) == replace(well.anatomy, heart=0)
    change = abs(noiseless(ill) - noiseless(well))
    visible = change > 6
    noise = (draw(ill) - noiseless(ill))[visible].std()
    assert visible.sum() > 30
    assert change[visible].mean() > 3 * noise
    if finding.side:
        centre = (change.sum(0) @ np.arange(128)) / change.sum()
        assert (centre > 64) == (finding.side == "left")
    assert (abs(noiseless(ill, "lateral") - noiseless(well, "lateral")) > 6).sum() > 8


@pytest.mark.parametrize("size", [32, 97, 224, 384])
@pytest.mark.parametrize("view", VIEWS)
def test_any_size(view, size):
    with np.errstate(all="raise", under="ignore"):
        for seed in range(4):
            image = draw(sample_phantom(seed), view, size)
            assert image.shape == (size, size)
            assert image.dtype == np.uint8
            assert image.min() < 10 and image.max() > 180
            assert image.std() > 40


@pytest.mark.parametrize("n", [2_000, pytest.param(20_000, marks=pytest.mark.full)])
def test_round_trip(n):
    for seed in range(n):
        phantom = sample_phantom((seed, 77))
        assert parse_report(phantom.report) == phantom.findings, phantom.report
        assert 15 <= len(phantom.report.split()) <= 70
        assert 2 <= phantom.report.count(".") <= 8


def test_every_finding_has_four_wordings_and_four_denials():
    for type in FINDINGS:
        assert len(AFFIRM[type]) >= 4
        assert len(DENY) * len(NAMES[type]) + len(OWN_DENIAL[type]) >= 4


@pytest.mark.parametrize("finding", ALL, ids=name_of)
def test_every_affirmation_is_read(finding):
    for wording in AFFIRM[finding.type]:
        text = wording.format(s=finding.side, p=finding.place, z=finding.size)
        assert parse_report(text) == (finding,), text


@pytest.mark.parametrize("type", FINDINGS)
def test_every_denial_affirms_nothing(type):
    denials = [wording.format(name) for wording in DENY for name in NAMES[type]]
    for text in (*OWN_DENIAL[type], *denials):
        assert parse_report(text) == (), text


def test_denials_of_several_findings_affirm_nothing():
    for seed in range(300):
        rng = np.random.default_rng(seed)
        types = list(rng.choice(FINDINGS, rng.integers(1, 4), replace=False))
        assert parse_report(_deny(types, rng)) == ()


def test_two_on_both_sides():
    both = [
        Finding("nodule", "right", "mid zone"),
        Finding("nodule", "left", "mid zone"),
        Finding("fracture", "left"),
        Finding("fracture", "right"),
    ]
    phantom = sample_phantom(1, both)
    assert set(phantom.findings) == set(both)
    assert parse_report(phantom.report) == phantom.findings
    assert draw(phantom).std() > 40
    assert parse_report(write_report(both, np.random.default_rng(1))) == phantom.findings


def test_case_and_repetition_change_nothing():
    for seed in range(1_000):
        report = sample_phantom(seed).report
        assert parse_report(report + " " + report) == parse_report(report)
        assert parse_report(report.upper()) == parse_report(report)


def test_fewer_sentences_affirm_no_more():
    rng = np.random.default_rng(0)
    for seed in range(1_000):
        report = sample_phantom(seed).report
        sentences = report.split(". ")
        part = ". ".join(sentences[: rng.integers(len(sentences))])
        assert set(parse_report(part)) <= set(parse_report(report))


def test_odd_reports_affirm_only_what_may_be():
    rng = np.random.default_rng(0)
    words = {word for seed in range(300) for word in sample_phantom(seed).report.split()}
    words = sorted(words) + ["", ",", "NOT", "ünïcode", "\n", "left left"]
    for seed in range(1_000):
        report = sample_phantom(seed).report
        cut = report[: rng.integers(len(report))]
        for text in (cut, " ".join(rng.choice(words, 40))):
            for finding in parse_report(text):
                assert finding.type in FINDINGS
                for detail, allowed in allowed_details(finding.type, "right").items():
                    value = getattr(finding, detail)
                    assert value is None or value in allowed


def indicators(phantoms):
    "(n, 12): 1 where a study has a finding of that type."
    rows = []
    for phantom in phantoms:
        present = {finding.type for finding in phantom.findings}
        rows.append([type in present for type in FINDINGS])
    return np.array(rows, int)


def test_scores_against_scikit_learn():
    studies = [sample_phantom((seed, 1)) for seed in range(200)]
    guesses = studies[:100] + [sample_phantom((seed, 2)) for seed in range(100, 200)]
    table = finding_scores([p.report for p in guesses], [p.findings for p in studies])
    drawn = indicators(studies)
    guessed = indicators(guesses)
    for rows, average in (("micro", "micro"), ("macro", "macro"), (list(FINDINGS), None)):
        expected = precision_recall_fscore_support(
            drawn, guessed, average=average, zero_division=0
        )[:3]
        scores = np.array(table.loc[rows, ["precision", "recall", "f1"]], float)
        assert np.allclose(scores.T, np.array(expected))
    assert (table.support[list(FINDINGS)] == drawn.sum(0)).all()
    assert (table.predicted[list(FINDINGS)] == guessed.sum(0)).all()


def test_scores_of_detail():
    report = ["There is a left pneumothorax."]
    drawn = [[Finding("pneumothorax", "right")]]
    assert finding_scores(report, drawn).loc["micro", "f1"] == 1
    assert finding_scores(report, drawn, detail=True).loc["micro", "f1"] == 0


def test_scores_of_nothing_are_zero():
    assert (finding_scores([""], [[]]) == 0).all().all()


@pytest.mark.parametrize(
    "finding, message",
    [
        (Finding("gout"), "'gout' is not a finding"),
        (Finding("nodule"), "side must be"),
        (Finding("consolidation", "left", "middle lobe"), "place must be"),
        (Finding("edema", "left"), "side must be None"),
    ],
)
def test_findings_that_cannot_be_drawn_are_refused(finding, message):
    with pytest.raises(ValueError, match=message):
        sample_phantom(1, [finding])


def test_unknown_view_is_refused():
    with pytest.raises(ValueError, match="view must be"):
        draw(sample_phantom(1), "oblique")


def test_reports_without_studies_are_refused():
    with pytest.raises(ValueError, match="1 reports for 0 studies"):
        finding_scores(["a"], [])
