"The CvT encoder against transformers' CvT at full size, and against weights that do not fit."

import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import CvtConfig, CvtForImageClassification
from transformers.activations import QuickGELUActivation

from cvt2distilgpt2.encoder import (
    CVT_CONFIGS,
    CvT,
    CvTConfig,
    check_source,
    count_parameters,
    for_inference,
    from_hub_config,
    from_hub_names,
    load_cvt,
    load_exactly,
)

torch.set_num_threads(1)
SIZES = {
    "cvt_13": {"depth": (1, 2, 10)},
    "cvt_21": {"depth": (1, 4, 16)},
    "cvt_w24": {
        "depth": (2, 2, 20),
        "embed_dim": (192, 768, 1024),
        "num_heads": (3, 12, 16),
        "drop_path_rate": (0.0, 0.0, 0.3),
    },
}
SMALL = {"embed_dim": (16, 32, 48), "num_heads": (1, 2, 3), "depth": (1, 2, 3)}


def random_hub_cvt(seed=0, **sizes):
    "A CvT of transformers with QuickGELU; all its numbers are random, also the statistics."
    torch.manual_seed(seed)
    model = CvtForImageClassification(CvtConfig(**sizes)).eval()
    for name, tensor in model.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn_like(tensor))
    for module in model.modules():
        if type(module).__name__ == "CvtIntermediate":
            module.activation = QuickGELUActivation()
    return model


def features(hub, images):
    return hub.cvt(images).last_hidden_state.flatten(2).transpose(1, 2)


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


@pytest.fixture
def small(tmp_path):
    "A small random CvT of transformers, and the folder where it is saved."
    hub = random_hub_cvt(**SMALL)
    hub.save_pretrained(tmp_path / "cvt")
    return hub, tmp_path / "cvt"


@torch.no_grad()
def test_cvt_21_computes_what_transformers_computes_at_384_pixels(tmp_path):
    hub = random_hub_cvt(**SIZES["cvt_21"], num_labels=1000)
    images = torch.randn(1, 3, 384, 384)
    hub.save_pretrained(tmp_path)
    ours = load_cvt(tmp_path)
    assert ours.config == CVT_CONFIGS["cvt_21"]
    assert (ours.forward_features(images) - features(hub, images)).abs().max() < 1e-4


def test_microsofts_file_holds_the_same_as_the_hubs_folder(tmp_path):
    hub = random_hub_cvt(**SIZES["cvt_21"], num_labels=1000)
    hub.save_pretrained(tmp_path)
    torch.save(from_hub_names(hub.state_dict()), tmp_path / "CvT-21-384x384-IN-22k.pth")
    assert same_weights(load_cvt(tmp_path), load_cvt(tmp_path / "CvT-21-384x384-IN-22k.pth"))


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(64, 64), (97, 130), (33, 200), (16, 16)])
def test_any_image_size(small, height, width):
    hub, folder = small
    images = torch.randn(2, 3, height, width)
    assert (load_cvt(folder).forward_features(images) - features(hub, images)).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.full
@pytest.mark.parametrize("name", ["cvt_13", "cvt_w24"])
def test_other_published_sizes_compute_the_same(name, tmp_path):
    hub = random_hub_cvt(**SIZES[name])
    images = torch.randn(1, 3, 224, 224)
    hub.save_pretrained(tmp_path)
    ours = load_cvt(tmp_path)
    assert ours.config == CVT_CONFIGS[name]
    expected = features(hub, images)
    difference = (ours.forward_features(images) - expected).abs().max()
    assert difference < 1e-5 * expected.std()  # the features of CvT-W24 reach 30


@pytest.mark.parametrize("name", SIZES)
def test_names_and_parameters_are_those_of_the_hub_one_to_one(name):
    with torch.device("meta"):
        hub = CvtForImageClassification(CvtConfig(**SIZES[name], num_labels=1000))
        ours = CvT(CVT_CONFIGS[name])
    renamed = from_hub_names(hub.state_dict())
    assert len(renamed) == len(hub.state_dict())
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert {name: tensor.shape for name, tensor in renamed.items()} == shapes
    assert count_parameters(ours) == count_parameters(hub)
    assert from_hub_config(hub.config) == CVT_CONFIGS[name]


def test_published_parameter_count():
    with torch.device("meta"):
        assert count_parameters(CvT(CVT_CONFIGS["cvt_21"])) == 31_622_696


def test_a_folder_with_pytorch_model_bin(small, tmp_path):
    hub, folder = small
    torch.save(hub.state_dict(), folder / "pytorch_model.bin")
    expected = load_cvt(folder)
    (folder / "model.safetensors").unlink()
    assert same_weights(load_cvt(folder), expected)


