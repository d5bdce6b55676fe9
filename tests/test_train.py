"Training: the recipe to the letter, whole runs, resumption to the same weights, real studies."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CvtConfig, CvtForImageClassification, GPT2Config, GPT2LMHeadModel
from trees import make_iu, make_mimic

from cvt2distilgpt2 import train as training
from cvt2distilgpt2.data import make_labels
from cvt2distilgpt2.decoder import load_tokenizer
from cvt2distilgpt2.phantom import draw, sample_phantom
from cvt2distilgpt2.prepare import prepare
from cvt2distilgpt2.tasks import Study, get_task, open_task, write_annotation
from cvt2distilgpt2.train import (
    _batch_plan,
    data_identity,
    load_model,
    main,
    make_dataset,
    make_model,
    make_trainer,
    references_of,
    run_folder,
    task_labels,
    train,
    validation_scores,
    warm_start,
    write_predictions,
)

torch.set_num_threads(1)
quick = dict(
    model="small",
    resize=66,
    image_size=64,
    batch_size=8,
    device_batch=8,
    epochs=2,
    warm_start=0,
    val_beams=1,
    max_length=48,
    lr=1e-3,
    encoder_lr=1e-3,
    workers=0,
)


def draw_folder(folder: Path, n: int = 24) -> Path:
    "Make a folder task of a few phantoms; the first training study has a lateral view, too."
    for i in range(n):
        phantom = sample_phantom(10**6 + i)
        split = "train" if i < n - 8 else "val"
        if i >= n - 4:
            split = "test"
        views = ("frontal", "lateral") if i == 0 else ("frontal",)
        for view in views:
            path = folder / "images" / f"s{i}" / f"{view}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(phantom, view=view, size=66)).save(path)
        yield Study(
            f"s{i}",
            phantom.report,
            tuple(f"s{i}/{v}.png" for v in views),
            split,
            findings=tuple(asdict(f) for f in phantom.findings),
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("task") / "phantoms"
    write_annotation(list(draw_folder(path)), path / "annotation.json")
    return path


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CVT2DISTILGPT2_HOME", str(tmp_path))
    return tmp_path


# the recipe


@pytest.mark.parametrize("name", ["mimic_cxr", "iu_x_ray"])
@pytest.mark.parametrize(
    "recipe, encoder_lr, lr, beams", [("released", 1e-5, 1e-4, 4), ("public", 5e-5, 5e-4, 1)]
)
def test_published_recipe_reaches_the_trainer(name, recipe, encoder_lr, lr, beams, folder, home):
    task = replace(
        get_task(name, recipe=recipe),
        annotation=str(folder / "annotation.json"),
        images=str(folder / "images"),
        profile="raw",
        model="small",
        resize=66,
        image_size=64,
    )
    studies = open_task(task)
    trainer = make_trainer(make_model(task, ["a"]), task, studies, home)
    trainer.create_optimizer_and_scheduler(100)
    groups = trainer.optimizer.param_groups
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert [g["lr"] for g in groups] == [encoder_lr, lr]
    assert {(g["weight_decay"], g["betas"], g["eps"]) for g in groups} == {
        (0.01, (0.9, 0.999), 1e-8)
    }
    assert set(groups[0]["params"]) == set(trainer.model.encoder.parameters())
    assert {p for g in groups for p in g["params"]} == set(trainer.model.parameters())
    for _ in range(50):
        trainer.lr_scheduler.step()
    assert [g["lr"] for g in groups] == [encoder_lr, lr]  # no schedule
    args = trainer.args
    assert args.max_grad_norm == 0 and args.label_smoothing_factor == 0 and args.warmup_steps == 0
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 16
    assert args.per_device_train_batch_size == 4
    assert args.generation_num_beams == beams
    assert args.generation_max_length == 128
    assert args.predict_with_generate
    assert args.metric_for_best_model == "cider"
    assert args.greater_is_better
    assert args.load_best_model_at_end
    (stop,) = [
        c for c in trainer.callback_handler.callbacks if type(c).__name__ == "EarlyStoppingCallback"
    ]
    assert (stop.early_stopping_patience, stop.early_stopping_threshold) == (10, 1e-4)
    assert not {type(c).__name__ for c in trainer.callback_handler.callbacks} & {
        "WandbCallback",
        "MLflowCallback",
        "CometCallback",
    }


@pytest.mark.parametrize(
    "devices, each, steps", [(1, 4, 4), (2, 4, 2), (4, 4, 1), (8, 2, 1), (16, 1, 1)]
)
def test_batch_is_16_over_all_devices(devices, each, steps):
    plan = _batch_plan(get_task("mimic_cxr"), devices)
    assert plan["per_device_train_batch_size"] == each
    assert plan["gradient_accumulation_steps"] == steps


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch_size 16 does not divide into 3 devices"):
        _batch_plan(get_task("mimic_cxr"), 3)


# a run


def test_run_is_whole_and_never_sees_the_test_split(folder, home, monkeypatch):
    seen, original = [], training.ReportDataset
    monkeypatch.setattr(
        training,
        "ReportDataset",
        lambda studies, *a, **k: seen.extend(studies) or original(studies, *a, **k),
    )
    task = get_task(str(folder), **{**quick, "warm_start": 1})
    run = train(task, run="one")
    assert {s.split for s in seen} == {"train", "val"}
    config = json.loads((run / "config.json").read_text())
    assert config.pop("data") == data_identity(task) and config == asdict(task)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["seed"] == 0
    assert metrics["data"]["train"] == 16
    assert len(metrics["data"]["annotation_sha256"]) == 64
    assert metrics["versions"]["torch"] == version("torch")
    assert metrics["hardware"]["cores"]
    assert metrics["code"].startswith("0.")
    assert {"bleu_4", "rouge_l", "cider", "finding_f1"} == set(metrics["val"])
    predictions = pd.read_csv(run / "predictions_val.csv", keep_default_na=False)
    assert list(predictions.columns) == ["id", "reference", "generated"]
    assert list(predictions.id) == ["s16", "s17", "s18", "s19"]
    assert (run.parent / "latest").read_text() == "one"
    assert not (run / "checkpoints").exists()
    assert list((run / "logs").glob("events*"))
    card = (run / "model" / "README.md").read_text()
    assert "Not for clinical use" in card
    assert f"{metrics['val']['cider']}" in card
    assert "encoder_lr" in card
    model = load_model(run)
    assert (
        model.image_processor.resize,
        model.image_processor.image_size,
        model.generation_config.max_length,
    ) == (66, 64, 48)
    with pytest.raises(FileExistsError, match="is finished"):
        train(task, run="one")


def test_predictions_are_those_of_the_saved_model(folder, home):
    run = train(get_task(str(folder), **quick), run="one")
    model = load_model(run)
    predictions = pd.read_csv(run / "predictions_val.csv", keep_default_na=False)
    assert model.report(
        [folder / "images" / i / "frontal.png" for i in predictions.id], num_beams=1
    ) == list(predictions.generated)


def test_early_stopping(folder, home):
    still = dict(epochs=30, patience=1, lr=1e-9, encoder_lr=1e-9)
    run = train(get_task(str(folder), **quick | still), run="one")
    history = json.loads((run / "metrics.json").read_text())["history"]
    evaluations = [h for h in history if "eval_loss" in h]
    assert len(evaluations) == 2  # the first is the best, the second no better


def test_run_with_other_settings_or_a_path_as_name_is_refused(folder, home):
    task = get_task(str(folder), **quick)
    run_folder(task, "one")
    assert run_folder(task, "one").name == "one"
    with pytest.raises(ValueError, match="begun with other settings .*'lr': \\(0.001, 0.002\\)"):
        run_folder(replace(task, lr=2e-3), "one")
    for name in ("../one", "a/b", ".."):
        with pytest.raises(ValueError, match="plain name"):
            run_folder(task, name)


def test_run_is_not_resumed_with_changed_data(folder, home, tmp_path):
    "A run knows its data by path and sum; the error names both files."
    copy = shutil.copytree(folder, tmp_path / "copy")
    task = get_task(str(copy), **quick)
    begun = run_folder(task, "one")
    studies = [s for v in open_task(task).values() for s in v]
    write_annotation(studies[1:], copy / "annotation.json")
    with pytest.raises(
        ValueError,
        match=f"{begun} was made with {copy}/annotation.json .* now reads {copy}/annotation.json",
    ):
        run_folder(task, "one")


def test_folders_of_the_same_last_name_do_not_share_runs(folder, home, tmp_path):
    task, other = (
        get_task(str(shutil.copytree(folder, tmp_path / place / "mine"))) for place in ("a", "b")
    )
    assert task.name != other.name
    assert run_folder(task, "one") != run_folder(other, "one")


def test_demo_may_draw_more_phantoms_between_two_runs(home):
    task = get_task("demo", n_train=2, n_val=1, n_test=1, resize=112)
    prepare(task)
    begun = run_folder(task, "one")
    prepare(replace(task, n_train=3))
    assert run_folder(task, "one") == begun


def test_command_line_answers_mistakes_with_a_sentence(folder, home):
    words = ["--task", str(folder), *(w for n, v in quick.items() for w in (f"--{n}", str(v)))]
    for more, said in (
        (["--max_length", "2000"], "decoder has"),
        (["--init", "~/nothing"], "nothing"),
        (["--device_batch", "3"], "does not divide"),
        (["--n_val", "0"], "n_val"),
        (["--run", "a/b"], "plain name"),
    ):
        with pytest.raises(SystemExit) as e:
            main([*words, *more])
        assert e.value.code == 2 or said in str(e.value), more


def test_saved_model_knows_its_views(folder, home):
    "Also one that was saved before models did: its run knows."
    for run, processor in (("new", {}), ("old", {"views": None})):
        place = train(get_task(str(folder), **quick, views=1), run=run)
        path = place / "model" / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | processor))
        assert (
            load_model(place).image_processor.views
            == load_model(place / "model").image_processor.views
            == 1
        )


