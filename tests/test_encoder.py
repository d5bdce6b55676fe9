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

from cvt2distilgpt2.encoder import CVT_CONFIGS, CvT, CvTConfig, count_parameters, for_inference, from_hub_config, from_hub_names, load_cvt, load_exactly

torch.set_num_threads(1)
SIZES = {
    "cvt_13": {"depth": (1, 2, 10)},
    "cvt_21": {"depth": (1, 4, 16)},
    "cvt_w24": {"depth": (2, 2, 20), "embed_dim": (192, 768, 1024), "num_heads": (3, 12, 16), "drop_path_rate": (0.0, 0.0, 0.3)},
}
SMALL = {"embed_dim": (16, 32, 48), "num_heads": (1, 2, 3), "depth": (1, 2, 3)}


def random_hub_cvt(seed=0, **sizes):
    "A CvT of transformers with QuickGELU, in which every number is random, batch norms' statistics among them."
    torch.manual_seed(seed)
    model = CvtForImageClassification(CvtConfig(**sizes)).eval()
    for name, tensor in model.state_dict().items():
        if "running_var" in name: tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point(): tensor.add_(0.05 * torch.randn_like(tensor))
    for module in model.modules():
        if type(module).__name__ == "CvtIntermediate": module.activation = QuickGELUActivation()
    return model


def features(hub, images):
    return hub.cvt(images).last_hidden_state.flatten(2).transpose(1, 2)


@pytest.fixture
def small(tmp_path):
    hub = random_hub_cvt(**SMALL)
    hub.save_pretrained(tmp_path / "cvt")
    return hub, tmp_path / "cvt"


@torch.no_grad()
def test_cvt_21_computes_what_transformers_computes_at_384_pixels(tmp_path):
    hub, images = random_hub_cvt(**SIZES["cvt_21"], num_labels=1000), torch.randn(1, 3, 384, 384)
    hub.save_pretrained(tmp_path)
    ours = load_cvt(tmp_path)
    assert ours.config == CVT_CONFIGS["cvt_21"]
    assert (ours.forward_features(images) - features(hub, images)).abs().max() < 1e-4
    torch.save(from_hub_names(hub.state_dict()), tmp_path / "CvT-21-384x384-IN-22k.pth")  # Microsoft's form
    theirs = load_cvt(tmp_path / "CvT-21-384x384-IN-22k.pth")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


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
    hub, images = random_hub_cvt(**SIZES[name]), torch.randn(1, 3, 224, 224)
    hub.save_pretrained(tmp_path)
    ours = load_cvt(tmp_path)
    assert ours.config == CVT_CONFIGS[name]
    expected = features(hub, images)
    assert (ours.forward_features(images) - expected).abs().max() < 1e-5 * expected.std()  # w24's reach 30


@pytest.mark.parametrize("name", SIZES)
def test_names_and_parameters_are_those_of_the_hub_one_to_one(name):
    with torch.device("meta"):
        hub = CvtForImageClassification(CvtConfig(**SIZES[name], num_labels=1000))
        ours = CvT(CVT_CONFIGS[name])
    renamed = from_hub_names(hub.state_dict())
    assert len(renamed) == len(hub.state_dict())
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in ours.state_dict().items()}
    assert count_parameters(ours) == count_parameters(hub)
    assert from_hub_config(hub.config) == CVT_CONFIGS[name]


def test_published_parameter_count():
    with torch.device("meta"): assert count_parameters(CvT(CVT_CONFIGS["cvt_21"])) == 31_622_696


def test_a_folder_with_pytorch_model_bin(small, tmp_path):
    hub, folder = small
    torch.save(hub.state_dict(), folder / "pytorch_model.bin")
    expected = load_cvt(folder).state_dict()
    (folder / "model.safetensors").unlink()
    assert all(torch.equal(a, b) for a, b in zip(load_cvt(folder).state_dict().values(), expected.values(), strict=True))


def change(weights, how):
    if how == "missing": del weights["cvt.encoder.stages.2.cls_token"]
    if how == "unexpected": weights["cvt.encoder.stages.2.position"] = torch.zeros(1)
    if how == "another shape": weights["cvt.encoder.stages.2.cls_token"] = torch.zeros(1, 1, 7)
    return weights


@pytest.mark.parametrize("how, said", [("missing", "1 missing: stage2.cls_token"),
    ("unexpected", "1 unexpected: cvt.encoder.stages.2.position|1 unexpected: stage2.position"),
    ("another shape", r"1 of another shape: stage2.cls_token \(1, 1, 7\) instead of \(1, 1, 48\)")])
