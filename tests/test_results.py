"Results: which checkpoint, which settings, tested once; controls, degenerate models, data sets that allow less."
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cvt2distilgpt2 import results
from cvt2distilgpt2.metrics import MeteorError
from cvt2distilgpt2.phantom import FINDINGS, draw, finding_scores, sample_phantom
from cvt2distilgpt2.results import (_finding_draws, all_reports, as_trained, evaluate, find_run, finding_table, image_features, main,
                                    nearest_reports, open_evaluation, reports_once, results_folder, score_table, system_statistics)
from cvt2distilgpt2.tasks import Study, get_task, open_task, write_annotation
from cvt2distilgpt2.train import finding_targets, make_model
from trees import make_mimic

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:METEOR is left out")
small = dict(model="small", resize=66, image_size=64, max_length=24, beams=2, device_batch=1, workers=0)


def phantoms(n: dict[str, int]) -> list[Study]:
    "Say which phantoms each split has, and where their images lie."
    splits = [split for split, count in n.items() for _ in range(count)]
    drawn = [sample_phantom(10**6 + i) for i in range(len(splits))]
    return [Study(f"s{i}", p.report, (f"s{i}.png",), split, findings=tuple(asdict(f) for f in p.findings)) for i, (p, split) in enumerate(zip(drawn, splits))]


def write_task(path: Path, studies: list[Study]) -> Path:
    write_annotation(studies, path/"annotation.json")
    for i in range(len(studies)):
        (path/"images").mkdir(exist_ok=True)
        Image.fromarray(draw(sample_phantom(10**6 + i), size=66)).save(path/"images"/f"s{i}.png")
    return path


def make_run(task, name: str = "first") -> Path:
    "Leave what a finished run leaves, its model as it was drawn."
    folder = results.project_root()/"runs"/task.name/name
    model = make_model(task, [s.report for s in open_task(task)["train"]])
    model.save_pretrained(folder/"model")
    (folder/"config.json").write_text(json.dumps(asdict(task)))
    (folder/"metrics.json").write_text("{}")
    (folder.parent/"latest").write_text(name)
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    "Give every test a place of its own for runs, and leave out METEOR, whose start takes seconds."
    def none(): raise FileNotFoundError("left out by the test")
    monkeypatch.setenv("CVT2DISTILGPT2_HOME", str(tmp_path))
    monkeypatch.setattr("cvt2distilgpt2.metrics.meteor_command", none)
    return tmp_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_task(tmp_path_factory.mktemp("task")/"few", phantoms(dict(train=12, val=4, test=6)))


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
    with pytest.raises(FileNotFoundError, match="no finished run .* make one"): open_evaluation(task)
    with pytest.raises(SystemExit, match="no finished run"): main(["--task", str(folder)])
    with pytest.raises(FileNotFoundError, match="does not exist"): open_evaluation(task, "/no/such/place")
    with pytest.raises(SystemExit): main(["--task", str(folder), "--beans", "4"])
    assert "did you mean" in capsys.readouterr().err


def test_unfinished_run(task, run):
    (run/"metrics.json").unlink()
    for path in (run, run/"model"):
        with pytest.raises(FileNotFoundError, match="not finished.*-p run first"): find_run(path, task)


def test_kinds_of_checkpoint(task, run, home, tmp_path):
    shutil.copytree(run/"model", tmp_path/"saved")
    other = replace(task, name="other")
    runs = home/"runs"
    assert find_run(run, task) == find_run(run/"model", task) == run
    assert find_run(run, other) is find_run(tmp_path/"saved", task) is find_run("owner/name", task) is None
    assert results_folder(task, run/"model", run) == run
    assert results_folder(other, run/"model", None) == results_folder(other, run, None) == runs/"other"/"test_of_first"
    assert results_folder(task, tmp_path/"saved", None) == runs/"few"/"test_of_saved"
    assert results_folder(task, "owner/name", None) == runs/"few"/"test_of_owner_name"
    (tmp_path/"epoch=8-val.ckpt").touch()
    assert results_folder(task, tmp_path/"epoch=8-val.ckpt", None).name == "test_of_epoch=8-val"
    saved = [open_evaluation(task, path) for path in (None, run, run/"model", tmp_path/"saved")]
    assert len({results.weights_hash(e.model) for e in saved}) == 1


