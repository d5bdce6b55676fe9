"CvT2DistilGPT2 beside transformers' own parts, with hostile files and images of every kind."

import contextlib
import functools
import os
import subprocess
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_images import write
from torchvision.transforms import v2
from transformers import CvtConfig, CvtForImageClassification, CvtModel, GPT2LMHeadModel
from transformers.activations import QuickGELUActivation

from cvt2distilgpt2 import data, encoder, search, tasks
from cvt2distilgpt2.decoder import decoder_config, load_tokenizer, tokenize_reports, train_tokenizer
from cvt2distilgpt2.encoder import CvTConfig, count_parameters
from cvt2distilgpt2.model import (
    RELEASED_NAMES,
    CvT2DistilGPT2,
    CvT2DistilGPT2Config,
    ReportImageProcessor,
    model_card,
    read_checkpoint,
    study_batch,
)

torch.set_num_threads(1)
DATA = os.environ.get("CVT2DISTILGPT2_TEST_DATA")
REPORTS = [
    "The heart is enlarged. There is a small left effusion.",
    "No focal consolidation, effusion or pneumothorax.",
]


def shake(module, by, seed=0):
    "Add noise to every number of `module`, running statistics among them."
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.add_(by * torch.randn(tensor.shape, generator=generator))
    return module.eval()


@functools.cache
def tokenizer():
    return train_tokenizer(REPORTS * 3, 320)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = CvT2DistilGPT2Config(
        encoder=CvTConfig(widths=(8, 16, 24), heads=(1, 2, 3), depths=(1, 1, 2)),
        decoder=decoder_config(320, n_layer=2, n_embd=32, n_head=2, n_positions=64),
    )
    model = shake(CvT2DistilGPT2(config), 0.3)
    model.tokenizer = tokenizer()
    model.image_processor = ReportImageProcessor(72, 64)
    return model


def save_parts(cvt, language_model, folder):
    "Save two parts of transformers, the CvT with the activation that it was trained with."
    for module in cvt.modules():
        if type(module).__name__ == "CvtIntermediate":
            module.activation = QuickGELUActivation()
    cvt.save_pretrained(folder / "cvt")
    language_model.save_pretrained(folder / "gpt2")


def compare(ours, cvt, images, ids, length):
    "Assert that logits, greedy tokens and beam-4 tokens are those of transformers' parts."
    decoder = GPT2LMHeadModel(ours.decoder.config).eval()
    decoder.load_state_dict(ours.decoder.state_dict())
    body = getattr(cvt, "cvt", cvt)
    maps = [body(view).last_hidden_state for view in images.unbind(1)]
    features = torch.cat([feature_map.flatten(2).transpose(1, 2) for feature_map in maps], 1)
    visual = features @ ours.projection.weight.T
    expected = decoder(ids, encoder_hidden_states=visual).logits
    assert (ours(images, decoder_input_ids=ids).logits - expected).abs().max() < 1e-4
    start = torch.full((len(images), 1), ours.config.bos_token_id)
    seen = {"attention_mask": torch.ones_like(start), "encoder_hidden_states": visual}
    for num_beams in (1, 4):
        rules = {"num_beams": num_beams, "max_length": length}
        rules["pad_token_id"] = ours.config.pad_token_id
        plain = decoder.generate(start, use_cache=False, **seen, **rules)
        assert torch.equal(ours.generate(images, **rules), plain)
        assert torch.equal(ours.generate(images, use_cache=False, **rules), plain)
    return plain


@torch.no_grad()
@pytest.mark.parametrize("views", [1, 2])
def test_small_model_is_the_plain_composition(views, tmp_path):
    torch.manual_seed(0)
    sizes = CvtConfig(embed_dim=(16, 32, 48), num_heads=(1, 2, 3), depth=(1, 2, 3))
    cvt = shake(CvtModel(sizes), 0.1)
    sizes = decoder_config(318, n_layer=3, n_embd=64, n_head=4, add_cross_attention=False)
    save_parts(cvt, GPT2LMHeadModel(sizes), tmp_path)
    ours = CvT2DistilGPT2.from_warm_start(tmp_path / "cvt", tmp_path / "gpt2", tokenizer())
    shake(ours.decoder, 0.3)
    images = torch.randn(4, views, 3, 96, 96)
    written = compare(ours, cvt, images, torch.randint(0, 256, (4, 30)), length=40)
    assert len(set(map(tuple, written.tolist()))) == 4  # the reports depend on the images


