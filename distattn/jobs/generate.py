"""job=generate: a decoder goes on with a text, whose keys and values stay in a cache that is sharded over ranks."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distattn import checkpoint, weights
from distattn.cache import RETRIEVED, Cache, plan_levels
from distattn.cached_levels import Sizes
from distattn.conf.schema import Config, GenerateConfig
from distattn.data import open_corpus
from distattn.errors import ConfigError
from distattn.generate import Sampling, check_prompts, generate
from distattn.jobs.context import Context
from distattn.jobs.machine import device_name, peak_bytes, synchronize
from distattn.jobs.settings import check_decoder, layer_specs, model_config
from distattn.model import DTYPES, SHAPES, Decoder
from distattn.policies import HeaviestPages, Policy, SinksAndWindow
from distattn.retrieval import Quest

CPU_RANKS = 1


def check(config: Config) -> None:
    """Finds a prompt that cannot be answered, and attention that a cache cannot serve, before any process starts."""
    job = _job(config)
    how = sampling(config)
    if job.samples < 1:
        raise ConfigError(f"job.samples is {job.samples}; expected at least 1")
    if config.layout.head_ranks != 1:
        raise ConfigError(f"layout.head_ranks is {config.layout.head_ranks}; expected 1, since a cache has all heads")
    check_prompts([prompt_of(config)], how, config.seq_len, job.slice_tokens)
    kept(config), retrieved(config)
    check_weights(config, job.checkpoint)
    check_attention(config)


def check_attention(config: Config) -> None:
    """Raises ConfigError if the decoder, or a cache, cannot serve the attention."""
    check_decoder(config)
    plan_levels(layer_specs(config), _sizes(config, config.seq_len, 1, torch.device("cpu")))


def run(config: Config, context: Context) -> dict[str, Any]:
    """Reads the prompt, writes the answers, and reports."""
    job, prompt, how = _job(config), prompt_of(config), sampling(config)
    model = load_decoder(config, context, job.checkpoint)
    more = {"retrieve": retrieved(config), "keep": kept(config)}
    cache = make_cache(config, context, len(prompt) + how.new_tokens, job.samples, **more)
    files = [context.output_dir / f"answer{number}.txt" for number in range(job.samples)]
    if context.rank == 0:
        context.output_dir.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.write_bytes(b"")
    times: list[float] = []
    total = how.new_tokens * job.samples

    def told(number: int, text: bytes) -> None:
        """As it comes, for whoever reads along."""
        if not times:
            synchronize(context)
        times.append(time.perf_counter())
        context.progress("generate", len(times), total)
        if context.rank == 0:
            with files[number].open("ab") as file:
                file.write(text)

    began = time.perf_counter()
    context.progress("read", 0, 1, bytes=len(prompt))
    found = generate(model, cache, [prompt] * job.samples, how, slice_tokens=job.slice_tokens, told=told)
    synchronize(context)
    end = time.perf_counter()
    peaks = checkpoint.gather(None if context.mesh is None else context.mesh.get_group(), peak_bytes(context))
    if context.rank:
        return {}
    first, made = (times or [end])[0], sum(one.tokens for one in found)
    report = {
        "prompt_bytes": len(prompt),
        "world_size": context.world_size,
        "device": device_name(context),
        "dtype": config.model.dtype,
        "attention": list(dict.fromkeys(spec.text for spec in cache.specs)),
        "new_tokens": made,
        "ended": [one.ended for one in found],
        "read_seconds": first - began,
        "read_tokens_per_second": len(prompt) / (first - began),
        "tokens_per_second": (made - job.samples) / (end - first) if made > job.samples else None,
        "released": [one.released for one in found],
        "lost": [one.lost for one in found],
        "peak_bytes": peaks,
    }
    (context.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return {"report": _text(report, [one.text for one in found], context.output_dir), **report}


def prompt_of(config: Config) -> bytes:
    """The text to go on with.

    Raises:
        ConfigError: there is none, it is longer than seq_len, or it is no text.
    """
    job = _job(config)
    if job.prompt is not None:
        return job.prompt.encode()
    if config.data.path is None:
        raise ConfigError("job.prompt is null and data.path is null, too; expected a text, or a file to go on with")
    corpus = open_corpus(config.data.path, config.data.suffix)
    size = len(corpus) - config.data.offset
    if not 0 < size <= config.seq_len:
        raise ConfigError(
            f"data.path is {config.data.path!r}, of which there are {size:,} bytes from data.offset on; expected 1 to "
            f"{config.seq_len:,} (seq_len)"
        )
    prompt = corpus.read(config.data.offset, len(corpus)).tobytes()
    try:
        text = prompt.decode()
    except UnicodeDecodeError as error:
        where = f"byte {prompt[error.start]:#04x} at {config.data.offset + error.start:,}"
        raise ConfigError(f"data.path is {config.data.path!r}, which is not text: {where}; expected UTF-8") from None
    if (at := text.find("\0")) >= 0:
        raise ConfigError(
            f"data.path is {config.data.path!r}, which is not text: it has a zero after {at:,} characters"
        )
    return prompt


def sampling(config: Config) -> Sampling:
    """Raises ConfigError for a number that cannot be."""
    job = _job(config)
    return Sampling(job.new_tokens, job.temperature, job.top_p, config.seed, (job.stop or "").encode())


def kept(config: Config) -> Policy | None:
    """Raises ConfigError if numbers do not go together, or one cannot be."""
    job = _job(config)
    named = {"keep_sinks": job.keep_sinks, "keep_heaviest": job.keep_heaviest}
    given = [name for name, value in named.items() if value is not None]
    if len(given) != (job.keep_window is not None):
        found = ", ".join(f"job.{name} is {value}" for name, value in {**named, "keep_window": job.keep_window}.items())
        raise ConfigError(f"{found}; expected null for all, or keep_window and one of the others")
    if job.keep_window is None:
        return None
    if job.keep_sinks is not None:
        return SinksAndWindow(job.keep_sinks, job.keep_window)
    if job.retrieve is not None or not all(spec.is_static for spec in layer_specs(config)):
        found = f"job.keep_heaviest is {job.keep_heaviest}"
        raise ConfigError(f"{found}; expected null, or attention without summaries and choices, and job.retrieve=null")
    return HeaviestPages(int(job.keep_heaviest or 0), job.keep_window)


def retrieved(config: Config) -> Quest | None:
    """Raises ConfigError for a number that cannot be, or if there is no layer that could."""
    pages = _job(config).retrieve
    if pages is not None and RETRIEVED not in layer_specs(config):
        raise ConfigError(f"job.retrieve is {pages}; expected null, or attention=dense or model.dense_layers with it")
    return None if pages is None else Quest(pages)


def make_cache(config: Config, context: Context, max_len: int, sequences: int, **more: Any) -> Cache:
    """Room for so many sequences of this length, and of each a block more on every rank. more: for the cache."""
    sizes, block = _sizes(config, max_len, sequences, context.device), config.layout.block_k
    return Cache(
        layer_specs(config),
        tokens=sequences * (max_len + block * (context.world_size + 1)),
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        max_len=max_len,
        sequences=sequences,
        block_k=block,
        dtype=sizes.dtype,
        device=context.device,
        mesh=context.mesh,
        **more,
    )


def check_weights(config: Config, path: str | None) -> None:
    """Finds weights that are missing or of a decoder of other sizes before any process starts; null: none.

    Raises:
        ConfigError: they are.
        CheckpointError: they cannot be read.
    """
    if path is None:
        return
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"job.checkpoint is {path!r}, which does not exist; expected a folder or a file of weights")
    trained = _trained(place)
    for name in SHAPES:
        if trained.get(name) != getattr(config.model, name):
            raise ConfigError(
                f"job.checkpoint is {path}, in which model.{name} is {trained.get(name)}; expected "
                f"{getattr(config.model, name)}"
            )


def _trained(place: Path) -> dict[str, Any]:
    """Fields of the ModelConfig that a checkpoint's folder, or a file of weights, was trained with."""
    if place.is_dir():
        settings = checkpoint.inspect(place).settings
        return {name.removeprefix("model."): value for name, value in settings.items() if name.startswith("model.")}
    return vars(weights.load(place).decoder.config)