def test_released_checkpoint(task, run, monkeypatch, tmp_path):
    "The tokenizer of a .ckpt is found where `decoder` says."
    model, asked = make_model(task, ["a b"]), []
    monkeypatch.setattr(results, "load_model", lambda checkpoint, tokenizer: asked.append((checkpoint, tokenizer)) or model)
    evaluation = open_evaluation(replace(task, decoder="some/folder"), "x.ckpt")
    assert asked == [("x.ckpt", "some/folder")] and evaluation.folder.name == "test_of_x.ckpt"
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"): open_evaluation(task, "x.ckpt")


def test_settings_come_from_the_run(folder, home):
    trained = get_task(str(folder), **small | dict(resize=70, max_length=19, profile="chen", style="iu_x_ray", n_train=10, views=1))
    run = make_run(trained)
    used = open_evaluation(get_task(str(folder), beams=2, device_batch=1, workers=0)).task
    for name in ("resize", "image_size", "max_length", "profile", "style", "n_train", "views"): assert getattr(used, name) == getattr(trained, name)
    assert used.beams == 2 and used.precision == "fp32"
    asked = get_task(str(folder), profile="raw", max_length=12, workers=0)
    used = open_evaluation(asked, given={"task", "profile", "max_length"}).task
    assert (used.profile, used.max_length, used.resize) == ("raw", 12, 70)
    apart = open_evaluation(replace(asked, name="other"), run).task # another task: only what the model itself knows
    assert (apart.resize, apart.image_size, apart.max_length, apart.profile, apart.n_train) == (70, 64, 19, "raw", None)


def test_place_of_the_data(tmp_path, run, task):
    model = results.load_model(run)
    trained = get_task("iu_x_ray", annotation=str(tmp_path/"a.json"), images=str(tmp_path))
    (run/"config.json").write_text(json.dumps(asdict(trained)))
    assert as_trained(get_task("iu_x_ray"), model, run).annotation == str(tmp_path/"a.json")     # where it lay in training
    typed = get_task("iu_x_ray", annotation=str(tmp_path/"b.json"))
    assert as_trained(typed, model, run, {"annotation"}).annotation == str(tmp_path/"b.json")
    (run/"config.json").write_text(json.dumps(asdict(replace(task, annotation="/elsewhere/annotation.json"))))
    assert as_trained(task, model, run).annotation == task.annotation                            # the folder that was typed


# the test, once