@torch.no_grad()
def test_full_size_model_is_the_plain_composition(tmp_path):
    torch.manual_seed(0)
    cvt = shake(CvtForImageClassification(CvtConfig(depth=(1, 4, 16), num_labels=1000)), 0.05)
    save_parts(cvt, GPT2LMHeadModel(decoder_config(318, add_cross_attention=False)), tmp_path)
    ours = CvT2DistilGPT2.from_warm_start(tmp_path / "cvt", tmp_path / "gpt2", tokenizer())
    published_size = 50259
    ours.decoder.resize_token_embeddings(published_size, mean_resizing=False)
    assert count_parameters(ours) == 127_629_376
    shake(ours.decoder, 0.02)
    images = torch.randn(1, 1, 3, 384, 384)
    compare(ours, cvt, images, torch.randint(0, 50000, (1, 20)), length=10)


def test_published_parameter_counts():
    with torch.device("meta"):
        model = CvT2DistilGPT2(CvT2DistilGPT2Config())
    unused = 2 * 384 + 384 * 1000 + 1000  # norm and classifier
    assert count_parameters(model) == 127_629_376
    assert count_parameters(model) + unused == 128_015_144
    assert all(p.requires_grad for p in model.parameters())


def test_warm_start_from_microsofts_file(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = CvTConfig(widths=(8, 16, 24), heads=(1, 2, 3), depths=(1, 1, 2))
    monkeypatch.setitem(encoder.CVT_CONFIGS, "tiny", config)
    source = shake(encoder.CvT(config), 0.1)
    torch.save(source.state_dict(), tmp_path / "CvT.pth")
    sizes = decoder_config(318, n_layer=1, n_embd=32, n_head=2, add_cross_attention=False)
    GPT2LMHeadModel(sizes).save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    model = CvT2DistilGPT2.from_warm_start(tmp_path / "CvT.pth", tmp_path / "gpt2")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.encoder.cvt.forward_features(images), source.forward_features(images))
    assert len(model.tokenizer) == 320 and not model.training


# --- generating ---


@torch.no_grad()
def test_cached_logits_are_the_uncached(model):
    images = torch.randn(3, 2, 3, 64, 64)
    ids = torch.randint(0, 256, (3, 12))
    cache = {}
    steps = []
    for i in range(12):
        out = model(images, decoder_input_ids=ids[:, i : i + 1], use_cache=True, **cache)
        names = ("cache", "past_key_values")  # in newer and in older versions of transformers
        cache = {name: value for name, value in out.items() if name in names}
        steps.append(out.logits)
    whole = model(images, decoder_input_ids=ids).logits
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)


@torch.no_grad()
def test_empty_views_change_nothing(model):
    images = torch.randn(4, 3, 3, 64, 64)
    ids = torch.randint(0, 256, (4, 9))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool()
    together = model(images, mask, decoder_input_ids=ids).logits
    rules = {"max_length": 20, "num_beams": 4}
    written = model.generate(images, mask, **rules)
    for i, is_real in enumerate(mask):
        study = images[i : i + 1, is_real]
        logits = model(study, decoder_input_ids=ids[i : i + 1]).logits
        assert torch.allclose(logits, together[i : i + 1], atol=1e-4)
        alone = model.generate(study, **rules)
        assert torch.equal(written[i : i + 1, : alone.shape[1]], alone)
    images[~mask] = torch.nan  # what stands in an empty view does not matter
    assert torch.equal(model(images, mask, decoder_input_ids=ids).logits, together)


def test_empty_views_do_not_reach_the_statistics(model):
    images = torch.randn(2, 2, 3, 64, 64)
    mask = torch.tensor([[True, True], [True, False]])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    for junk in (0.0, 1e6):
        model.load_state_dict(state)
        images[1, 1] = junk
        model.train().encode(images, mask)
        seen.append(model.encoder.cvt.stage0.blocks[0].attn.conv_proj_q.bn.running_mean.clone())
    before = state["encoder.cvt.stage0.blocks.0.attn.conv_proj_q.bn.running_mean"]
    assert torch.equal(*seen) and not torch.equal(seen[0], before)


def test_pixels_of_another_type_are_refused(model):
    with pytest.raises(TypeError, match="int64"):
        model.encode(torch.zeros(2, 3, 64, 64).long())


def test_a_study_without_a_view_is_refused(model):
    with pytest.raises(ValueError, match="no view"):
        model.encode(torch.randn(2, 2, 3, 64, 64), torch.zeros(2, 2).bool())


