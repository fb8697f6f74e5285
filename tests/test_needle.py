"""job=needle: what it counts, that the number of ranks changes nothing, and what it refuses."""

import csv
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commanding import config_of
from rank_pool import RankPool
from torch import Tensor

from distattn import presets, reference, tasks, weights
from distattn.attend import attend
from distattn.errors import DistattnError
from distattn.extras import AttentionExtras
from distattn.jobs import needle
from distattn.jobs.context import Context
from distattn.jobs.fidelity import Comparison
from distattn.jobs.settings import layer_specs, model_config
from distattn.model import Decoder
from distattn.patterns import Causal
from distattn.plan import Plan, make_plan

SMALL = ["model.width=16", "model.hidden=32", "model.head_dim=8", "layout.block_q=64", "layout.block_k=64"]
NEEDLE = ["experiment=needle", *SMALL, "attention.window=128", "attention.reach=[2]", "attention.top_k=3"]
SOURCE = np.frombuffer(b"import os\n\n\ndef name(x):\n    return x + 1\n" * 40, np.uint8)


def alone(folder: Path) -> Context:
    return Context(0, 1, 0, torch.device("cpu"), None, folder)


class Told:
    """Stands for a decoder: it foretells the text that it was given, but for some bytes."""

    def __init__(self, sample: tasks.Sample, wrong: tuple[int, ...] = ()) -> None:
        text = np.frombuffer(sample.prompt + sample.answer, np.uint8).copy()
        for place in wrong:
            text[len(sample.prompt) + place] ^= 1
        self.next = torch.from_numpy(np.append(text[1:], 0).astype(np.int64))

    def __call__(self, tokens: Tensor, plans: list[Plan], observe: object) -> Tensor:
        return self.next[plans[0].positions].unsqueeze(0)

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(hidden, 256).float()

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return torch.where(hidden == labels, 0.0, math.log(2))


@pytest.mark.parametrize("wrong", [(), (0,), (2, 4), (5,)])
def test_an_answer_is_right_if_all_of_it_is(wrong: tuple[int, ...], tmp_path: Path) -> None:
    sample = tasks.sample("niah_single", 1500, SOURCE, np.random.default_rng(0))
    plans = [make_plan(presets.dense(), 1500, heads=2, kv_heads=1, head_dim=8)]
    model: Any = Told(sample, wrong)
    found = needle.ask(model, plans, sample, alone(tmp_path))
    assert (found.right, found.size, found.bits) == (6 - len(wrong), 6, 0)
    # Greedy decoding: the same up to the first byte that is wrong, which it says as well.
    said = sample.answer[: wrong[0]] + bytes([sample.answer[wrong[0]] ^ 1]) if wrong else sample.answer
    assert found.said == said