def test_whole(run, folder, task, capsys):
    main(["--task", str(folder), "--checkpoint", str(run), "--beams", "2", "--workers", "0"])
    said, test = capsys.readouterr().out, open_task(task)["test"]
    table = pd.read_csv(run/"predictions_test.csv", keep_default_na=False)
    assert list(table.columns) == ["id", "reference", "generated"] and list(table.id) == [s.id for s in test]
    model = results.load_model(run)
    assert list(table.generated) == [model.report([folder/"images"/s.image_path[0]], num_beams=2, max_length=24)[0] for s in test]
    known = json.loads((run/"results.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert {"weights_sha256", "settings", "code", "data", "versions", "hardware", "scores", "diversity", "findings", "degenerate", "summary"} <= known.keys()
    assert known["settings"]["beams"] == 2 and known["data"]["test"] == 6
    for words in ("this model", "nearest training study", "one report for all", "shuffled over patients", "micro", "Not for clinical use"): assert words in said
    scores = pd.read_csv(run/"results.csv")
    assert scores.system.nunique() == 4 and scores.metric.nunique() == 7 and (scores.protocol == "raw: reports as written").all()


def test_a_second_call_reads(task, run, monkeypatch):
    first = reports_once(open_evaluation(task))
    monkeypatch.setattr(results, "generate_reports", lambda *args: pytest.fail("written twice"))
    assert reports_once(open_evaluation(task)).equals(first)
    before = (run/"results.json").read_bytes()
    with pytest.raises(ValueError, match=r"'beams': \(2, 3\).*move predictions_test.csv"): reports_once(open_evaluation(replace(task, beams=3)))
    with pytest.raises(ValueError, match="'data'"): reports_once(open_evaluation(replace(task, n_test=5)))
    shutil.rmtree(run/"model")
    make_model(replace(task, seed=1), [s.report for s in open_task(task)["train"]]).save_pretrained(run/"model")
    with pytest.raises(ValueError, match="weights_sha256"): reports_once(open_evaluation(task))
    assert (run/"results.json").read_bytes() == before


def test_interrupted_while_writing(task, run, monkeypatch):
    "A test that was cut short is written again as a whole."
    with monkeypatch.context() as m:
        m.setattr(results, "nearest_reports", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): reports_once(open_evaluation(task))
    assert (run/"predictions_test.csv").exists() and not (run/"results.json").exists()
    assert len(reports_once(open_evaluation(task))) == 6


def test_meteor_fails(task, run, monkeypatch):
    "The reports survive; the next call goes on from them."
    class Broken(results.Meteor):
        def statistics(self, *args): raise MeteorError("no answer")
    with monkeypatch.context() as m:
        m.setattr(results, "Meteor", Broken)
        with pytest.raises(MeteorError): evaluate(open_evaluation(task))
    monkeypatch.setattr(results, "generate_reports", lambda *args: pytest.fail("written twice"))
    evaluate(open_evaluation(task))


def test_texts_survive_the_file(task, run, monkeypatch):
    texts = ["", "NA", "None", '"quoted", with a comma', "two\nlines", "nan"]
    write(monkeypatch, texts)
    evaluation = open_evaluation(task)
    assert list(reports_once(evaluation).generated) == list(reports_once(evaluation).generated) == texts


# what the numbers say

def test_model_that_always_writes_the_same(task, run, monkeypatch):
    write(monkeypatch, ["The lungs are clear."]*6)
    said = evaluate(open_evaluation(task))
    assert "This model is degenerate" in said and "one and the same report for all 6" in said and "other patients" in said
    assert len(json.loads((run/"results.json").read_text())["degenerate"]) == 2


def test_model_that_knows_but_not_whose(task, run, monkeypatch):
    "True reports, of other patients: distinct, and still degenerate."
    reports = [s.report for s in open_task(task)["test"]]
    write(monkeypatch, np.roll(reports, 1))
    said = evaluate(open_evaluation(task))
    assert "This model is degenerate" in said and "one and the same" not in said


def test_model_that_is_right(task, run, monkeypatch):
    write(monkeypatch, [s.report for s in open_task(task)["test"]])
    said = evaluate(open_evaluation(task))
    known = json.loads((run/"results.json").read_text())
    ours = {s["metric"]: s["score"] for s in known["scores"] if s["system"] == "this model"}
    assert known["degenerate"] == [] and "degenerate" not in said and "better than copying" in said
    assert ours["bleu_4"] == ours["rouge_l"] == pytest.approx(1) and ours["meteor"] is None # left out, not 0
    micro = next(f for f in known["findings"] if f["finding"] == "micro")
    assert micro["f1"] == micro["f1_low"] == micro["f1_placed"] == 1 > micro["f1_shuffled"]


def test_intervals_of_findings_against_resampled_studies():
    studies = phantoms(dict(test=30))
    reports = [s.report for s in studies[::2] for _ in range(2)] # every second one is another patient's
    said = np.array([[t in {f.type for f in results.parse_report(r)} for t in FINDINGS] for r in reports], int)
    draws = _finding_draws(finding_targets(studies).int().numpy(), said, resamples=5)
    times = np.random.default_rng(0).multinomial(30, np.full(30, 1/30), 5)
    for row, count in enumerate(times):
        drawn = np.repeat(np.arange(30), count)
        expected = finding_scores([reports[i] for i in drawn], [[results.Finding(f["type"]) for f in studies[i].findings] for i in drawn])
        for name in ("precision", "recall", "f1"): assert np.allclose(draws[name][row], expected[name])
    table = finding_table(reports, studies)
    assert (table.f1_low <= table.f1).all() and (table.f1 <= table.f1_high).all() and table.f1_low["micro"] < table.f1_high["micro"]


# controls

def test_nearest_study(task, run):
    evaluation = open_evaluation(task)
    train = evaluation.studies["train"]
    assert nearest_reports(evaluation, train) == [s.report for s in train]
    assert len(set(nearest_reports(evaluation, train, limit=3))) <= 3
    twice = [replace(s, image_path=s.image_path*2) for s in train[::2]]
    mixed = image_features(replace(evaluation, task=replace(evaluation.task, device_batch=3)), [*twice, *train])    # one and two views in a batch
    assert torch.allclose(mixed[:6], mixed[6::2], atol=1e-5)
    assert torch.allclose(mixed[6:], image_features(evaluation, train), atol=1e-5)
    pairs = [replace(a, image_path=a.image_path + b.image_path) for a, b in (train[:2], train[1::-1])]    # every token counts, their order does not
    first, second = image_features(evaluation, pairs)
    assert torch.allclose(first, second, atol=1e-5) and not torch.allclose(first, mixed[6], atol=1e-4)


def test_shuffles_are_averaged(task, run, monkeypatch):
    evaluation = open_evaluation(task)
    systems = all_reports(evaluation, reports_once(evaluation).assign(generated=[s.report for s in evaluation.studies["test"]]))
    versions = systems["shuffled over patients"]
    assert len(versions) == results.SHUFFLES and len({tuple(v) for v in versions}) > 1
    every = system_statistics({"all": versions, **{str(i): [v] for i, v in enumerate(versions)}}, evaluation.references)
    assert np.allclose(every["all"], np.mean([every[str(i)] for i in range(len(versions))], axis=0), equal_nan=True)


def test_several_references(tmp_path, monkeypatch):
    studies = phantoms(dict(train=4, val=2, test=4))
    folder = write_task(tmp_path/"several", [replace(s, reports=(s.report, "The lungs are clear.")) for s in studies])
    task = get_task(str(folder), **small)
    make_run(task)
    write(monkeypatch, ["The lungs are clear."]*4)
    evaluation = open_evaluation(task)
    scores = score_table(system_statistics(all_reports(evaluation, reports_once(evaluation)), evaluation.references), task)
    assert scores.set_index(["system", "metric"]).score["this model", "rouge_l"] == pytest.approx(1)
    assert [json.loads(others) for others in reports_once(evaluation).other_references] == [["The lungs are clear."]]*4


# data sets that allow less

@pytest.mark.parametrize("n, systems", [(dict(train=4, val=2, test=1), 3), (dict(test=4), 2), (dict(train=4, test=3), 3), (dict(test=1), 1)])
def test_small_data(tmp_path, run, n, systems):
    studies = phantoms(n)
    if "val" not in n: studies = [replace(s, findings=None) for s in studies]
    task = get_task(str(write_task(tmp_path/"bare", studies)), **small)
    said = evaluate(open_evaluation(task, run))
    assert pd.read_csv(tmp_path/"runs"/"bare"/"test_of_first"/"results.csv").system.nunique() == systems
    assert ("not measured here" in said) == ("val" not in n)


def test_nothing_to_test(tmp_path, run):
    task = get_task(str(write_task(tmp_path/"bare", phantoms(dict(train=4)))), **small)
    with pytest.raises(ValueError, match="no test studies"): open_evaluation(task, run)
    task = get_task(str(write_task(tmp_path/"bare", phantoms(dict(test=4)))), **small, profile="chen", style="iu_x_ray")
    with pytest.raises(ValueError, match="use profile raw"): open_evaluation(task, run)


def test_no_findings_at_all(task, run, monkeypatch):
    "Normal studies only: nothing to find, nothing to divide by."
    normal = [replace(s, findings=()) for s in phantoms(dict(test=3))]
    table = finding_table(["The lungs are clear."]*3, normal)
    assert table.support["micro"] == 0 and (table.f1 == 0).all() and results._of_findings(table) == "No finding was drawn in these studies."


def test_published_task(tmp_path):
    "The published profile, and the published rows beside ours."
    task = get_task("mimic_cxr", **make_mimic(tmp_path/"data"), **small)
    run = make_run(task)
    said = evaluate(open_evaluation(get_task("mimic_cxr", beams=2, device_batch=1, workers=0)))
    scores = pd.read_csv(run/"results.csv")
    row = scores.set_index(["system", "metric"]).loc[("CvT2DistilGPT2", "bleu_4")]
    assert row.score == .1269 and row.n == 3858 and np.isnan(row.low) and "Nicolson" in row.source
    assert set(scores[scores.source == "this test"].protocol) == {"chen: words seen 3 times, 60 words"}
    references = pd.read_csv(run/"predictions_test.csv").reference
    assert references.str.contains("<unk>").any() and references.str.islower().all() and "R2GenCMN" in said


@pytest.mark.full
def test_with_meteor(task, run, monkeypatch):
    "METEOR itself, started once for all systems."
    monkeypatch.undo()
    monkeypatch.setenv("CVT2DISTILGPT2_HOME", str(run.parents[2]))
    starts, start = [], results.Meteor.__enter__
    monkeypatch.setattr(results.Meteor, "__enter__", lambda self: starts.append(1) or start(self))
    evaluate(open_evaluation(task))
    scores = pd.read_csv(run/"results.csv").set_index(["metric", "system"])
    assert len(starts) == 1 and scores.score["meteor"].notna().all() and scores.score["meteor", "nearest training study"] > 0.05