def test_init_starts_from_a_run(folder, home):
    task = get_task(str(folder), **quick)
    run = train(task, run="one")
    saved = load_file(run / "model" / "model.safetensors")
    for place in (run, run / "model"):
        state = make_model(task, [], place).state_dict()
        assert all(torch.equal(state[n], saved[n]) for n in saved)
    with pytest.raises(FileNotFoundError, match="holds no model"):
        load_model(folder)
    again = train(replace(task, epochs=1), run="two", init=run)
    assert json.loads((again / "metrics.json").read_text())["init"] == str(run)


def command(task: Path, run: str, *more: str) -> list[str]:
    words = [w for n, v in {**quick, "epochs": 3}.items() for w in (f"--{n}", str(v))]
    return ["-m", "cvt2distilgpt2.train", "--task", str(task), "--run", run, *words, *more]


def test_killed_run_resumes_to_the_same_weights(folder, home):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CVT2DISTILGPT2_HOME": str(home)}
    runs = home / "runs" / get_task(str(folder)).name
    subprocess.run(
        [sys.executable, *command(folder, "whole")],
        env=environment,
        check=True,
        capture_output=True,
        timeout=300,
    )
    process = subprocess.Popen(
        [sys.executable, *command(folder, "killed")],
        env=environment,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    until = time.time() + 300
    checkpoints = runs / "killed" / "checkpoints"
    while time.time() < until and not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (runs / "killed" / "metrics.json").exists()
    subprocess.run(
        [sys.executable, *command(folder, "killed")],
        env=environment,
        check=True,
        capture_output=True,
        timeout=300,
    )
    whole, resumed = (
        load_file(runs / name / "model" / "model.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    whole, resumed = (
        (runs / name / "predictions_val.csv").read_text() for name in ("whole", "killed")
    )
    assert whole == resumed


@pytest.mark.full
def test_two_processes_train_one_run(folder, home):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CVT2DISTILGPT2_HOME": str(home),
        "CUDA_VISIBLE_DEVICES": "",
    }
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "--",
        *command(folder, "two")[1:],
    ]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    run = home / "runs" / get_task(str(folder)).name / "two"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["hardware"]["processes"] == 2
    predictions = pd.read_csv(run / "predictions_val.csv", keep_default_na=False)
    assert list(predictions.id) == ["s16", "s17", "s18", "s19"]  # each study once, in order
    model = load_model(run)
    assert model.report(
        [folder / "images" / i / "frontal.png" for i in predictions.id], num_beams=1
    ) == list(predictions.generated)