def run_needle(context: Context, overrides: list[str], folder: str) -> dict[str, Any]:
    path = Path(folder)
    path.mkdir(exist_ok=True)
    context = Context(context.rank, context.world_size, context.local_rank, context.device, context.mesh, path)
    return needle.run(config_of(*NEEDLE, *overrides), context)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as they are drawn."""
    path = tmp_path_factory.mktemp("weights") / "drawn.safetensors"
    decoder = Decoder(model_config(config_of(*NEEDLE)))
    weights.export(path, decoder.config, dict(decoder.named_parameters()), {}, torch.float32)
    return path


def test_the_table_is_the_same_on_two_ranks(ranks: RankPool, untrained: Path, tmp_path: Path) -> None:
    overrides = [f"job.checkpoint={untrained}", "job.lengths=[1024,1500]", "job.depths=2", "job.fidelity_rows=4"]
    overrides += ["job.tasks=[niah_single,vt]", "job.attention=[trained,window,mistral]"]
    tables, layers = [], []
    for count in (1, 2):
        folder = tmp_path / str(count)
        report, *others = ranks(count, run_needle, overrides, str(folder))
        assert not any(others)
        rows = list(csv.DictReader((folder / "needle.csv").open()))
        assert len(rows) == 2 * 2 * 2 * 3 and {row["prompts"] for row in rows} == {"1"}
        tables.append([{k: v for k, v in row.items() if k not in ("seconds", "bits_per_byte")} for row in rows])
        bits = [float(row["bits_per_byte"]) for row in rows]
        assert bits == pytest.approx([8] * len(rows), abs=0.5)  # it knows nothing
        layers.append([one["error"] for one in report["fidelity"]] + [one["mass"] for one in report["fidelity"]])
        assert [one["layer"] for one in report["fidelity"]] == [2, 4] * 6
        assert (folder / "niah_single_trained.png").exists() and "right" in report["report"]
        # A window of 4,096 tokens is dense attention up to there.
        for one in report["fidelity"]:
            if one["attention"] == "mistral":
                assert one["error"] < 1e-5 and one["mass"] == pytest.approx(1)
            else:
                assert one["error"] > 1e-3 and 0 < one["mass"] < 1
        shares = {row["attention"]: float(row["pairs"]) for row in rows if row["length"] == "1500"}
        assert shares["mistral"] == 1 > shares["trained"] > shares["window"]
    assert tables[0] == tables[1]
    assert layers[0] == pytest.approx(layers[1], rel=1e-4, abs=1e-6)


def test_few_prompts_are_shown(untrained: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_bytes(SOURCE.tobytes() * 2)
    overrides = [
        "experiment=demo",
        *SMALL,
        "attention.window=128",
        "attention.reach=[2]",
        f"job.checkpoint={untrained}",
    ]
    overrides += ["data=path", f"data.path={text}", "data.held_out=null", "seq_len=6000"]
    seen = []
    for seed in (0, 1):
        config = config_of(*overrides, f"seed={seed}")
        needle.check(config)
        found = needle.run(config, alone(tmp_path))
        (depth,) = needle.depths_of(config, 6000)
        assert [(row["attention"], row["depth"]) for row in found["rows"]] == [
            (name, pytest.approx(depth, abs=1e-4)) for name in ("trained", "window")
        ]
        lines = dict(line.split(maxsplit=1) for line in found["report"].split("\n\n")[0].splitlines()[:4])
        assert lines["read"] == f"5,994 bytes of a text of {2 * len(SOURCE):,}, which is repeated"
        code = re.fullmatch(r"# The access code for (\w+) is (\d{6})\.   \(byte [\d,]+\)", lines["planted"])
        assert code and lines["asked"] == f"# The access code for {code[1]} is "
        assert lines["trained"].endswith(f", wrong: '{code[2]}'")  # it has not learnt anything
        assert found["report"].split("\n\n")[1].splitlines()[3].startswith("window ")
        seen.append((depth, code[2]))
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


@pytest.mark.parametrize("per", ("tile", "token"))
def test_mass_is_that_of_the_keys_that_are_attended(per: str, tmp_path: Path) -> None:
    """Against the whole matrix of dense attention."""
    spec = presets.hierarchical(64, (16, 64), (2,), 3, "tile" if per == "tile" else "token")
    plan = make_plan(spec, 400, heads=4, kv_heads=2, head_dim=8, block_q=16, block_k=16)
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 400, n, 8, generator=random) for n in (4, 2, 2))
    out, selection = attend(q, k, v, plan, return_selection=True)
    watch = Comparison([plan], {0}, "spec", 9, 1, alone(tmp_path))
    watch.observe(0, q, k, v, out, AttentionExtras(), selection)
    scores = torch.einsum("qhd,khd->qhk", q[0].double(), k[0].double().repeat_interleave(2, 1)) * 8**-0.5
    rows = np.unique(np.random.default_rng(1).integers(200, 400, 9))
    dense, masses = reference.attention(q, k, v, Causal())[0][0], []
    for row in rows.tolist():
        weight = scores[row, :, : row + 1].softmax(-1)
        for head in range(4):
            chosen = selection.chunks[0, head // 2, row // (16 if per == "tile" else 1)].tolist()
            keys = {key for chunk in chosen if chunk >= 0 for key in range(16 * chunk, 16 * chunk + 16)}
            keys |= {key for key in range(row + 1) if spec.tokens.allows(np.array(row), np.array(key))}
            masses.append(float(weight[head, [key for key in sorted(keys) if key <= row]].sum()))
    (found,) = watch.found
    assert found.mass == pytest.approx(np.mean(masses), rel=1e-9) and 0.2 < found.mass < 0.9
    error = (out[0, rows].double() - dense[rows]).norm(dim=-1) / dense[rows].norm(dim=-1)
    assert found.error == pytest.approx(float(error.mean()), rel=1e-6)


def test_an_attention_replaces_that_of_the_far_layers_only() -> None:
    config = config_of("experiment=needle", "model.window=128")
    window, trained = presets.mistral(128), presets.hierarchical(256, (64, 1024), (16,), 16, "tile")
    for name, spec in {
        "trained": trained,
        "window": window,
        "dense": presets.dense(),
        "spattention": presets.spattention(4, 5000),  # of the model's heads, and of the length that is asked for
    }.items():
        specs = layer_specs(needle.with_attention(config, name, 5000))
        assert specs == [window, window, spec, window, spec]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["job.tasks=[nlah]"], "job.tasks has 'nlah'; expected of niah_single, "),
        (["job.attention=[nearby]"], "job.attention has 'nearby'; expected of trained, window, bigbird, "),
        (["job.attention=[bigbird]"], "job.attention has 'bigbird', which lets a token depend on what follows"),
        (["job.attention=[nsa]"], "has gates or pools that are learned"),
        (["job.lengths=[]"], "job.lengths is empty; expected at least one"),
        (["job.lengths=[4096,512]"], "job.lengths has 512; expected at least 1024"),
        (["job.depths=0"], "job.depths is 0; expected at least 1"),
        (["job.fidelity_rows=-1"], "job.fidelity_rows is -1; expected at least 0"),
        (["job.checkpoint=nowhere"], "job.checkpoint is 'nowhere', which does not exist"),
        (["model.width=32"], "in which model.width is 16; expected 32"),
    ],
)
def test_what_cannot_be_asked_gets_a_sentence(overrides: list[str], why: str, untrained: Path) -> None:
    with pytest.raises(DistattnError, match=why):
        needle.check(config_of(*NEEDLE, f"job.checkpoint={untrained}", *overrides))
    needle.check(config_of(*NEEDLE, f"job.checkpoint={untrained}"))