def change(weights, how):
    if how == "missing":
        del weights["cvt.encoder.stages.2.cls_token"]
    if how == "unexpected":
        weights["cvt.encoder.stages.2.position"] = torch.zeros(1)
    if how == "another shape":
        weights["cvt.encoder.stages.2.cls_token"] = torch.zeros(1, 1, 7)
    return weights


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", "1 missing: stage2.cls_token"),
        ("unexpected", "1 unexpected: cvt.encoder.stages.2.position|1 unexpected: stage2.position"),
        (
            "another shape",
            r"1 of another shape: stage2.cls_token \(1, 1, 7\) instead of \(1, 1, 48\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_names_them(small, how, message):
    hub, folder = small
    save_file(change(dict(hub.state_dict()), how), folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_cvt(folder)


def test_an_error_changes_nothing():
    model = CvT(CvTConfig(widths=(8, 8, 8), heads=(1, 1, 1)), num_classes=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in before.items()} | {"more": torch.zeros(1)}
    with pytest.raises(ValueError, match="1 unexpected: more"):
        load_exactly(model, weights, "x")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Mischief:
    def __reduce__(self):
        return (os.mkdir, (os.environ["MISCHIEF"],))


def test_code_in_a_file_is_not_run(small, tmp_path, monkeypatch):
    hub, _ = small
    monkeypatch.setenv("MISCHIEF", str(tmp_path / "mischief"))
    torch.save({**hub.state_dict(), "x": Mischief()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth cannot be read as weights"):
        load_cvt(tmp_path / "evil.pth")
    assert not (tmp_path / "mischief").exists()


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_file_cut_short(small, tmp_path, share):
    hub, folder = small
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_cvt(folder)
    torch.save(hub.state_dict(), tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="cut.pth cannot be read as weights"):
        load_cvt(tmp_path / "cut.pth")


def test_a_folder_without_weights(tmp_path):
    CvtConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="neither model.safetensors nor pytorch_model.bin"):
        load_cvt(tmp_path)


def test_a_file_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match="CvT.pth does not exist"):
        load_cvt("CvT.pth")


@pytest.mark.parametrize("source", ["microsoft/cvt-21-384-22k", "distilgpt2"])
def test_what_may_be_a_name_on_the_hub_is_no_missing_file(source):
    check_source(source)


@pytest.mark.parametrize("source", ["owner/CvT.pth", "./no/such/folder", "/no/such", "a b"])
def test_what_cannot_be_a_name_on_the_hub_must_exist(source):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_source(source)


def test_a_file_of_unknown_sizes(tmp_path):
    torch.save({"stage0.patch_embed.proj.weight": torch.zeros(5, 3, 7, 7)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth has stages of width \(5,\)"):
        load_cvt(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"depths": (1, 2)}, "one entry a stage"),
        ({"heads": (1, 2, 5)}, "multiple of its heads"),
        ({"activation": "relu"}, "activation must be"),
    ],
)
def test_sizes_that_do_not_fit_together(sizes, message):
    with pytest.raises(ValueError, match=message):
        CvTConfig(**sizes)


def test_timm_knows_it():
    assert set(CVT_CONFIGS) <= set(timm.list_models("cvt_*"))
    model = timm.create_model("cvt_demo", num_classes=5, activation="gelu")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5) and model.config.activation == "gelu"
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert timm.get_pretrained_cfg("cvt_21").hf_hub_id == "microsoft/cvt-21-384-22k"
    with pytest.raises(TypeError, match="width"):
        timm.create_model("cvt_demo", width=3)


def test_registering_again_does_not_warn():
    "In a process of its own: other tests hold the classes of the first import."
    code = (
        "import importlib, warnings, cvt2distilgpt2.encoder as encoder; "
        "warnings.simplefilter('error'); importlib.reload(encoder)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checkpointing_changes_neither_gradients_nor_statistics():
    def run(enable):
        torch.manual_seed(0)
        config = CvTConfig(
            widths=(8, 16, 16), heads=(1, 2, 2), depths=(1, 1, 2), drop_paths=(0, 0, 0.5)
        )
        model = CvT(config, num_classes=0)
        model.set_grad_checkpointing(enable)
        model.forward_features(torch.randn(4, 3, 64, 64)).square().sum().backward()
        return [p.grad for p in model.parameters()] + list(model.buffers())

    plain, checkpointed = run(False), run(True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, checkpointed, strict=True))


def random_cvt(name):
    "A CvT of ours in which all numbers are random, also the statistics."
    torch.manual_seed(0)
    model = CvT(CVT_CONFIGS[name], num_classes=0).eval()
    for tensor_name, tensor in model.state_dict().items():
        if "running_var" in tensor_name:
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn_like(tensor))
    return model


@pytest.mark.parametrize("name, size", [("cvt_21", 384), ("cvt_13", 200), ("cvt_demo", 112)])
@torch.no_grad()
def test_the_form_for_inference_computes_the_same_tokens(name, size):
    model = random_cvt(name)
    images = torch.randn(1, 3, size, size)
    plain = model.forward_features(images)
    single = for_inference(model, torch.float32).forward_features(images)
    half = for_inference(model, torch.bfloat16).forward_features(images.bfloat16()).float()
    assert (plain - single).abs().max() < 1e-4
    assert (plain - half).norm() < 0.05 * plain.norm()


@torch.no_grad()
def test_the_form_for_inference_is_exact_in_double_precision():
    model = random_cvt("cvt_13").double()
    images = torch.randn(1, 3, 200, 200).double()
    exact = for_inference(model, torch.float64).forward_features(images)
    assert torch.allclose(exact, model.forward_features(images), atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_form_for_inference_leaves_the_model_as_it_was(dtype):
    model = random_cvt("cvt_demo")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for_inference(model, dtype)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