@torch.no_grad()
def test_eight_bit_pixels(model):
    "Pixels of 0 to 255, grey or in colour, give what the same pixels give normalised before."
    generator = torch.Generator().manual_seed(0)
    start = model.config.bos_token_id
    ids = torch.tensor([[start, 3], [start, 5]])
    mean = torch.tensor(model.image_processor.image_mean)[:, None, None]
    std = torch.tensor(model.image_processor.image_std)[:, None, None]
    for shape in ((2, 1, 64, 64), (2, 3, 64, 64), (2, 2, 1, 64, 64)):
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        floats = (pixels.expand(*shape[:-3], 3, 64, 64) / 255 - mean) / std
        logits = model(pixels, decoder_input_ids=ids).logits
        assert torch.equal(logits, model(floats, decoder_input_ids=ids).logits)
        written = model.generate(pixels, max_length=8)
        assert torch.equal(written, model.generate(floats, max_length=8))
    model.image_processor.image_mean = [0.0, 0.0, 0.0]  # a model of other statistics
    assert not torch.equal(model.encode(pixels), model.encode(floats))


def test_generation_ends_and_pads(model):
    with torch.no_grad():
        model.decoder.transformer.ln_f.weight.zero_()  # every step gives the same logits
    model.decoder.transformer.ln_f.bias.data = (
        model.decoder.transformer.wte.weight[model.config.eos_token_id].detach() * 10
    )
    ids = model.generate(torch.randn(2, 3, 64, 64), max_length=10)
    assert ids.tolist() == [[318, 317]] * 2
    assert model.generation_config.max_length == 128


def test_the_way_from_report_to_attention_is_short(model, monkeypatch):
    "A reader who steps into `report` meets the attention after at most seven calls of our own."
    stacks = []

    def spy(*args):
        frames = traceback.extract_stack()
        stacks.append([f.name for f in frames if "cvt2distilgpt2" in Path(f.filename).parts[-2:]])
        return search.beam_attention(*args)

    monkeypatch.setattr(search, "default_ops", lambda decoder: search.Ops(beam_attention=spy))
    model.report([np.zeros((70, 70), np.uint8)], max_length=4)
    assert stacks[0][0] == "report"
    assert all(len(stack) <= 7 for stack in stacks), stacks[0]


def test_who_searched_is_known(model):
    images = torch.randn(1, 3, 64, 64)
    model.generate(images, max_length=4)
    assert model.searched == "own"
    model.generate(images, max_length=4, repetition_penalty=1.2)
    assert model.searched == "transformers: repetition_penalty=1.2"
    model.generate(images, max_length=4, search="transformers")
    assert model.searched == "transformers: asked for"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"search": "fast"}, "search must be 'own', 'transformers' or None, not 'fast'"),
        ({"search": "own", "do_sample": True}, "does not serve do_sample=True"),
        ({"search": "transformers", "dtype": torch.bfloat16}, "dtype is for our own search"),
    ],
)
def test_a_search_that_cannot_be_had_is_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.randn(1, 3, 64, 64), **arguments)


# --- training ---


def test_loss_is_the_mean_over_tokens_also_over_several_batches(model):
    text = tokenize_reports(tokenizer(), REPORTS)
    images = torch.randn(2, 3, 64, 64)
    whole = model(images, **text)
    is_label = text["labels"] != -100
    labels = text["labels"][is_label]
    mean = torch.nn.functional.cross_entropy(whole.logits[is_label], labels)
    assert torch.allclose(whole.loss, mean)
    parts = []
    for i in range(2):
        row = {name: tensor[i : i + 1] for name, tensor in text.items()}
        parts.append(model(images[i : i + 1], **row, num_items_in_batch=len(labels)).loss)
    assert torch.allclose(sum(parts), whole.loss)


def test_gradients_reach_everything_with_and_without_checkpointing(model):
    text = tokenize_reports(tokenizer(), REPORTS)
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train().zero_grad()
        torch.manual_seed(0)  # of the dropout
        model(images, **text).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        if not name.endswith("proj_k.bias"):  # which softmax cancels
            assert gradient.abs().sum() > 0, name
        tolerance = 1e-4 * gradient.abs().max().item() + 1e-6
        assert torch.allclose(gradient, checkpointed[name], atol=tolerance), name


def test_bfloat16(model):
    low = model.to(torch.bfloat16)
    assert low.generate(torch.randn(1, 3, 64, 64), max_length=8, num_beams=2).shape[0] == 1


