"What would spoil the reading of 00b_phantom: two processes, every finding in both views, fuzzing, an oracle for the scores."
import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from cvt2distilgpt2.phantom import (AFFIRM, DENY, FINDINGS, NAMES, OWN_DENIAL, VIEWS, Finding, allowed_details, deny, draw, finding_scores,
                                    parse_report, sample_phantom, write_report)

ALL = [Finding(t, side, place, size) for t in FINDINGS for side in allowed_details(t)["side"]
       for place in allowed_details(t, side)["place"] for size in allowed_details(t, side)["size"]]
name = lambda f: " ".join(filter(None, (f.size, f.side, f.type, f.place)))


def test_two_processes_draw_the_same():
    code = ("import hashlib; from cvt2distilgpt2.phantom import *; h = hashlib.sha256()\n"
            "for s in range(8):\n    p = sample_phantom((s, 1)); h.update(repr(p).encode()); [h.update(draw(p, v, 96).tobytes()) for v in VIEWS]\n"
            "print(h.hexdigest())")
    run = lambda seed: subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
    assert run("1") == run("2")


def test_labels_and_words_are_those_of_other_machines():
    text = "\n".join(f"{p.findings} {p.report}" for p in map(sample_phantom, range(50)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2cfc850a926c50b9"


def test_order_of_drawing_does_not_matter():
    p, other = sample_phantom(3), sample_phantom(4)
    first = draw(p, "frontal", 64)
    draw(other), draw(p, "lateral", 64)
    assert (draw(p, "frontal", 64) == first).all()


@pytest.mark.parametrize("finding", ALL, ids=name)
def test_finding_is_seen_on_its_side(finding):
    "The change is larger than the noise in the frontal image, on the right side of it, and there is one in the lateral image, too."
    for seed in (1, 2):
        ill, well = sample_phantom(seed, [finding]), sample_phantom(seed, [])
        assert replace(ill.anatomy, heart=0) == replace(well.anatomy, heart=0)
        quiet = lambda p, view: draw(replace(p, anatomy=replace(p.anatomy, exposure=1e12)), view).astype(float)
        change = abs(quiet(ill, "frontal") - quiet(well, "frontal"))
        seen = change > 6
        assert seen.sum() > 30 and change[seen].mean() > 3 * (draw(ill) - quiet(ill, "frontal"))[seen].std()
        if finding.side: assert ((change.sum(0) @ np.arange(128)) / change.sum() > 64) == (finding.side == "left")
        assert (abs(quiet(ill, "lateral") - quiet(well, "lateral")) > 6).sum() > 8


@pytest.mark.parametrize("size", [32, 97, 224, 384])
@pytest.mark.parametrize("view", VIEWS)
def test_any_size(view, size):
    with np.errstate(all="raise", under="ignore"):
        for seed in range(4):
            image = draw(sample_phantom(seed), view, size)
            assert image.shape == (size, size) and image.dtype == np.uint8 and image.min() < 10 and image.max() > 180 and image.std() > 40


@pytest.mark.parametrize("n", [2_000, pytest.param(20_000, marks=pytest.mark.full)])
def test_round_trip(n):
    for seed in range(n):
        p = sample_phantom((seed, 77))
        assert parse_report(p.report) == p.findings, p.report
        assert 15 <= len(p.report.split()) <= 70 and 2 <= p.report.count(".") <= 8


def test_every_wording():
    assert all(len(AFFIRM[t]) >= 4 for t in FINDINGS) and all(len(DENY) * len(NAMES[t]) + len(OWN_DENIAL[t]) >= 4 for t in FINDINGS)
    for f in ALL:
        for words in AFFIRM[f.type]: assert parse_report(words.format(s=f.side, p=f.place, z=f.size)) == (f,)
    for t in FINDINGS:
        for words in OWN_DENIAL[t] + tuple(d.format(n) for d in DENY for n in NAMES[t]): assert parse_report(words) == (), words
    for seed in range(300):
        rng = np.random.default_rng(seed)
        assert parse_report(deny(list(rng.choice(FINDINGS, rng.integers(1, 4), replace=False)), rng)) == ()


def test_two_on_both_sides():
    both = [Finding("nodule", s, "mid zone") for s in ("right", "left")] + [Finding("fracture", s) for s in ("left", "right")]
    p = sample_phantom(1, both)
    assert set(p.findings) == set(both) and parse_report(p.report) == p.findings and draw(p).std() > 40
    assert parse_report(write_report(both, np.random.default_rng(1))) == p.findings


def test_odd_reports():
    rng = np.random.default_rng(0)
    words = sorted({w for s in range(300) for w in sample_phantom(s).report.split()}) + ["", ",", "NOT", "ünïcode", "\n", "left left"]
    for seed in range(1_000):
        report = sample_phantom(seed).report
        assert parse_report(report + " " + report) == parse_report(report.upper()) == parse_report(report)
        sentences = report.split(". ")
        assert set(parse_report(". ".join(sentences[:rng.integers(len(sentences))]))) <= set(parse_report(report))
        for odd in (report[:rng.integers(len(report))], " ".join(rng.choice(words, 40))):
            for f in parse_report(odd):
                assert f.type in FINDINGS and all(v is None or v in allowed_details(f.type, "right")[d] for d, v in vars(f).items() if d != "type")


def test_scores_against_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support
    studies, guesses = ([sample_phantom((s, k)) for s in range(200)] for k in (1, 2))
    guesses[:100] = studies[:100]
    table = finding_scores([p.report for p in guesses], [p.findings for p in studies])
    hot = lambda ps: np.array([[t in {f.type for f in p.findings} for t in FINDINGS] for p in ps], int)
    for row, how in (("micro", "micro"), ("macro", "macro"), (list(FINDINGS), None)):
        expected = precision_recall_fscore_support(hot(studies), hot(guesses), average=how, zero_division=0)[:3]
        assert np.allclose(np.array(table.loc[row, ["precision", "recall", "f1"]], float).T, np.array(expected))
    assert (table.support[list(FINDINGS)] == hot(studies).sum(0)).all() and (table.predicted[list(FINDINGS)] == hot(guesses).sum(0)).all()


def test_scores_of_detail_and_of_nothing():
    said, drawn = ["There is a left pneumothorax."], [[Finding("pneumothorax", "right")]]
    assert finding_scores(said, drawn).loc["micro", "f1"] == 1 and finding_scores(said, drawn, detail=True).loc["micro", "f1"] == 0
    assert (finding_scores([""], [[]]) == 0).all().all()


@pytest.mark.parametrize("make, says", [
    (lambda: sample_phantom(1, [Finding("gout")]), "'gout' is not a finding"), (lambda: sample_phantom(1, [Finding("nodule")]), "side must be"),
    (lambda: sample_phantom(1, [Finding("consolidation", "left", "middle lobe")]), "place must be"),
    (lambda: sample_phantom(1, [Finding("edema", "left")]), "side must be None"), (lambda: draw(sample_phantom(1), "oblique"), "view must be"),
    (lambda: finding_scores(["a"], []), "1 reports for 0 studies")])
def test_errors_name_the_mend(make, says):
    with pytest.raises(ValueError, match=says): make()
