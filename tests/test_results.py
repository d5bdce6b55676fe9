"Results: what is tested, how, and once; controls, degenerate models, comparisons, CheXbert."

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_clinical import VOCABULARY, made_up_weights, save
from test_notebooks import papermill
from trees import make_mimic

from cvt2distilgpt2 import metrics, results
from cvt2distilgpt2.clinical import (
    OBSERVATIONS,
    class_confusion,
    clinical_scores,
    finding_table,
    label_table,
    load_chexbert,
    positives,
)
from cvt2distilgpt2.metrics import (
    METRICS,
    MeteorError,
    make_protocol,
    paired_comparison,
    read_predictions,
    report_statistics,
    shuffled,
    shuffled_scores,
)
from cvt2distilgpt2.phantom import Finding, draw, finding_scores, sample_phantom
from cvt2distilgpt2.results import (
    as_trained,
    control_reports,
    drawn_findings,
    evaluate,
    find_run,
    image_features,
    main,
    nearest_reports,
    open_evaluation,
    read_others,
    reports_once,
    results_folder,
    score_systems,
    score_table,
)
from cvt2distilgpt2.tasks import Study, get_task, open_task, write_annotation
from cvt2distilgpt2.train import data_identity, make_model

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:METEOR is left out")
small = dict(
    model="small", resize=66, image_size=64, max_length=24, beams=2, device_batch=1, workers=0
)


def phantoms(n: dict[str, int]) -> list[Study]:
    "Say which phantoms each split has, and where their images lie."
    splits = [split for split, count in n.items() for _ in range(count)]
    studies = []
    for i, split in enumerate(splits):
        phantom = sample_phantom(10**6 + i)
        findings = tuple(asdict(f) for f in phantom.findings)
        studies.append(Study(f"s{i}", phantom.report, (f"s{i}.png",), split, findings=findings))
    return studies


def write_task(path: Path, studies: list[Study]) -> Path:
    write_annotation(studies, path / "annotation.json")
    for i in range(len(studies)):
        (path / "images").mkdir(exist_ok=True)
        image = Image.fromarray(draw(sample_phantom(10**6 + i), size=66))
        image.save(path / "images" / f"s{i}.png")
    return path


def make_run(task, name: str = "first") -> Path:
    "Leave what a finished run leaves, its model as it was drawn."
    folder = results.project_root() / "runs" / task.name / name
    model = make_model(task, [s.report for s in open_task(task)["train"]])
    model.save_pretrained(folder / "model")
    (folder / "config.json").write_text(json.dumps(asdict(task)))
    (folder / "metrics.json").write_text("{}")
    (folder.parent / "latest").write_text(name)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    "Give a test a place of its own for runs; leave out METEOR and PTB, whose start takes seconds."

    def none(*files):
        raise FileNotFoundError("left out by the test")

    monkeypatch.setenv("CVT2DISTILGPT2_HOME", str(tmp_path))
    monkeypatch.setattr("cvt2distilgpt2.metrics.java_command", none)
    return tmp_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    studies = phantoms(dict(train=12, val=4, test=6))
    return write_task(tmp_path_factory.mktemp("task") / "few", studies)


@pytest.fixture
def task(folder):
    return get_task(str(folder), **small)


@pytest.fixture
def run(task) -> Path:
    return make_run(task)


def write(monkeypatch, texts: list[str]) -> None:
    "Let the model write `texts`."
    monkeypatch.setattr(results, "generate_reports", lambda evaluation, studies: list(texts))


# which checkpoint, which settings


def test_without_a_run(task, folder, capsys):
    with pytest.raises(FileNotFoundError, match="no finished run .* make one"):
        open_evaluation(task)
    with pytest.raises(SystemExit, match="no finished run"):
        main(["--task", str(folder)])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_evaluation(task, "/no/such/place")
    with pytest.raises(SystemExit):
        main(["--task", str(folder), "--beans", "4"])
    assert "did you mean" in capsys.readouterr().err


def test_unfinished_run(task, run):
    (run / "metrics.json").unlink()
    for path in (run, run / "model"):
        with pytest.raises(FileNotFoundError, match="not finished.*-p run first"):
            find_run(path, task)


def test_kinds_of_checkpoint(task, run, home, tmp_path):
    shutil.copytree(run / "model", tmp_path / "saved")
    other = replace(task, name="other", annotation=str(tmp_path / "other" / "annotation.json"))
    runs = home / "runs"
    assert find_run(run, task) == find_run(run / "model", task) == run
    assert find_run(run, other) is None
    assert find_run(tmp_path / "saved", task) is None
    assert find_run("owner/name", task) is None
    assert results_folder(task, run / "model", run) == run
    assert results_folder(other, run / "model", None) == runs / "other" / "test_of_first"
    assert results_folder(other, run, None) == runs / "other" / "test_of_first"
    assert results_folder(task, tmp_path / "saved", None) == runs / task.name / "test_of_saved"
    assert results_folder(task, "owner/name", None) == runs / task.name / "test_of_owner_name"
    (tmp_path / "epoch=8-val.ckpt").touch()
    assert results_folder(task, tmp_path / "epoch=8-val.ckpt", None).name == "test_of_epoch=8-val"
    saved = [open_evaluation(task, path) for path in (None, run, run / "model", tmp_path / "saved")]
    assert len({results.weights_hash(e.model) for e in saved}) == 1


