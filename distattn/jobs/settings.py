"""From a configuration to what jobs need; what is impossible becomes one sentence for the user."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

from distattn import presets
from distattn.conf.schema import Config, TrainConfig
from distattn.errors import ConfigError
from distattn.heads import refusal
from distattn.model import ModelConfig
from distattn.spec import AttentionSpec


def attention_spec(config: Config) -> AttentionSpec:
    """The spec that `config.attention` describes: its `name` is a preset, everything else a parameter of it.

    Raises:
        ConfigError: there is no such preset or parameter, or the preset refuses a value.
    """
    parameters = dict(config.attention)
    name = parameters.pop("name", None)
    preset = presets.PRESETS.get(name)
    if preset is None:
        raise ConfigError(f"attention.name is {name!r}; expected one of {', '.join(presets.PRESETS)}")
    try:
        inspect.signature(preset).bind(**parameters)
    except TypeError as error:
        raise ConfigError(f"attention does not fit the preset {name!r}: {error}") from error
    try:
        return preset(**parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"attention={name}: {error}") from error


def layer_specs(config: Config) -> list[AttentionSpec]:
    """Who attends to whom, a layer each: `attention`, but for the dense and the window layers of the model.

    Raises:
        ConfigError: as `attention_spec`.
    """
    model, spec = config.model, attention_spec(config)
    others = dict.fromkeys(model.dense_layers, presets.dense())
    others |= dict.fromkeys(model.window_layers, presets.mistral(model.window))
    return [others.get(layer, spec) for layer in range(model.layers)]


def check(config: Config) -> None:
    """Check what all jobs have in common.

    Raises:
        ConfigError: a value cannot work, alone or with the others.
    """
    for name, value in {
        "seq_len": config.seq_len,
        "layout.block_q": config.layout.block_q,
        "layout.block_k": config.layout.block_k,
        "layout.head_ranks": config.layout.head_ranks,
        "launcher.timeout": config.launcher.timeout,
        **{f"model.{name}": getattr(config.model, name) for name in ("layers", "width", "heads", "kv_heads")},
        **{f"model.{name}": getattr(config.model, name) for name in ("head_dim", "hidden", "slice_rows")},
    }.items():
        if value <= 0:
            raise ConfigError(f"{name} is {value}; expected more than 0")
    restarts = getattr(config.launcher, "max_restarts", 0)
    if restarts < 0:
        raise ConfigError(f"launcher.max_restarts is {restarts}; expected at least 0")
    model = config.model
    if model.heads % model.kv_heads:
        raise ConfigError(f"model.heads is {model.heads}; expected a multiple of model.kv_heads, {model.kv_heads}")
    for name in ("dense_layers", "window_layers", "unrotated_layers"):
        for layer in getattr(model, name):
            if not 0 <= layer < model.layers:
                raise ConfigError(f"model.{name} has {layer}; expected a layer from 0 to {model.layers - 1}")
    if both := {*model.dense_layers} & {*model.window_layers}:
        raise ConfigError(f"model.dense_layers and model.window_layers both have {min(both)}; expected one of them")
    if model.window < 1:
        raise ConfigError(f"model.window is {model.window}; expected at least 1")
    path = config.data.path
    if path is not None and not Path(path).expanduser().exists():
        raise ConfigError(f"data.path is {path!r}, which does not exist; expected a file or a folder")
    if why := refusal(attention_spec(config), model.heads, model.kv_heads, config.layout.head_ranks):
        raise ConfigError(f"layout.head_ranks is {config.layout.head_ranks}; {why}")


def check_ranks(config: Config, world_size: int) -> None:
    """Check that the sequence is long enough for the ranks, and that groups of them that exchange heads are whole.

    Raises:
        ConfigError: it is not, or there would be no rank.
    """
    if world_size < 1:
        raise ConfigError(f"cluster.world_size is {world_size}; expected at least 1")
    data_ranks = config.job.data_ranks if isinstance(config.job, TrainConfig) else 1
    if world_size % data_ranks:
        raise ConfigError(f"job.data_ranks is {data_ranks}; expected a divisor of the number of ranks, {world_size}")
    world_size //= data_ranks
    if world_size % config.layout.head_ranks:
        raise ConfigError(
            f"layout.head_ranks is {config.layout.head_ranks}; expected a divisor of the number of ranks, {world_size}"
        )
    tiles = -(-config.seq_len // config.layout.block_q)
    if world_size > tiles:
        raise ConfigError(
            f"{world_size} ranks are too many for seq_len={config.seq_len}, which has {tiles} tiles of "
            f"{config.layout.block_q} tokens; expected at least one tile a rank"
        )


def check_decoder(config: Config) -> None:
    """Check that the decoder has all parameters that the attention needs.

    Raises:
        ConfigError: the attention has some of its own.
    """
    spec = attention_spec(config)
    learned = any(level.pool != "mean" or level.bias != "count" for level in spec.summaries)
    if learned or spec.merge == "gate":
        raise ConfigError(
            f"attention={config.attention['name']} has gates or pools that are learned; expected one without for "
            f"job={config.job.name}, whose decoder has no such parameters (distattn.nn.Attention has them)"
        )


def plan_options(config: Config) -> dict[str, Any]:
    """The arguments of `make_plan` that do not depend on the rank."""
    return {
        "seq_len": config.seq_len,
        "heads": config.model.heads,
        "kv_heads": config.model.kv_heads,
        "head_dim": config.model.head_dim,
        "layout": config.layout.name,
        "schedule": config.layout.schedule,
        "block_q": config.layout.block_q,
        "block_k": config.layout.block_k,
    }


def model_config(config: Config) -> ModelConfig:
    """The sizes of the decoder."""
    values = {f.name: getattr(config.model, f.name) for f in fields(ModelConfig) if hasattr(config.model, f.name)}
    return ModelConfig(**values)
