"The search against transformers' generate, token by token, over drawn cases; its memory, what it leaves to transformers."
import random

import pytest
import torch
from transformers import GPT2LMHeadModel
from transformers.utils import logging

from cvt2distilgpt2.decoder import decoder_config
from cvt2distilgpt2.search import Pace, Request, prepare_decoder, run

torch.set_num_threads(1)
VOCABULARY = 60
IDS = {"eos_token_id": VOCABULARY - 3, "bos_token_id": VOCABULARY - 2, "pad_token_id": VOCABULARY - 1}


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def drawn_model(seed, end):
    "A small GPT-2 with random weights; the larger `end`, the more its reports differ in length."
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 130, "initializer_range": 0.3}
    model = GPT2LMHeadModel(decoder_config(VOCABULARY, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1: parameter += 0.2 * torch.randn_like(parameter)
        model.transformer.wte.weight[IDS["eos_token_id"]] *= end
    return model


def drawn_case(seed, longest):
    "A model, visual tokens with their mask, and rules, all by chance."
    chance = random.Random(seed)
    model = drawn_model(chance.randrange(20), chance.choice([0.0, 0.5, 1.0, 1.5, 2.0]))
    images, views, n = chance.randint(1, 16), chance.randint(1, 3), chance.randint(1, 6)
    rules = {"num_beams": chance.randint(1, 8), "max_length": 1 + chance.randint(1, longest)}
    if chance.random() < 0.3: rules["min_length"] = chance.randint(0, rules["max_length"])
    if rules["num_beams"] > 1:
        rules |= {"length_penalty": chance.choice([1.0, 0.0, 2.0, -1.0, 0.6]), "early_stopping": chance.choice([False, True, "never"])}
    visual = chance.choice([0.5, 2.0, 4.0]) * torch.randn(images, views * n, 32)
    is_view = torch.rand(images, views) > 0.4
    is_view[:, 0] = True
    return model, visual, is_view.repeat_interleave(n, 1), rules


def by_transformers(model, visual, mask, **rules):
    start = torch.full((len(visual), 1), IDS["bos_token_id"])
    return model.generate(start, attention_mask=torch.ones_like(start), encoder_hidden_states=visual, encoder_attention_mask=mask.long(), **IDS, **rules)


def both(case, dtype, **kwargs):
    model, visual, mask, rules = case
    model, visual = model.to(dtype), visual.to(dtype)
    return by_transformers(model, visual, mask, **rules), run(prepare_decoder(model, dtype), visual, mask, Request(**rules, **IDS), **kwargs)


@torch.no_grad()
def score(model, visual, mask, tokens, rules):
    "What a report is chosen by: the sum of its log-probabilities, penalised."
    tokens = tokens[: tokens.tolist().index(IDS["eos_token_id"]) + 1] if IDS["eos_token_id"] in tokens.tolist() else tokens[tokens != IDS["pad_token_id"]]
    logits = model(tokens[None, :-1], encoder_hidden_states=visual[None], encoder_attention_mask=mask[None].long()).logits[0]
    chosen = logits.log_softmax(-1).gather(1, tokens[1:, None])
    return (chosen.sum() / (len(tokens) - 1) ** rules.get("length_penalty", 1.0)).item()


def compare(seeds, longest, dtype, **kwargs):
    "Count the reports that differ in anything but a tie, and list the ties by their two scores."
    ties, lengths = [], []
    for seed in seeds:
        case = drawn_case(seed, longest)
        theirs, ours = both(case, dtype, **kwargs)
        lengths.append(len(set((theirs != IDS["pad_token_id"]).sum(1).tolist())))
        if torch.equal(theirs, ours): continue
        assert dtype != torch.float64, f"case {seed} differs"
        model, visual, mask, rules = case
        for i in (i for i in range(len(visual)) if theirs[i].tolist() != ours[i].tolist()):
            ties.append((seed, i, *(score(model, visual[i], mask[i], tokens, rules) for tokens in (theirs[i], ours[i]))))
    print(f"{len(seeds)} cases, {sum(lengths) / len(lengths):.1f} different lengths a case, ties: {ties}")
    assert all(abs(a - b) < 1e-5 for *_, a, b in ties), ties
    assert sum(lengths) > 1.5 * len(lengths)  # reports of a batch do end at different times


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_few_drawn_cases_are_written_as_by_transformers(dtype):
    compare(range(40), 24, dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_drawn_cases_are_written_as_by_transformers(dtype):
    compare(range(1000, 1600), 127, dtype)


def test_looking_seldom_changes_nothing():
    compare(range(100, 120), 24, torch.float64, pace=Pace(8, 0.5))
