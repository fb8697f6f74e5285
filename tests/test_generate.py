"""Generated text: the same on any number of ranks and in any slices, as reading everything again gives; sampling."""

from typing import Any

import numpy as np
import pytest
import torch
from rank_pool import RankPool

from distattn import presets
from distattn.cache import Cache
from distattn.errors import ConfigError
from distattn.generate import Generated, Sampling, choose_token, generate
from distattn.jobs.context import Context
from distattn.model import Decoder, ModelConfig
from distattn.plan import make_plan
from distattn.spec import AttentionSpec

SIZES = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48)
PROMPTS = [b"a cache of pages", b"once upon a time " * 12, b"a cache of pages"]
SPECS = {
    "window and dense": [presets.mistral(30), presets.dense()],
    "chosen chunks": [presets.hierarchical(32, (8, 32), (2,), 2, "tile", global_keys=(0, 1))] * 2,
}


def decoder(**sizes: Any) -> Decoder:
    """With a head of size 1: an untrained one gives all tokens nearly equal scores."""
    model = Decoder(ModelConfig(**(vars(SIZES) | sizes)), seed=3)
    with torch.no_grad():
        model.head *= SIZES.width**0.5
    return model


def cache_of(context: Context | None, specs: list[AttentionSpec], tokens: int = 1500) -> Cache:
    sizes = {name: getattr(SIZES, name) for name in ("heads", "kv_heads", "head_dim")}
    mesh = context.mesh if context else None
    return Cache(specs, tokens=tokens, max_len=260, sequences=3, block_k=32, mesh=mesh, **sizes)


def answers(
    context: Context, specs: list[AttentionSpec], how: Sampling, size: int, select_from: int | None = None
) -> tuple[list[Generated], list[bytes]]:
    cache, heard = cache_of(context, specs), [b""] * len(PROMPTS)

    def told(prompt: int, text: bytes) -> None:
        heard[prompt] += text

    found = generate(decoder(select_from=select_from), cache, PROMPTS, how, slice_tokens=size, told=told)
    assert not cache.tables.references.any() and not cache.tables.sequences
    return found, heard


@pytest.mark.parametrize("how", [Sampling(40), Sampling(40, 0.8, 0.9, seed=5)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", SPECS)
def test_the_text_is_the_same_on_any_number_of_ranks(name: str, how: Sampling, ranks: RankPool) -> None:
    results = [
        result for n, size in ((1, 1000), (2, 33), (4, 64)) for result in ranks(n, answers, SPECS[name], how, size)
    ]
    found, heard = results[0]
    assert all(result == (found, heard) for result in results)
    assert [(len(one.text), one.tokens, one.ended) for one in found] == [(40, 40, "length")] * 3
    assert heard == [one.text for one in found]
    assert len({one.text for one in found}) == (2 if how.temperature == 0 else 3)  # two prompts are equal


@pytest.mark.parametrize("select_from", [None, 0])
@pytest.mark.parametrize("name", SPECS)
def test_each_token_is_what_reading_everything_again_gives(name: str, select_from: int | None, ranks: RankPool) -> None:
    if select_from is not None and SPECS[name][0].select is None:
        pytest.skip("nothing is selected")
    ((found, _),) = ranks(1, answers, SPECS[name], Sampling(30), 50, select_from)
    model = decoder(select_from=select_from)
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 8, "block_q": 32, "block_k": 32}
    for prompt, answer in zip(PROMPTS, found, strict=True):
        text = prompt + answer.text
        plans = [make_plan(spec, len(text), **sizes) for spec in SPECS[name]]
        with torch.no_grad():
            scores = model.logits(model(torch.frombuffer(bytearray(text), dtype=torch.uint8).unsqueeze(0), plans))[0]
        assert scores[len(prompt) - 1 : -1].argmax(-1).tolist() == list(answer.text)


def test_a_text_ends_before_its_stop_bytes() -> None:
    cache, heard = cache_of(None, SPECS["window and dense"]), []
    whole = generate(decoder(), cache, PROMPTS[:1], Sampling(40))[0].text
    stop = whole[20:23]
    assert whole.index(stop) == 20
    found = generate(
        decoder(), cache, PROMPTS[:1], Sampling(40, stop=stop), told=lambda prompt, text: heard.append(text)
    )
    assert found == [Generated(whole[:20], 23, "stop", 0, 0)]
    assert b"".join(heard) == whole[:20]


def test_drawing_follows_the_probabilities() -> None:
    scores = np.log(np.asarray([0.1, 0.4, 0.2, 0.3]))
    numbers = (np.arange(1000) + 0.5) / 1000

    def counts(how: Sampling) -> list[int]:
        return np.bincount([choose_token(scores, how, n) for n in numbers], minlength=4).tolist()

    assert counts(Sampling(1, temperature=1.0)) == [100, 400, 200, 300]
    assert counts(Sampling(1, temperature=1.0, top_p=0.65)) == [0, 571, 0, 429]
    assert counts(Sampling(1, temperature=1.0, top_p=1e-9)) == [0, 1000, 0, 0]
    assert counts(Sampling(1)) == [0, 1000, 0, 0]
    assert counts(Sampling(1, temperature=0.5)) == [33, 533, 134, 300]
    assert choose_token(np.zeros(4), Sampling(1), 0.9) == 0


@pytest.mark.parametrize(
    ("prompts", "how", "why"),
    [
        ([], {}, "prompts is empty"),
        ([b"x", b""], {}, "prompt 2 is empty"),
        (
            [b"x" * 200],
            {"new_tokens": 61},
            "the prompt has 200 bytes and 61 new ones are asked for; expected at most 260",
        ),
        ([b"x"], {"new_tokens": 0}, "new_tokens is 0"),
        ([b"x"], {"temperature": -1.0}, "temperature is -1"),
        ([b"x"], {"top_p": 0.0}, "top_p is 0"),
    ],
)
def test_what_cannot_be_answered_is_refused(prompts: list[bytes], how: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        generate(decoder(), cache_of(None, SPECS["window and dense"]), prompts, Sampling(**how))