def test_weights_that_do_not_fit_are_an_error_that_names_them(small, how, said):
    hub, folder = small
    save_file(change(dict(hub.state_dict()), how), folder / "model.safetensors")
    with pytest.raises(ValueError, match=said): load_cvt(folder)


def test_an_error_changes_nothing():
    model = CvT(CvTConfig(widths=(8, 8, 8), heads=(1, 1, 1)), num_classes=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = {name: tensor + 1 for name, tensor in before.items()} | {"more": torch.zeros(1)}
    with pytest.raises(ValueError, match="1 unexpected: more"): load_exactly(model, wrong, "x")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Mischief:
    def __reduce__(self): return (os.mkdir, (os.environ["MISCHIEF"],))


def test_damaged_and_dangerous_files(small, tmp_path, monkeypatch):
    hub, folder = small
    monkeypatch.setenv("MISCHIEF", str(tmp_path / "mischief"))
    torch.save({**hub.state_dict(), "x": Mischief()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth cannot be read as weights"): load_cvt(tmp_path / "evil.pth")
    assert not (tmp_path / "mischief").exists()
    whole = (folder / "model.safetensors").read_bytes()
    for share in (0, 0.01, 0.5, 0.999):
        (folder / "model.safetensors").write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(ValueError, match="cannot be read as weights"): load_cvt(folder)
    torch.save(hub.state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for share in (0, 0.01, 0.5, 0.999):
        (tmp_path / "cut.pth").write_bytes(whole[:int(len(whole) * share)])
        with pytest.raises(ValueError, match="cut.pth cannot be read as weights"): load_cvt(tmp_path / "cut.pth")


def test_nothing_to_load(tmp_path):
    CvtConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="neither model.safetensors nor pytorch_model.bin"): load_cvt(tmp_path)
    with pytest.raises(FileNotFoundError, match="CvT.pth does not exist"): load_cvt("CvT.pth")
    torch.save({"stage0.patch_embed.proj.weight": torch.zeros(5, 3, 7, 7)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth has stages of width \(5,\)"): load_cvt(tmp_path / "other.pth")


@pytest.mark.parametrize("wrong", [{"depths": (1, 2)}, {"heads": (1, 2, 5)}, {"activation": "relu"}])
def test_sizes_that_do_not_fit_together(wrong):
    with pytest.raises(ValueError): CvTConfig(**wrong)


def test_timm_knows_it():
    assert set(CVT_CONFIGS) <= set(timm.list_models("cvt_*"))
    model = timm.create_model("cvt_demo", num_classes=5, activation="gelu")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5) and model.config.activation == "gelu"
    assert model.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert timm.get_pretrained_cfg("cvt_21").hf_hub_id == "microsoft/cvt-21-384-22k"
    with pytest.raises(TypeError, match="width"): timm.create_model("cvt_demo", width=3)


def test_registering_again_does_not_warn():
    "In a process of its own: other tests hold the classes of the first import."
    code = "import importlib, warnings, cvt2distilgpt2.encoder as e; warnings.simplefilter('error'); importlib.reload(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_checkpointing_changes_neither_gradients_nor_statistics():
    def run(enable):
        torch.manual_seed(0)
        model = CvT(CvTConfig(widths=(8, 16, 16), heads=(1, 2, 2), depths=(1, 1, 2), drop_paths=(0, 0, 0.5)), num_classes=0)
        model.set_grad_checkpointing(enable)
        model.forward_features(torch.randn(4, 3, 64, 64)).square().sum().backward()
        return [p.grad for p in model.parameters()], list(model.buffers())

    for plain, again in zip(run(False), run(True)):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name, size", [("cvt_21", 384), ("cvt_13", 200), ("cvt_demo", 112)])
@torch.no_grad()
def test_the_form_for_inference_computes_the_same_tokens(name, size):
    torch.manual_seed(0)
    model = CvT(CVT_CONFIGS[name], num_classes=0).eval()
    for tensor_name, tensor in model.state_dict().items():
        if "running_var" in tensor_name: tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point(): tensor.add_(0.05 * torch.randn_like(tensor))
    images, before = torch.randn(1, 3, size, size), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain, fast, half = (form.forward_features(images.to(dtype)).float() for form, dtype in
        [(model, torch.float32), *((for_inference(model, dtype), dtype) for dtype in (torch.float32, torch.bfloat16))])
    assert (plain - fast).abs().max() < 1e-4 and (plain - half).norm() < 0.05 * plain.norm()
    if size < 384: assert torch.allclose(for_inference(model.double(), torch.float64).forward_features(images.double()), model.forward_features(images.double()), atol=1e-10)
    assert all(torch.equal(before[key], tensor.to(before[key].dtype)) for key, tensor in model.state_dict().items())