# --- saving ---


@torch.no_grad()
def test_saved_is_loaded(model, tmp_path):
    images = torch.randn(2, 2, 3, 64, 64)
    ids = torch.randint(0, 256, (2, 9))
    card = {"data": "phantoms", "limits": ["none known"]}
    model.save_pretrained(tmp_path, max_shard_size="50KB", card=card)
    loaded = CvT2DistilGPT2.from_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and not list(tmp_path.glob("*.bin"))
    logits = model(images, decoder_input_ids=ids).logits
    assert torch.equal(loaded(images, decoder_input_ids=ids).logits, logits)
    written = model.generate(images, num_beams=4, max_length=20)
    assert torch.equal(loaded.generate(images, num_beams=4, max_length=20), written)
    assert loaded.decoder.lm_head.weight is loaded.decoder.transformer.wte.weight
    assert vars(loaded.image_processor).items() >= vars(model.image_processor).items()
    assert loaded.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert loaded.config.encoder == model.config.encoder
    assert loaded.config.card == card
    assert "phantoms" in (tmp_path / "README.md").read_text()
    assert not loaded.training


@pytest.mark.parametrize("how", ["missing", "unexpected", "another shape"])
def test_saved_weights_that_do_not_fit(model, how, tmp_path):
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if how == "missing":
        del weights["projection.weight"]
    if how == "unexpected":
        weights["projection.bias"] = torch.zeros(32)
    if how == "another shape":
        weights["projection.weight"] = torch.zeros(32, 25)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match="projection|mismatched"):
        CvT2DistilGPT2.from_pretrained(tmp_path)


def test_what_does_not_exist(tmp_path):
    constructors = (
        CvT2DistilGPT2.from_pretrained,
        CvT2DistilGPT2.from_warm_start,
        CvT2DistilGPT2.from_released,
    )
    for load in (*constructors, load_tokenizer):
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            load(tmp_path / "nowhere")


def test_configuration_refuses_what_it_does_not_know(model):
    with pytest.raises(TypeError, match="widht"):
        CvT2DistilGPT2Config(widht=3)
    with pytest.raises(TypeError, match="depth"):
        CvT2DistilGPT2Config(encoder={"depth": 3})
    content = model.config.to_dict()
    assert CvT2DistilGPT2Config.from_dict(content).to_dict() == content


def test_card_claims_only_what_it_was_told():
    text = model_card(None, 5)
    assert "Not for clinical use" in text and text.count("Not stated.") == 4
    text = model_card({"scores": {"BLEU-4": 0.1}, "recipe": "AdamW", "seed": 3}, 5)
    for part in ("| BLEU-4 | 0.1 |", "AdamW", "## Seed\n\n3"):
        assert part in text
    assert text.count("Not stated.") == 2


# --- released checkpoints ---


def published(model, masks=12, size=1000):
    "The `state_dict` of `model` in the published layout."

    def rename(name):
        for published, ours in RELEASED_NAMES.items():
            if name.startswith(ours):
                return published + name.removeprefix(ours)
        return name

    state = {rename(name): tensor for name, tensor in model.state_dict().items()}
    width = model.encoder.cvt.num_features
    state |= {
        "encoder.cvt.norm.weight": torch.randn(width),
        "encoder.cvt.norm.bias": torch.randn(width),
        "encoder.cvt.head.weight": torch.randn(size, width),
        "encoder.cvt.head.bias": torch.randn(size),
    }
    positions = model.config.decoder.n_positions
    blocks = []
    for n in range(model.config.decoder.n_layer):
        for kind in ("attn", "crossattention"):
            blocks.append(f"decoder.encoder_decoder.decoder.transformer.h.{n}.{kind}")
    for block in blocks[:masks]:
        state[f"{block}.bias"] = torch.ones(1, 1, positions, positions, dtype=torch.uint8).tril()
        state[f"{block}.masked_bias"] = torch.tensor(-1e4)
    return state


class Mischief:
    "An object that runs `call(*args)` when it is unpickled."

    def __init__(self, call, *args, **more):
        self.reduced = (call, args, *more.values())

    def __reduce__(self):
        return self.reduced