def load_decoder(config: Config, context: Context, path: str | None) -> Decoder:
    """The decoder, with the parameters of a checkpoint's folder or of a file of weights; null: as they are drawn.

    Where it computes otherwise than in training, such as with another model.rope_theta, that is told.

    Raises:
        ConfigError: these are of a decoder of other sizes.
        CheckpointError: they cannot be read.
    """
    sizes = model_config(config)
    decoder = Decoder(sizes, config.seed).to(context.device)
    if path is None:
        return decoder
    group = None if context.mesh is None else context.mesh.get_group()
    checkpoint.on_first(group, lambda: check_weights(config, path))
    place = Path(path).expanduser()
    if context.rank == 0:
        trained = _trained(place)
        for name in ("rope_theta", "unrotated_layers", "grow_from", "select_from"):
            was, now = (list(x) if isinstance(x, tuple) else x for x in (trained.get(name), getattr(sizes, name)))
            if was != now:
                context.log(f"{path} was trained with model.{name}={was}, and this is {now}")
    if place.is_file():
        decoder.load_state_dict(weights.load(place).decoder.state_dict())
        return decoder
    saved = checkpoint.on_first(group, lambda: checkpoint.inspect(place))
    # Training keeps float32 where the arithmetic is bfloat16.
    kept = replace(sizes, dtype="float32") if sizes.dtype == "bfloat16" else sizes
    model = Decoder(kept, config.seed).to(context.device)
    state = {"model": {name: p.detach() for name, p in model.named_parameters()}}
    checkpoint.load(saved, state, group=group)
    decoder.load_state_dict(model.state_dict())
    return decoder