# several references


def test_several_references_reach_validation_and_predictions(folder, home):
    task = get_task(str(folder), **quick)
    studies = {
        split: [replace(s, reports=(s.report, f"There are {split} lungs.")) for s in v]
        for split, v in open_task(task).items()
    }
    label = task_labels(task, studies["train"])
    model = make_model(task, [t for texts in references_of(studies["train"], label) for t in texts])
    ids = model.tokenizer("There are train lungs.").input_ids
    assert model.tokenizer.unk_token_id not in ids  # it knows second references, too
    trainer = make_trainer(model, task, studies, home)
    said = model.tokenizer(["There are train lungs."] * 4, return_tensors="np").input_ids
    scores = trainer.compute_metrics(type("Prediction", (), dict(predictions=said, label_ids=said)))
    # "There are <unk> lungs" or the like: near the second reference, far from the first
    assert 0.6 < scores["rouge_l"] < 1
    # training draws one of them, validation takes the first
    assert trainer.train_dataset.draw and not trainer.eval_dataset.draw
    references = references_of(studies["val"], label)
    table = pd.read_csv(write_predictions(home / "p.csv", studies["val"], references, ["x"] * 4))
    assert list(table) == ["id", "reference", "generated", "other_references"]
    assert list(table.reference) == [s.report for s in studies["val"]]
    assert [json.loads(t) for t in table.other_references] == [["There are val lungs."]] * 4
    first = [[s.report] for s in studies["val"]]
    table = pd.read_csv(write_predictions(home / "p.csv", studies["val"], first, ["x"] * 4))
    assert list(table) == ["id", "reference", "generated"]