def mischiefs(folder):
    "Pickled objects that would make `folder`, each in another way."
    path = str(folder)
    yield {"hyper_parameters": {"tokenizer": Mischief(os.mkdir, path)}}
    yield {"hyper_parameters": Mischief(os.system, f"mkdir {path}")}
    yield {"optimizer_states": [Mischief(exec, f"import os; os.mkdir({path!r})")]}
    yield {"callbacks": Mischief(functools.partial(os.mkdir, path))}
    yield {"callbacks": Mischief(subprocess.check_call, ["mkdir", path])}
    yield {"callbacks": {Mischief(getattr, Mischief(__import__, "os"), "mkdir"): 1}}
    yield {"state": Mischief(dict, **{"state": None, "items": iter([Mischief(os.mkdir, path)])})}
    yield {"pytorch-lightning_version": Mischief(Path(path).mkdir)}


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_code_in_a_checkpoint_is_not_run(model, tmp_path):
    path = tmp_path / "a.ckpt"
    mischief = tmp_path / "mischief"
    runs = 0
    for i, evil in enumerate(mischiefs(mischief)):
        torch.save({"state_dict": published(model), **evil}, path)
        loaded = CvT2DistilGPT2.from_released(path, config=model.config)
        assert not mischief.exists(), i
        assert same_weights(loaded, model)
        with contextlib.suppress(Exception):  # PyTorch, told to trust the file, does run it
            torch.load(path, weights_only=False)
        if mischief.exists():
            runs += 1
            mischief.rmdir()
    assert runs >= 6


def test_code_in_the_weights_is_an_error(model, tmp_path):
    path = tmp_path / "a.ckpt"
    mischief = tmp_path / "mischief"
    state = {**published(model), "x": Mischief(os.mkdir, str(mischief))}
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match="does not hold tensors alone"):
        CvT2DistilGPT2.from_released(path, config=model.config)
    assert not mischief.exists()