def test_released_checkpoint(task, run, monkeypatch, tmp_path):
    "The tokenizer of a .ckpt is found where `decoder` says."
    model, asked = make_model(task, ["a b"]), []
    monkeypatch.setattr(
        results,
        "load_model",
        lambda checkpoint, tokenizer: asked.append((checkpoint, tokenizer)) or model,
    )
    evaluation = open_evaluation(replace(task, decoder="some/folder"), "x.ckpt")
    assert asked == [("x.ckpt", "some/folder")] and evaluation.folder.name == "test_of_x.ckpt"
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        open_evaluation(task, "x.ckpt")


def test_settings_come_from_the_run(folder, home, tmp_path):
    own = dict(resize=70, max_length=19, profile="chen", style="iu_x_ray", n_train=10, views=1)
    trained = get_task(str(folder), **small | own)
    run = make_run(trained)
    used = open_evaluation(get_task(str(folder), beams=2, device_batch=1, workers=0)).task
    for name in ("resize", "image_size", "max_length", "profile", "style", "n_train", "views"):
        assert getattr(used, name) == getattr(trained, name)
    assert used.beams == 2 and used.precision == "fp32"
    asked = get_task(str(folder), profile="raw", max_length=12, workers=0)
    used = open_evaluation(asked, given={"task", "profile", "max_length"}).task
    assert (used.profile, used.max_length, used.resize) == ("raw", 12, 70)
    other = shutil.copytree(folder, tmp_path / "other")
    # another task: only what the model itself knows
    apart = open_evaluation(get_task(str(other), workers=0), run).task
    assert (apart.resize, apart.image_size, apart.max_length, apart.views) == (70, 64, 19, 1)
    assert (apart.profile, apart.n_train) == ("raw", None)


def test_newest_run_is_not_taken_for_other_data(folder, home, tmp_path):
    "Same name, other file: the error names both."
    copy = shutil.copytree(folder, tmp_path / "copy")
    task = get_task(str(copy), **small)
    run = make_run(task)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data": data_identity(task)}))
    assert open_evaluation(task).folder == run
    write_annotation([s for v in open_task(task).values() for s in v][1:], copy / "annotation.json")
    with pytest.raises(
        ValueError, match=f"{copy}/annotation.json .* now reads {copy}/annotation.json"
    ):
        open_evaluation(task)


def test_folders_of_the_same_last_name_have_runs_of_their_own(folder, home, tmp_path):
    one, other = (
        get_task(str(shutil.copytree(folder, tmp_path / place / "mine")), **small)
        for place in ("a", "b")
    )
    make_run(one)
    with pytest.raises(FileNotFoundError, match=f"no finished run.* -p task {tmp_path}/b/mine"):
        open_evaluation(other)


def test_place_of_the_data(tmp_path, run, task):
    model = results.load_model(run)
    trained = get_task("iu_x_ray", annotation=str(tmp_path / "a.json"), images=str(tmp_path))
    (run / "config.json").write_text(json.dumps(asdict(trained)))
    # where it lay in training
    assert as_trained(get_task("iu_x_ray"), model, run).annotation == str(tmp_path / "a.json")
    typed = get_task("iu_x_ray", annotation=str(tmp_path / "b.json"))
    assert as_trained(typed, model, run, {"annotation"}).annotation == str(tmp_path / "b.json")
    moved = replace(task, annotation="/elsewhere/annotation.json")
    (run / "config.json").write_text(json.dumps(asdict(moved)))
    assert as_trained(task, model, run).annotation == task.annotation  # the folder that was typed


# the test, once


def test_whole(run, folder, task, capsys):
    main(["--task", str(folder), "--checkpoint", str(run), "--beams", "2", "--workers", "0"])
    said, test = capsys.readouterr().out, open_task(task)["test"]
    table = pd.read_csv(run / "predictions_test.csv", keep_default_na=False)
    assert list(table.columns) == ["id", "reference", "generated"]
    assert list(table.id) == [s.id for s in test]
    model = results.load_model(run)
    assert list(table.generated) == [
        model.report([folder / "images" / s.image_path[0]], num_beams=2, max_length=24)[0]
        for s in test
    ]
    known = json.loads(
        (run / "results.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON")
    )
    assert {
        "weights_sha256",
        "settings",
        "code",
        "data",
        "versions",
        "hardware",
        "scores",
        "diversity",
        "findings",
        "degenerate",
        "summary",
    } <= known.keys()
    assert known["settings"]["beams"] == 2 and known["data"]["test"] == 6
    for words in (
        "this model",
        "nearest training study",
        "one report for all",
        "most frequent training report",
        "shuffled over patients",
        "micro",
        "Not for clinical use",
    ):
        assert words in said
    scores = pd.read_csv(run / "results.csv")
    assert scores.system.nunique() == 5
    assert scores.metric.nunique() == 7
    assert (scores.protocol == "raw").all()
    each = pd.read_csv(run / "scores_per_report.csv")
    assert list(each.id) == list(table.id)
    assert {
        "words",
        "reference_words",
        "finding_f1",
        *METRICS,
    } <= set(each)
    assert each.cider.mean() == pytest.approx(
        scores.set_index(["system", "metric"]).score["this model", "cider"]
    )