def test_the_vocabulary_is_of_all_references(folder):
    task = get_task(str(folder), profile="chen", style="iu_x_ray", **quick)
    reports = ("Heart normal.", "Lungs clear.")
    study = Study("s0", reports[0], ("a.png",), "train", reports=reports)
    train = [replace(study, id=f"s{i}") for i in range(3)]
    known = task_labels(task, train).vocabulary
    assert known == (".", "<unk>", "clear", "heart", "lungs", "normal")


# the published layouts


@pytest.mark.parametrize(
    "name, make, views", [("mimic_cxr", make_mimic, 1), ("iu_x_ray", make_iu, 2)]
)
def test_published_tasks_run_on_their_layouts(name, make, views, home):
    make(home / "data")
    task = get_task(name, **{**quick, "epochs": 1})
    run = train(task, run="one")
    label = make_labels(task, [s.report for s in open_task(task)["train"]])
    predictions = pd.read_csv(run / "predictions_val.csv", keep_default_na=False)
    assert list(predictions.reference) == [label(s.report) for s in open_task(task)["val"]]
    assert all(len(s.image_path) == views for s in open_task(task)["train"])


# real studies


@pytest.fixture
def pairs(test_data) -> Path:
    return test_data / "cxr_pairs"


def test_real_studies_train_by_path(pairs, home):
    task = get_task(str(pairs), **{**quick, "epochs": 1, "batch_size": 10, "device_batch": 10})
    run = train(task, run="one")
    assert len(pd.read_csv(run / "predictions_val.csv")) == 7
    assert json.loads((run / "metrics.json").read_text())["data"]["train"] == 50


@pytest.mark.full
def test_real_training_reports_are_written_back(pairs, home, tmp_path):
    "An overfit test: it shows that images reach the words, not that anything of use was learned."
    learned = open_task(get_task(str(pairs)))["train"]
    # fewer, longer epochs
    often = [replace(s, id=f"{s.id}-{k}") for s in learned for k in range(5)]
    again = [replace(s, split="val") for s in learned]
    write_annotation(often + again, tmp_path / "annotation.json")
    task = get_task(
        str(tmp_path),
        images=str(pairs / "images"),
        model="small",
        resize=132,
        image_size=128,
        rotation=0.0,
        batch_size=10,
        device_batch=10,
        epochs=30,
        patience=30,
        lr=1.5e-3,
        encoder_lr=1.5e-3,
        schedule="cosine",
        clip=1.0,
        val_beams=1,
        workers=0,
        max_length=192,
    )
    run = train(task, run="overfit")
    predictions = pd.read_csv(run / "predictions_val.csv", keep_default_na=False)
    assert len(predictions) == 50
    exact = (predictions.generated == predictions.reference).sum()
    assert exact >= 48, f"{exact} of 50"


@pytest.mark.full
def test_full_size_model_trains_on_real_studies(pairs, test_data, home, tmp_path):
    "CvT-21 and DistilGPT2, full-size, from folders like the hub's, random weights; 20 steps."
    torch.manual_seed(0)
    CvtForImageClassification(CvtConfig(depth=[1, 4, 16])).save_pretrained(tmp_path / "cvt")
    GPT2LMHeadModel(GPT2Config(n_layer=6)).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(test_data / "gpt2_bpe").save_pretrained(tmp_path / "gpt2")
    task = get_task(
        str(pairs),
        encoder=str(tmp_path / "cvt"),
        decoder=str(tmp_path / "gpt2"),
        n_train=40,
        n_val=2,
        batch_size=2,
        device_batch=2,
        epochs=1,
        val_beams=1,
        max_length=64,
        workers=0,
    )
    run = train(task, run="full")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["best_step"] == 20
    assert all(np.isfinite(h["eval_loss"]) for h in metrics["history"] if "eval_loss" in h)
    assert load_model(run).num_parameters() == 127_629_376


# data that are legal and unlike the demo's


def test_warm_start_with_less_than_a_batch(folder):
    "The only batch is used, however small."
    task = get_task(str(folder), **{**quick, "warm_start": 1})
    studies = open_task(task)["train"][:3]
    dataset = make_dataset(task, studies, str.strip, train=True)
    model = make_model(task, [s.report for s in studies])
    assert np.isfinite(warm_start(model, task, dataset, studies)).all()


def test_validation_of_findings_that_say_more_than_a_phantoms():
    edema = {"type": "edema", "certainty": 0.9}
    studies = [Study("a", "Pulmonary edema.", ("a.png",), "val", findings=(edema,))]
    scores = validation_scores(["There is pulmonary edema."], [["Pulmonary edema."]], studies)
    assert scores["finding_f1"] == 1