@pytest.mark.parametrize("masks", [0, 3, 4])
def test_masks_may_be_there_or_not(model, masks, tmp_path):
    torch.save({"state_dict": published(model, masks)}, tmp_path / "a.ckpt")
    assert CvT2DistilGPT2.from_released(tmp_path / "a.ckpt", config=model.config) is not None


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_released_form_saved_from_a_wrapped_model_loads(wrapper, model, tmp_path):
    "DistributedDataParallel and torch.compile put words into the names of weights, also of parts."
    state = {}
    for name, tensor in published(model).items():
        name = name.replace("encoder.cvt.", "encoder._orig_mod.cvt.")
        state[wrapper + name] = tensor
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    loaded = CvT2DistilGPT2.from_released(tmp_path / "a.ckpt", config=model.config)
    assert same_weights(loaded, model)


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", "1 missing: projection.weight"),
        ("unexpected", "1 unexpected: decoder.encoder_decoder.x"),
        ("another shape", r"1 of another shape: projection.weight \(3,\) instead of \(32, 24\)"),
        ("untied", "head that differs from its embedding"),
        ("none", "'state_dict'"),
    ],
)
def test_keys_that_do_not_fit(model, how, message, tmp_path):
    state = published(model)
    if how == "missing":
        del state["encoder_projection.projection.weight"]
    if how == "unexpected":
        state["decoder.encoder_decoder.x"] = torch.ones(1)
    if how == "another shape":
        state["encoder_projection.projection.weight"] = torch.ones(3)
    if how == "untied":
        state["decoder.encoder_decoder.decoder.lm_head.weight"] = torch.zeros(320, 32)
    torch.save({"epoch": 1} if how == "none" else {"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=message):
        CvT2DistilGPT2.from_released(tmp_path / "a.ckpt", config=model.config)


def test_files_that_are_damaged_or_something_else(model, tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": published(model)}, path)
    whole = path.read_bytes()
    for size in [0, 1, 100, *range(1000, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="a.ckpt"):
            read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "no checkpoint")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    with pytest.raises(ValueError, match="TorchScript"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="b.ckpt"):
        read_checkpoint(tmp_path / "b.ckpt")


def test_the_tokenizer_is_fetched_only_for_text(model, tmp_path):
    torch.save({"state_dict": published(model)}, tmp_path / "a.ckpt")
    loaded = CvT2DistilGPT2.from_released(
        tmp_path / "a.ckpt", tokenizer=str(tmp_path / "nowhere"), config=model.config
    )
    assert loaded.generate(torch.randn(1, 3, 64, 64), max_length=4).shape == (1, 4)
    with pytest.raises((OSError, ValueError)):
        loaded.report([np.zeros((70, 70), np.uint8)])
    tokenizer().save_pretrained(tmp_path / "here")
    loaded.tokenizer = str(tmp_path / "here")
    assert isinstance(loaded.report([np.zeros((70, 70), np.uint8)], max_length=8)[0], str)


@pytest.mark.full
@pytest.mark.skipif(not DATA, reason="CVT2DISTILGPT2_TEST_DATA names no folder of test data")
@torch.no_grad()
def test_a_checkpoint_of_the_published_size(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "a.ckpt"
    mischief = tmp_path / "mischief"
    source = shake(CvT2DistilGPT2(CvT2DistilGPT2Config()), 0.02)
    state = published(source)
    assert len(state) == 881
    hyper_parameters = Mischief(os.mkdir, str(mischief))
    torch.save({"state_dict": state, "hyper_parameters": hyper_parameters}, path)
    gpt2_tokenizer = load_tokenizer(Path(DATA) / "gpt2_bpe")
    loaded = CvT2DistilGPT2.from_released(path, tokenizer=gpt2_tokenizer)
    images = torch.randn(1, 3, 384, 384)
    ids = torch.randint(0, 50000, (1, 9))
    logits = source(images, decoder_input_ids=ids).logits
    assert torch.equal(loaded(images, decoder_input_ids=ids).logits, logits)
    assert not mischief.exists()


# --- images ---


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_image_processor_is_torchvisions_pipeline_on_pillow(mode, tmp_path):
    rng = np.random.default_rng(0)
    processor = ReportImageProcessor(72, 64)
    square = v2.Compose([v2.Resize(72, antialias=True), v2.CenterCrop(64)])
    scale = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    normalise = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    processor.save_pretrained(tmp_path)
    loaded = ReportImageProcessor.from_pretrained(tmp_path)
    for width in range(60, 200, 7):
        shape = (91, width, 3) if mode == "RGB" else (91, width)
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        in_colour = image.convert("RGB")
        seen = square(in_colour)
        assert torch.equal(processor.square(in_colour), v2.PILToTensor()(seen))
        pixels = processor([image])["pixel_values"]
        difference = (pixels[0] - normalise(scale(seen))).abs().max()
        assert difference < 1e-6  # rounding: divided by 255, or multiplied by its inverse
        assert torch.equal(loaded([image])["pixel_values"], pixels)


def test_image_processor_agrees_with_the_data():
    rng = np.random.default_rng(0)
    task = tasks.TASKS["mimic_cxr"]
    transform = data.image_transform(task, train=False)
    processor = ReportImageProcessor(task.resize, task.image_size)
    for shape in ((500, 613), (800, 451), (449, 449)):
        image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        pixels = processor([image])["pixel_values"][0]
        assert (data.normalise(transform(image)) - pixels).abs().max() < 1e-6


def test_report_reads_dicom(model, tmp_path):
    path = tmp_path / "no_suffix"
    ramp = np.linspace(0, 255, 80 * 100).reshape(80, 100).astype(np.uint8)
    write(path, pixels=255 - ramp, photometric="MONOCHROME1")
    assert model.report([path], max_length=9) == model.report([ramp], max_length=9)


def test_report_takes_images_of_every_kind(model, tmp_path):
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (90, 80), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(path)
    kinds = [pixels, image, path, str(path), np.stack([pixels] * 3, -1), [pixels]]
    reports = model.report(kinds, max_length=12)
    assert len(reports) == 6 and len(set(reports)) == 1
    assert model.report(str(path), max_length=12) == reports[:1]


def test_studies_of_several_views_are_reported_together(model):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 80), dtype=np.uint8)
    studies = [[pixels, 255 - pixels], pixels]
    together = model.report(studies, num_beams=1, max_length=12)
    alone = [model.report([study], num_beams=1, max_length=12)[0] for study in studies]
    assert together == alone


def test_dropout_plays_no_part_in_a_report(model):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 80), dtype=np.uint8)
    expected = model.report([pixels], max_length=12)
    model.train()
    assert model.report([pixels], max_length=12) == expected
    assert model.training


def test_what_is_no_image(model, tmp_path):
    (tmp_path / "a.txt").write_text("no picture")
    for path in (tmp_path / "a.txt", tmp_path / "missing.png"):
        with pytest.raises(ValueError, match=path.name):
            model.report([path])
    with pytest.raises(TypeError, match="Tensor"):
        model.report([torch.zeros(3, 64, 64)])
    with pytest.raises(ValueError, match="study 1 has no image"):
        study_batch([np.zeros((9, 9), np.uint8), []], model.image_processor)
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        model.report([np.zeros((9, 9), np.uint8)])