def _job(config: Config) -> GenerateConfig:
    assert isinstance(config.job, GenerateConfig)
    return config.job


def _sizes(config: Config, max_len: int, sequences: int, device: torch.device) -> Sizes:
    model = config.model
    heads = model.heads, model.kv_heads, model.head_dim, model.head_dim
    return Sizes(*heads, max_len, sequences, config.layout.block_k, DTYPES[model.dtype], device)


def _text(r: dict[str, Any], answers: list[bytes], folder: Path) -> str:
    """The report for a terminal: what is no text is escaped."""
    speed = "" if r["tokens_per_second"] is None else f", then {r['tokens_per_second']:,.1f} tokens/s"
    lines = [
        ("prompt", f"{r['prompt_bytes']:,} bytes on {r['world_size']} ranks ({r['device']}, {r['dtype']})"),
        ("attention", "; ".join(r["attention"])),
        ("speed", f"read at {r['read_tokens_per_second']:,.0f} tokens/s in {r['read_seconds']:.1f} s{speed}"),
        ("let go", f"{max(r['released']):,} positions of a text that no later token attends to"),
        *(
            [("lost", f"{max(r['lost']):,} positions of a text that later tokens would attend to")]
            if any(r["lost"])
            else []
        ),
        ("peak memory", ", ".join(f"rank {i}: {x / 2**30:.2f} GiB" for i, x in enumerate(r["peak_bytes"]))),
        ("report", f"{folder / 'report.json'}; answers beside it as they come"),
    ]
    said = [f"{name:<18}{value}" for name, value in lines]
    for number, (answer, ended) in enumerate(zip(answers, r["ended"], strict=True)):
        text = answer.decode(errors="backslashreplace")
        shown = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
        said += ["", f"answer {number}, {len(answer):,} bytes (ended by {ended}):", shown]
    return "\n".join(said)
