"The programs for a GPU against the plain operations; in Triton's interpreter, where there is no GPU."
import pytest
import torch

from cvt2distilgpt2 import search

kernels = pytest.importorskip("cvt2distilgpt2.kernels", reason="there is no Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("beams, heads, d, places", [(1, 2, 16, 7), (4, 3, 64, 576), (5, 1, 32, 65), (17, 1, 16, 64)])
def test_attending(dtype, beams, heads, d, places):
    if dtype == torch.bfloat16 and DEVICE == "cpu": pytest.skip("the interpreter does not multiply bfloat16")
    torch.manual_seed(beams)
    query = torch.randn(3, beams, 3 * heads * d, device=DEVICE, dtype=dtype)[:, :, :heads * d]
    keys, values = torch.randn(2, 3 * heads, places, d, device=DEVICE, dtype=dtype)
    used = torch.tensor([places, 1, places // 2], device=DEVICE, dtype=torch.int32)
    own = torch.where(torch.rand(3, beams, places, device=DEVICE) < 0.3, 0.0, -torch.inf).to(dtype)
    own[:, :, 0] = 0
    own[torch.arange(places, device=DEVICE).expand(3, beams, -1) >= used[:, None, None]] = -torch.inf
    views = own[:, :1].contiguous()
    for hidden, most in ((own, used), (own, None), (views, None), (None, None)):
        wanted = search.attend(query.float(), keys.float(), values.float(), None if hidden is None else hidden.float())
        assert torch.allclose(kernels.attend(query, keys, values, hidden, most).float(), wanted, atol=CLOSE[dtype], rtol=CLOSE[dtype])


def test_what_lies_beyond_the_used_places_is_never_read():
    query, keys, values = torch.randn(1, 4, 32, device=DEVICE), *torch.full((2, 1, 200, 32), torch.nan, device=DEVICE)
    keys[:, :70], values[:, :70] = torch.randn(2, 1, 70, 32, device=DEVICE)
    found = kernels.attend(query, keys, values, None, torch.tensor([70], dtype=torch.int32, device=DEVICE))
    assert torch.allclose(found, search.attend(query, keys[:, :70], values[:, :70], None), atol=1e-5)


def test_entering():
    new, slots = torch.randn(2, 3, 3 * 2 * 16, device=DEVICE), torch.tensor([[4, 0, 9], [1, 2, 3]], device=DEVICE)
    pools = [torch.zeros(2, 4, 10, 16, device=DEVICE) for _ in range(2)]
    kernels.enter(new, slots, *pools[0])
    search.enter(new, slots, *pools[1])
    assert torch.equal(*pools) and pools[0].any()


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("words", [8, 60, 4096, 9001])
def test_the_best_words(dtype, words):
    torch.manual_seed(words)
    logits = torch.randn(5, words + 7, device=DEVICE).to(dtype)[:, :words] * 3
    end = int(logits[0].argmax())
    for penalty in (0.0, -torch.inf):
        args = logits.clone(), 8, end, torch.tensor([penalty], device=DEVICE)
        (best, token), (wanted, _) = kernels.best_words(*args), search.best_words(*args)
        assert torch.allclose(best, wanted, atol=1e-5)
        own = logits.float().log_softmax(-1).gather(1, token) + torch.where(token == end, penalty, 0.0)
        assert torch.allclose(best, own, atol=1e-5) and all(len(set(row)) == 8 for row in token.tolist())


def test_a_machine_that_cannot_build_them_is_told(monkeypatch):
    def fail(*args): raise RuntimeError("no C compiler")
    monkeypatch.setattr(kernels, "enter", fail)
    kernels.build.cache_clear()
    with pytest.warns(UserWarning, match="does without.*no C compiler"): assert not kernels.build(torch.device(DEVICE))
    kernels.build.cache_clear()


def test_where_they_do_not_serve():
    assert not kernels.serve(torch.device("cpu"), torch.float32, 64)
    assert search.usual_tools(search.Decoder(1, torch.float32, torch.zeros(3, 16), None, [], None, None)) == search.Tools()