def test_a_second_call_reads(task, run, monkeypatch):
    first = reports_once(open_evaluation(task))
    monkeypatch.setattr(results, "generate_reports", lambda *args: pytest.fail("written twice"))
    assert reports_once(open_evaluation(task)).equals(first)
    before = (run / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"'beams': \(2, 3\).*move predictions_test.csv"):
        reports_once(open_evaluation(replace(task, beams=3)))
    with pytest.raises(ValueError, match="'data'"):
        reports_once(open_evaluation(replace(task, n_test=5)))
    shutil.rmtree(run / "model")
    other = make_model(replace(task, seed=1), [s.report for s in open_task(task)["train"]])
    other.save_pretrained(run / "model")
    with pytest.raises(ValueError, match="weights_sha256"):
        reports_once(open_evaluation(task))
    assert (run / "results.json").read_bytes() == before


def test_interrupted_while_writing(task, run, monkeypatch):
    "A test that was cut short is written again as a whole."
    with monkeypatch.context() as m:
        m.setattr(
            results, "nearest_reports", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            reports_once(open_evaluation(task))
    assert (run / "predictions_test.csv").exists() and not (run / "results.json").exists()
    assert len(reports_once(open_evaluation(task))) == 6


def test_meteor_fails(task, run, monkeypatch):
    "The reports survive; the next call goes on from them."

    def broken(*args):
        raise MeteorError("no answer")

    with monkeypatch.context() as m:
        m.setattr("cvt2distilgpt2.metrics.meteor_statistics", broken)
        with pytest.raises(MeteorError):
            evaluate(open_evaluation(task))
    monkeypatch.setattr(results, "generate_reports", lambda *args: pytest.fail("written twice"))
    evaluate(open_evaluation(task))


def test_texts_survive_the_file(task, run, monkeypatch):
    texts = ["", "NA", "None", '"quoted", with a comma', "two\nlines", "nan"]
    write(monkeypatch, texts)
    evaluation = open_evaluation(task)
    assert list(reports_once(evaluation).generated) == texts  # written
    assert list(reports_once(evaluation).generated) == texts  # read back


# what the numbers say


def test_model_that_always_writes_the_same(task, run, monkeypatch):
    write(monkeypatch, ["The lungs are clear."] * 6)
    said = evaluate(open_evaluation(task))
    assert "This model is degenerate" in said
    assert "one and the same report for all 6" in said
    assert "other patients" in said
    assert len(json.loads((run / "results.json").read_text())["degenerate"]) == 2


def test_model_that_knows_but_not_whose(task, run, monkeypatch):
    "True reports, of other patients: distinct, and still degenerate."
    reports = [s.report for s in open_task(task)["test"]]
    write(monkeypatch, np.roll(reports, 1))
    said = evaluate(open_evaluation(task))
    assert "This model is degenerate" in said and "one and the same" not in said


def test_model_that_is_right(task, run, monkeypatch):
    write(monkeypatch, [s.report for s in open_task(task)["test"]])
    said = evaluate(open_evaluation(task))
    known = json.loads((run / "results.json").read_text())
    ours = {s["metric"]: s["score"] for s in known["scores"] if s["system"] == "this model"}
    assert known["degenerate"] == []
    assert "degenerate" not in said
    assert "nearest training study is worse than this model" in said
    assert [ours["bleu_4"], ours["rouge_l"]] == pytest.approx([1, 1])
    assert ours["meteor"] is None  # left out, not 0
    micro = next(f for f in known["findings"] if f["finding"] == "micro")
    assert micro["f1"] == micro["f1_low"] == micro["f1_placed"] == 1 > micro["f1_shuffled"]


def test_findings_are_those_drawn():
    studies = phantoms(dict(test=30))
    # every second one is another patient's, and sides are wrong
    reports = [s.report.replace("left", "right") for s in studies[::2] for _ in range(2)]
    table = finding_table(reports, drawn_findings(studies))
    drawn = [
        [Finding(f["type"], f.get("side"), f.get("place")) for f in s.findings] for s in studies
    ]
    expected = finding_scores(reports, drawn)
    for name in ("support", "precision", "recall", "f1"):
        assert np.allclose(table[name], expected.loc[table.index, name])
    assert np.allclose(table.f1_placed, finding_scores(reports, drawn, detail=True).f1[table.index])
    chance = [finding_scores(shuffled(reports, seed), drawn).f1 for seed in range(20)]
    assert np.allclose(table.f1_shuffled, (sum(chance) / 20)[table.index])
    assert table.f1_placed["micro"] < table.f1["micro"]
    assert (table.f1_low <= table.f1).all()
    assert (table.f1 <= table.f1_high).all()
    assert table.f1_low["micro"] < table.f1_high["micro"]


def test_empty_reports_are_counted(task, run, monkeypatch):
    write(monkeypatch, ["", " ", *(s.report for s in open_task(task)["test"][2:])])
    said = evaluate(open_evaluation(task))
    assert "2 of 6 reports are empty" in said
    assert json.loads((run / "results.json").read_text())["diversity"]["generated"]["empty"] == 2


# controls


def test_nearest_study(task, run):
    evaluation = open_evaluation(task)
    train = evaluation.studies["train"]
    assert nearest_reports(evaluation, train) == [s.report for s in train]
    assert len(set(nearest_reports(evaluation, train, limit=3))) <= 3
    twice = [replace(s, image_path=s.image_path * 2) for s in train[::2]]
    # one and two views in a batch
    by_three = replace(evaluation, task=replace(evaluation.task, device_batch=3))
    mixed = image_features(by_three, [*twice, *train])
    assert torch.allclose(mixed[:6], mixed[6::2], atol=1e-5)
    assert torch.allclose(mixed[6:], image_features(evaluation, train), atol=1e-5)
    # every token counts, their order does not
    pairs = [
        replace(a, image_path=a.image_path + b.image_path) for a, b in (train[:2], train[1::-1])
    ]
    first, second = image_features(evaluation, pairs)
    assert torch.allclose(first, second, atol=1e-5)
    assert not torch.allclose(first, mixed[6], atol=1e-4)


def test_chance_is_that_of_20_shuffles(task, run, monkeypatch):
    write(monkeypatch, [s.report for s in open_task(task)["test"]])
    evaluation = open_evaluation(task)
    systems = control_reports(evaluation, reports_once(evaluation))
    scores = score_table(*score_systems(systems, evaluation), task).set_index(["system", "metric"])
    chance = shuffled_scores(systems["this model"], evaluation.as_written, 20, ("cider", "bleu_4"))
    for metric, row in chance.iterrows():
        scored = scores.loc[("shuffled over patients", metric), ["score", "low", "high"]]
        assert list(scored) == pytest.approx([row["mean"], row.low, row.high])


def test_controls_know_training_and_validation_alone(tmp_path, run):
    studies = phantoms(dict(train=4, val=2, test=2))
    texts = ["Common."] * 2 + ["No edema."] * 2 + ["No edema."] * 2 + ["Common."] * 2
    studies = [replace(s, report=text) for s, text in zip(studies, texts, strict=True)]
    task = get_task(str(write_task(tmp_path / "data" / "texts", studies)), **small)
    evaluation = open_evaluation(task, run)
    systems = control_reports(evaluation, reports_once(evaluation))
    assert systems["most frequent training report"] == ["Common."] * 2
    assert set(systems["one report for all"]) <= {"Common.", "No edema."}


def test_several_references(tmp_path, monkeypatch):
    studies = phantoms(dict(train=4, val=2, test=4))
    studies = [replace(s, reports=(s.report, "The lungs are clear.")) for s in studies]
    folder = write_task(tmp_path / "several", studies)
    task = get_task(str(folder), **small)
    make_run(task)
    write(monkeypatch, ["The lungs are clear."] * 4)
    evaluation = open_evaluation(task)
    systems = control_reports(evaluation, reports_once(evaluation))
    scores = score_table(*score_systems(systems, evaluation), task)
    assert scores.set_index(["system", "metric"]).score["this model", "rouge_l"] == pytest.approx(1)
    assert [json.loads(others) for others in reports_once(evaluation).other_references] == [
        ["The lungs are clear."]
    ] * 4


# anyone's predictions


def texts_only(path: Path, studies: list[Study]) -> Path:
    "Write a task that has no images at all."
    studies = [replace(s, image_path=("nowhere.png",)) for s in studies]
    write_annotation(studies, path / "annotation.json")
    return path


def table(path: Path, reports: dict[str, str], columns=("id", "generated")) -> Path:
    pd.DataFrame(reports.items(), columns=columns).to_csv(path, index=False)
    return path


@pytest.fixture
def texts(tmp_path) -> Path:
    return texts_only(tmp_path / "data" / "texts", phantoms(dict(train=12, val=4, test=6)))


@pytest.fixture
def good(texts) -> dict[str, str]:
    return {s.id: s.report for s in phantoms(dict(train=12, val=4, test=6))[-6:]}


def lines(*rows: str) -> bytes:
    return "\n".join(rows).encode()


known = [f"s{i},Clear." for i in range(16, 22)]


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "predictions.csv does not exist"),
        (b"", "is empty. It needs a header"),
        (b"\n\n", "is empty"),
        (lines("id,generated", *known[:-1]), "test studies without a report, 1: 's21'. Add them"),
        (lines("id,generated"), "without a report, 6: 's16', 's17', 's18', 's19', 's20', 's21'."),
        (
            lines("id,generated", *known, "s0,Clear.", "16,x"),
            "ids that are no test studies, 2: 's0' (line 8), '16' (line 9)",
        ),
        (
            lines("id,generated", *known, *(f"n{i},x" for i in range(12))),
            "no test studies, 12: 'n0' (line 8), 'n1' (line 9), 'n2' (line 10), 'n3' (line 11), "
            "'n4' (line 12), 'n5' (line 13), 'n6' (line 14), 'n7' (line 15), 'n8' (line 16), "
            "'n9' (line 17) and 2 more. Remove them",
        ),
        (
            lines("id,generated", *known, "s17,Edema."),
            "more than once, 1: 's17' (line 3, 8). Keep one",
        ),
        (
            lines("id,generated", *known[1:], 's16," \n"'),
            "empty reports, 1: 's16' (line 7). Fill them in",
        ),
        (
            lines("id,generated", *known[1:], "s16,No edema, no effusion."),
            "without just 2 fields, 1: line 7 (3). Put reports",
        ),
        (lines("id,generated", *known[1:], "s16"), "without just 2 fields, 1: line 7 (1)"),
        (lines("study;text", "s16;Clear."), "has no column 'id'; there are: 'study', 'text'"),
        (lines("id,text", *known), "has no column 'generated'; there are: 'id', 'text'. Say which"),
        (lines("id,generated,generated", *(f"{k},x" for k in known)), "has 2 columns 'generated'"),
        (
            "id,generated\ns16,Übersicht.".encode("latin-1"),
            "is not UTF-8 (byte 17). Save it as UTF-8",
        ),
        (
            lines("id,generated", *known[1:], 's16,"Clear.'),
            "predictions.csv:7: the row that begins here has quotes out of order",
        ),
        (
            lines("id,generated", 's16,"Clear" heart.', *known[1:]),
            "predictions.csv:2: the row that begins here has quotes out of order",
        ),
        (b"\x89PNG\r\n\x1a\n\x00", "is not UTF-8"),
    ],
    ids=lambda v: v[:24].replace(" ", "-") if isinstance(v, str) else "",
)
def test_bad_predictions_are_refused_whole(content, said, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "score_systems", lambda *args: pytest.fail("scored"))
    path = tmp_path / "predictions.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as e:
        main(["--task", str(texts), "--predictions", str(path)])
    assert said in str(e.value) and not list(tmp_path.rglob("results.*"))
    good = table(tmp_path / "good.csv", {f"s{i}": "Clear." for i in range(16, 22)})
    with pytest.raises(SystemExit) as e:
        main(["--task", str(texts), "--predictions", str(good), "--compare", str(path)])
    assert said in str(e.value)


def test_all_problems_of_a_file_are_listed_at_once(texts, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(lines("id,generated", "s16,", "s17,a,b", "s18,x", "s18,y", "s99,z"))
    with pytest.raises(ValueError) as e:
        open_evaluation(get_task(str(texts)), predictions=path)
    assert len(str(e.value).splitlines()) == 6
    assert "6 test studies, so nothing was scored" in str(e.value)


FORMS = {  # what people and programs write, ids that look like numbers among it
    "tabs.tsv": "id\tgenerated\n003\tClear.\nNA\tNo change, no edema.\n",
    "semicolons.csv": "id;generated\n003;Clear.\nNA;No change, no edema.\n",
    "coco.json": '[{"image_id": "003", "caption": "Clear."}, '
    '{"image_id": "NA", "caption": "No change, no edema."}]',
    "lines.jsonl": '{"id": "003", "report": "Clear.", "error": ""}\n'
    '{"id": "NA", "report": "No change, no edema.", "error": ""}\n',
    "report.csv": "id,report,error,made_with,note\n003,Clear.,,x,y\n"
    '"NA","No change, no edema.","","x","y"\n',
    "dict.json": '{"003": "Clear.", "NA": "No change, no edema."}',
    "empty cells behind.csv": 'id,generated\n003,Clear.,\nNA,"No change, no edema.",,\n',
}


@pytest.mark.parametrize("name", FORMS)
def test_predictions_in_every_form(name, tmp_path):
    (tmp_path / name).write_text(FORMS[name])
    assert read_predictions(tmp_path / name, ["NA", "003"]) == {
        "NA": "No change, no edema.",
        "003": "Clear.",
    }


def test_rows_with_an_error_are_no_predictions(tmp_path):
    (tmp_path / "r.jsonl").write_text(
        '{"id": "a", "report": "", "error": "blank"}\n'
        '{"id": "b", "report": "Clear.", "error": ""}\n'
    )
    with pytest.raises(
        ValueError, match="rows with an error instead of a report, 1: 'a' .line 1.. Mend"
    ):
        read_predictions(tmp_path / "r.jsonl", ["a", "b"])


def test_numbers_in_json_are_ids(tmp_path):
    (tmp_path / "coco.json").write_text('[{"image_id": 391895, "caption": "A man."}]')
    assert read_predictions(tmp_path / "coco.json", ["391895"]) == {"391895": "A man."}


def test_predictions_without_model_or_images(texts, good, home, monkeypatch, capsys):
    for name in ("load_model", "prepare", "generate_reports", "nearest_reports", "image_features"):
        monkeypatch.setattr(results, name, lambda *args: pytest.fail("asked for a model or images"))
    path = table(home / "their reports.csv", good, ("study", "text"))
    arguments = ["--task", str(texts), "--predictions", str(path)]
    main([*arguments, "--id_column", "study", "--report_column", "text"])
    said = capsys.readouterr().out
    known = json.loads(
        (home / "runs" / "texts" / "test_of_their_reports" / "results.json").read_text()
    )
    assert "how they came about is not known" in said
    assert "A nearest-neighbour control needs the model" in said
    assert "degenerate" not in said
    assert {s["system"] for s in known["scores"]} == {
        "this model",
        "one report for all",
        "most frequent training report",
        "shuffled over patients",
    }
    assert known["predictions_sha256"]
    assert "checkpoint" not in known
    assert "seed" not in known
    assert known["settings"]["columns"] == ["study", "text"]
    assert next(s["score"] for s in known["scores"] if s["metric"] == "bleu_4") == pytest.approx(1)


def test_another_file_does_not_replace_an_earlier_test(texts, good, home):
    task, path = get_task(str(texts)), table(home / "theirs.csv", good)
    evaluate(open_evaluation(task, predictions=path))
    (home / "copy").mkdir()
    # the same reports, wherever they lie
    evaluate(open_evaluation(task, predictions=shutil.copy(path, home / "copy")))
    before = (home / "runs" / "texts" / "test_of_theirs" / "results.json").read_bytes()
    table(path, {**good, "s16": "Edema."})
    with pytest.raises(ValueError, match="predictions_sha256.*give a file another name"):
        open_evaluation(task, predictions=path)
    shutil.copy(home / "copy" / "theirs.csv", path)
    with pytest.raises(ValueError, match="'profile': .'raw', 'chen'"):
        open_evaluation(replace(task, profile="chen", style="iu_x_ray"), predictions=path)
    assert before == (home / "runs" / "texts" / "test_of_theirs" / "results.json").read_bytes()


def test_ids_and_reports_are_text(tmp_path):
    ids = ["007", "NA", "None", "1e3", " 7", "null"]
    reports = ["NA", "None", "nan", 'two\r\nlines, "quoted"', "1.0", "é."]
    studies = [replace(s, id=i) for s, i in zip(phantoms(dict(test=6)), ids, strict=True)]
    task = get_task(str(texts_only(tmp_path / "ids", studies)))
    path = table(tmp_path / "theirs.csv", dict(reversed([*zip(ids, reports, strict=True)])))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Excel saves
    read = reports_once(open_evaluation(task, predictions=path))
    assert list(read.id) == ids and list(read.generated) == reports
    numbers = [replace(s, id=f"00{i}") for i, s in enumerate(studies)]
    task_of_numbers = get_task(str(texts_only(tmp_path / "numbers", numbers)))
    path = table(tmp_path / "numbers.csv", {s.id: "1.0" for s in numbers})
    read = reports_once(open_evaluation(task_of_numbers, predictions=path))
    assert list(read.id) == [s.id for s in numbers] and set(read.generated) == {"1.0"}
    with pytest.raises(ValueError, match="without a report, 1: '007'.*\n.*no test studies, 1: '7'"):
        others = dict(zip(["7", *ids[1:]], reports, strict=True))
        open_evaluation(task, predictions=table(tmp_path / "other.csv", others))


def test_a_column_named_report_may_be_the_reference(texts, good, tmp_path):
    rows = pd.DataFrame([dict(id=i, report=text, prediction="Clear.") for i, text in good.items()])
    rows.to_csv(tmp_path/"theirs.csv", index=False)
    with pytest.raises(ValueError, match="no column 'generated'; there are: 'id', 'report', 'pred"):
        open_evaluation(get_task(str(texts)), predictions=tmp_path/"theirs.csv")
    rows[["id", "report"]].to_csv(tmp_path/"two.csv", index=False)
    evaluation = open_evaluation(get_task(str(texts)), predictions=tmp_path/"two.csv")
    assert evaluation.written == list(good.values())


def test_checkpoint_and_predictions_are_not_one_page(task, run, folder, home):
    with pytest.raises(ValueError, match="not both"):
        open_evaluation(task, run, predictions="x.csv")
    with pytest.raises(SystemExit, match="not both"):
        main(["--task", str(folder), "--checkpoint", str(run), "--predictions", "x.csv"])


def test_one_report_for_590_studies_is_called_degenerate(tmp_path):
    studies = phantoms(dict(train=8, val=4, test=590))
    task = get_task(str(texts_only(tmp_path / "many", studies)))
    reports = {s.id: "The lungs are clear." for s in studies[12:]}
    said = evaluate(open_evaluation(task, predictions=table(tmp_path / "one.csv", reports)))
    assert "This model is degenerate" in said
    assert "one and the same report for all 590 studies" in said
    assert "the most frequent one 100.0% of all" in said
    assert "other patients" in said and "none is reported rightly" in said


def test_own_predictions_as_a_file_give_the_same_scores(task, run, folder, home):
    evaluate(open_evaluation(task))
    evaluate(open_evaluation(task, predictions=run / "predictions_test.csv"))
    folders = (run, home / "runs" / get_task(str(folder)).name / "test_of_predictions_test")
    own, file = (json.loads((path / "results.json").read_text()) for path in folders)
    without = [s for s in own["scores"] if s["system"] != "nearest training study"]
    assert without == file["scores"] and len(without) == 28 < len(own["scores"])
    for name in ("protocols", "diversity", "findings", "degenerate", "data"):
        assert own[name] == file[name]
    each = [pd.read_csv(path / "scores_per_report.csv") for path in folders]
    assert each[0].equals(each[1])


def test_annotation_is_needed(tmp_path, capsys):
    with pytest.raises(SystemExit, match="iu_x_ray/annotation.json, which is not there.*Open-i"):
        main(["--task", "iu_x_ray", "--predictions", "x.csv"])


# side by side


def test_compared_runs_are_paired_by_study(texts, good, home, capsys):
    ours = {i: r if n % 2 else "The lungs are clear." for n, (i, r) in enumerate(good.items())}
    a, b = table(home / "a.csv", dict(reversed(ours.items()))), table(home / "b.csv", good)
    main(["--task", str(texts), "--predictions", str(a), "--compare", f"{b},{a}"])
    references = {s.id: s.report for s in phantoms(dict(train=12, val=4, test=6))}
    protocol = make_protocol("raw")
    first, second = (
        report_statistics(
            {i: r[i] for i in good}, {i: references[i] for i in good}, protocol=protocol
        )
        for r in (ours, good)
    )
    expected = paired_comparison(first, second)
    known = json.loads((home / "runs" / "texts" / "test_of_a" / "results.json").read_text())
    rows = {(r["system"], r["metric"]): r for r in known["comparison"]}
    for metric, row in expected.drop("meteor").iterrows():
        compared = rows[str(b), metric]
        names = ("score", "difference", "difference_low", "difference_high", "p")
        values = [row.second, row.difference, row.low, row.high, row.p]
        assert [compared[name] for name in names] == pytest.approx(values)
        assert rows[str(a), metric]["difference"] == 0
        assert rows["this model", metric]["difference"] is None
    said = capsys.readouterr().out
    assert f"{b} is better than this model" in said
    assert f"{a} is not to be told from this model" in said
    assert known["seeds"] is None


def test_seeds_of_one_recipe(task, run, home):
    others = [make_run(replace(task, seed=seed), f"seed{seed}") for seed in (1, 2)]
    with pytest.raises(
        FileNotFoundError, match="seed1 holds no predictions_test.csv; test it first"
    ):
        read_others([str(others[0])], open_evaluation(task, run))
    for other in others:
        evaluate(open_evaluation(task, other))
    evaluation = open_evaluation(task, run)
    said = evaluate(evaluation, read_others([*map(str, others)], evaluation))
    known = json.loads((run / "results.json").read_text())
    tested = [json.loads((r / "results.json").read_text())["scores"] for r in (run, *others)]
    ciders = [next(s["score"] for s in scores if s["metric"] == "cider") for scores in tested]
    (row,) = (r for r in known["seeds"] if r["metric"] == "cider")
    assert [row["mean"], row["std"], row["seeds"]] == pytest.approx(
        [np.mean(ciders), np.std(ciders, ddof=1), 3]
    )
    assert "seeds of one recipe" in said
    assert not results.same_recipe([run, home]) and not results.same_recipe([run, run])
    make_run(replace(task, seed=3, lr=0.1), "other")
    assert not results.same_recipe([run, run.parent / "other"])


def test_empty_reports_of_a_run_are_compared(task, run, monkeypatch):
    write(monkeypatch, [""] + ["The lungs are clear."] * 5)
    evaluation = open_evaluation(task)
    reports_once(evaluation)
    assert read_others(str(run), evaluation)[str(run)][0] == ""
    with pytest.raises(ValueError, match="empty reports, 1"):
        read_others(str(run / "predictions_test.csv"), evaluation)
    with pytest.raises(ValueError, match="twice"):
        read_others(f"{run}, {run}", evaluation)


# CheXbert


def test_chexbert_gives_its_tables(texts, good, home, capsys):
    weights = save(made_up_weights(), home / "chexbert.pth")
    (home / "vocab.txt").write_text("\n".join(VOCABULARY))
    reports = {
        i: "There is edema. The heart is normal." if n % 2 else text
        for n, (i, text) in enumerate(good.items())
    }
    path = table(home / "theirs.csv", reports)
    arguments = ["--task", str(texts), "--predictions", str(path), "--chexbert", str(weights)]
    main([*arguments, "--vocabulary", str(home / "vocab.txt")])
    labeller = load_chexbert(weights, home / "vocab.txt", "cpu")
    truth, said = labeller(list(good.values())), labeller(list(reports.values()))
    known = json.loads((home / "runs" / "texts" / "test_of_theirs" / "results.json").read_text())

    def written(frame):
        return json.loads(frame.to_json(orient="records", double_precision=15))

    assert known["clinical"] == written(clinical_scores(truth, said))
    expected = written(
        label_table(positives(truth), positives(said), OBSERVATIONS)
        .rename_axis("observation")
        .reset_index()
    )
    assert [
        {n: v for n, v in row.items() if n != "f1_shuffled"} for row in known["observations"]
    ] == expected
    chance = [
        label_table(
            positives(truth), positives(said)[shuffled(list(range(6)), seed)], OBSERVATIONS, 2
        ).f1
        for seed in range(20)
    ]
    assert [row["f1_shuffled"] for row in known["observations"]] == pytest.approx(
        list(sum(chance) / 20)
    )
    assert known["confusion"] == written(class_confusion(truth, said).reset_index())
    each = pd.read_csv(home / "runs" / "texts" / "test_of_theirs" / "scores_per_report.csv")
    f1 = [row for row in known["clinical"] if row["metric"] == "f1"]
    by_example = next(row["score"] for row in f1 if row["average"] == "example")
    assert each.chexbert_f1.mean() >= by_example - 1e-9
    assert "CheXbert, 14 observations: F1 by example" in capsys.readouterr().out
    assert (home / "runs" / "texts" / "chexbert_labels.json").exists()


@pytest.mark.parametrize(
    "weights, vocabulary, said",
    [
        ("nowhere.pth", "vocab.txt", "Checkpoint download"),
        ("chexbert.pth", "nowhere.txt", "nowhere.txt does not exist"),
    ],
)
def test_chexbert_that_is_not_there(weights, vocabulary, said, texts, good, home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save(made_up_weights(), home / "chexbert.pth")
    (home / "vocab.txt").write_text("\n".join(VOCABULARY))
    arguments = ["--task", str(texts), "--predictions", str(table(home / "theirs.csv", good))]
    with pytest.raises(SystemExit, match=said):
        main(
            [*arguments, "--chexbert", str(home / weights), "--vocabulary", str(home / vocabulary)]
        )
    assert not (home / "runs" / "texts" / "test_of_theirs").exists()


# data sets that allow less


@pytest.mark.parametrize(
    "n, systems",
    [
        (dict(train=4, val=2, test=1), 4),
        (dict(test=4), 2),
        (dict(train=4, test=3), 4),
        (dict(test=1), 1),
    ],
)
def test_small_data(tmp_path, run, n, systems):
    studies = phantoms(n)
    if "val" not in n:
        studies = [replace(s, findings=None) for s in studies]
    task = get_task(str(write_task(tmp_path / "data" / "bare", studies)), **small)
    said = evaluate(open_evaluation(task, run))
    scores = pd.read_csv(tmp_path / "runs" / "bare" / "test_of_first" / "results.csv")
    assert scores.system.nunique() == systems
    assert ("not measured here" in said) == ("val" not in n)


def test_nothing_to_test(tmp_path, run):
    task = get_task(str(write_task(tmp_path / "data" / "bare", phantoms(dict(train=4)))), **small)
    with pytest.raises(ValueError, match="no test studies"):
        open_evaluation(task, run)
    path = write_task(tmp_path / "data" / "bare", phantoms(dict(test=4)))
    task = get_task(str(path), **small, profile="chen", style="iu_x_ray")
    with pytest.raises(ValueError, match="use profile raw"):
        open_evaluation(task, run)


def test_no_findings_at_all(task, run, monkeypatch):
    "Normal studies only: nothing to find, nothing to divide by."
    normal = [replace(s, findings=()) for s in phantoms(dict(test=3))]
    table = finding_table(["The lungs are clear."] * 3, drawn_findings(normal))
    assert table.support["micro"] == 0
    assert (table.f1 == 0).all()
    assert results._of_findings(table) == "No finding was drawn in these studies."


def test_published_task(tmp_path):
    "The published profile, and the published rows beside ours."
    task = get_task("mimic_cxr", **make_mimic(tmp_path / "data"), **small)
    run = make_run(task)
    said = evaluate(open_evaluation(get_task("mimic_cxr", beams=2, device_batch=1, workers=0)))
    scores = pd.read_csv(run / "results.csv")
    row = scores.set_index(["system", "metric"]).loc[("CvT2DistilGPT2", "bleu_4")]
    assert row.score == 0.1269 and row.n == 3858 and np.isnan(row.low) and "Nicolson" in row.source
    assert set(scores[scores.source == "this test"].protocol) == {"chen"}
    protocols = {
        p["protocol"]: p for p in json.loads((run / "results.json").read_text())["protocols"]
    }
    ours = scores.set_index(["system", "metric"]).score["this model"]
    assert list(protocols) == ["chen", "r2gen", "coco", "raw"]
    assert protocols["chen"]["bleu_4"] == pytest.approx(ours["bleu_4"])
    assert "left out by the test" in protocols["coco"]["missing"]
    assert protocols["coco"]["bleu_4"] is None
    references = pd.read_csv(run / "predictions_test.csv").reference
    assert references.str.contains("<unk>").any()
    assert references.str.islower().all()
    assert "R2GenCMN" in said


@pytest.mark.full
def test_with_meteor(task, run, monkeypatch):
    "METEOR itself, started once for all systems."
    monkeypatch.undo()
    monkeypatch.setenv("CVT2DISTILGPT2_HOME", str(run.parents[2]))
    starts, start = [], metrics.run_meteor
    monkeypatch.setattr(metrics, "run_meteor", lambda *args: starts.append(1) or start(*args))
    evaluate(open_evaluation(task))
    scores = pd.read_csv(run / "results.csv").set_index(["metric", "system"])
    assert len(starts) == 1
    assert scores.score["meteor"].notna().all()
    assert scores.score["meteor", "nearest training study"] > 0.05


@pytest.mark.full
def test_page_of_predictions(tmp_path):
    "The notebook on two files, one of them compared, no images; then on one that lacks a study."
    studies = phantoms(dict(train=12, val=4, test=6))
    texts_only(tmp_path / "data" / "texts", studies)
    good = {s.id: s.report for s in studies[-6:]}
    a = table(tmp_path / "a.csv", good)
    b = table(tmp_path / "b.csv", dict(zip(good, [*good.values()][::-1], strict=True)))
    done = papermill(
        "04_results",
        tmp_path / "out.ipynb",
        tmp_path,
        task=str(tmp_path / "data" / "texts"),
        predictions=str(a),
        compare=str(b),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "out.ipynb").read_text()
    known = json.loads((tmp_path / "runs" / "texts" / "test_of_a" / "results.json").read_text())
    assert "No images are at hand" in page and "No model" in page
    folder = tmp_path / "runs" / "texts" / "test_of_a"
    (folder / "results.json").rename(tmp_path / "by_notebook.json")
    command = [sys.executable, "-m", "cvt2distilgpt2.results", "--task"]
    command += [str(tmp_path / "data" / "texts"), "--predictions", str(a), "--compare", str(b)]
    environment = {**os.environ, "CVT2DISTILGPT2_HOME": str(tmp_path)}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    again = json.loads((folder / "results.json").read_text())
    for name in (
        "scores",
        "protocols",
        "comparison",
        "diversity",
        "findings",
        "degenerate",
        "summary",
    ):
        assert again[name] == known[name]
    table(tmp_path / "c.csv", dict([*good.items()][1:]))
    done = papermill(
        "04_results",
        tmp_path / "out.ipynb",
        tmp_path,
        task=str(tmp_path / "data" / "texts"),
        predictions=str(tmp_path / "c.csv"),
    )
    assert done.returncode != 0 and "test studies without a report, 1: 's16'" in done.stderr
