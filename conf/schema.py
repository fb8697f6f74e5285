"""What may be set, with its type: Hydra checks every YAML file and every override against these dataclasses.

The YAML files beside this one give the values and explain them with their units; `distattn --cfg job` prints
what a command line makes of them. A field without a default here has its value in a YAML file. Jobs read a
`Config`, never Hydra's own objects.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf


@dataclass
class JobConfig:
    """What to run. `name` is a module in `distattn.jobs`, or `module:function` for a user's own job."""

    name: str = MISSING


@dataclass
class PrefillConfig(JobConfig):
    """conf/job/prefill.yaml."""

    sample_rows: int = MISSING
    picture: bool = MISSING
    trace: bool = MISSING


@dataclass
class TrainConfig(JobConfig):
    """conf/job/train.yaml."""

    steps: int = MISSING
    until: int | None = MISSING
    learning_rate: float = MISSING
    warmup: int = MISSING
    weight_decay: float = MISSING
    clip: float | None = MISSING
    batch: int = MISSING
    accumulate: int = MISSING
    data_ranks: int = MISSING
    documents: bool = MISSING
    curriculum: str = MISSING
    choice_weight: float = MISSING
    compile: bool = MISSING
    validate_every: int | None = MISSING
    validate_windows: int = MISSING
    log_every: int = MISSING
    tensorboard: bool = MISSING
    save_every: int = MISSING
    resume: str | None = MISSING
    export: str | None = MISSING


@dataclass
class GenerateConfig(JobConfig):
    """conf/job/generate.yaml."""

    prompt: str | None = MISSING
    samples: int = MISSING
    new_tokens: int = MISSING
    temperature: float = MISSING
    top_p: float = MISSING
    stop: str | None = MISSING
    slice_tokens: int = MISSING
    retrieve: int | None = MISSING
    keep_sinks: int | None = MISSING
    keep_heaviest: int | None = MISSING
    keep_window: int | None = MISSING
    checkpoint: str | None = MISSING


@dataclass
class NeedleConfig(JobConfig):
    """conf/job/needle.yaml."""

    checkpoint: str | None = MISSING
    tasks: list[str] = MISSING
    lengths: list[int] = MISSING
    depths: int | None = MISSING
    samples: int = MISSING
    attention: list[str] = MISSING
    fidelity_rows: int = MISSING
    picture: bool = MISSING


@dataclass
class VerifyConfig(JobConfig):
    """conf/job/verify.yaml."""

    tolerance_float32: float = MISSING
    tolerance_bfloat16: float = MISSING


@dataclass
class PlanConfig(JobConfig):
    """conf/job/plan.yaml."""

    picture: bool = MISSING
    machine: str = MISSING
    world_sizes: list[int] = field(default_factory=list)


@dataclass
class CustomJobConfig(JobConfig):
    """conf/job/custom.yaml."""

    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class LayoutConfig:
    """conf/layout/*.yaml."""

    name: str = MISSING
    schedule: str = "auto"
    block_q: int = 128
    block_k: int = 128
    head_ranks: int = 1


@dataclass
class ModelConfig:
    """conf/model/*.yaml; the fields and what they mean are those of `distattn.model.ModelConfig`."""

    layers: int = MISSING
    width: int = MISSING
    heads: int = MISSING
    kv_heads: int = MISSING
    head_dim: int = MISSING
    hidden: int = MISSING
    rope_theta: float = MISSING
    dtype: str = MISSING
    slice_rows: int = MISSING
    dense_layers: list[int] = field(default_factory=list)
    window_layers: list[int] = field(default_factory=list)
    window: int = MISSING
    select_from: int | None = None
    unrotated_layers: list[int] = field(default_factory=list)
    grow_from: int | None = None


@dataclass
class DataConfig:
    """conf/data/*.yaml."""

    path: str | None = MISSING
    suffix: str | None = MISSING
    offset: int = MISSING
    held_out: float | None = None


@dataclass
class LauncherConfig:
    """How ranks come to life."""

    name: str = MISSING
    device: str = MISSING
    timeout: float = MISSING


@dataclass
class LocalConfig(LauncherConfig):
    """conf/launcher/local.yaml."""

    num_workers: int | None = MISSING
    max_restarts: int = MISSING
    start_timeout: float = MISSING
    stop_timeout: float = MISSING


@dataclass
class TorchrunConfig(LauncherConfig):
    """conf/launcher/torchrun.yaml."""


@dataclass
class RayConfig(LauncherConfig):
    """conf/launcher/ray.yaml."""

    num_workers: int | None = MISSING
    address: str | None = MISSING
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    runtime_env: dict[str, Any] = field(default_factory=dict)
    max_restarts: int = MISSING
    place_timeout: float = MISSING
    start_timeout: float = MISSING
    stop_timeout: float = MISSING


@dataclass
class ClusterConfig:
    """The machines of a plan on paper."""

    world_size: int | None = None
    gpus_per_node: int | None = None


@dataclass
class Config:
    """Everything that a job is told; conf/config.yaml."""

    job: JobConfig = MISSING
    attention: dict[str, Any] = MISSING
    layout: LayoutConfig = MISSING
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    launcher: LauncherConfig = MISSING
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    seq_len: int = MISSING
    seed: int = MISSING
    output_dir: str = MISSING


def equal_parts(length: int, part: int) -> list[int]:
    """Lengths of the parts of `part` that `length` divides into; the last may be shorter."""
    whole, rest = divmod(length, max(1, part))
    return [part] * whole + [rest] * (rest > 0)


def register() -> None:
    """Make known to Hydra what the YAML files refer to: `schema/...`, `equal_parts`. May be called twice."""
    OmegaConf.register_new_resolver("equal_parts", equal_parts, replace=True)
    store = ConfigStore.instance()
    for name, node in {
        "config": Config,
        "prefill": PrefillConfig,
        "train": TrainConfig,
        "generate": GenerateConfig,
        "needle": NeedleConfig,
        "verify": VerifyConfig,
        "plan": PlanConfig,
        "custom": CustomJobConfig,
        "local": LocalConfig,
        "torchrun": TorchrunConfig,
        "ray": RayConfig,
    }.items():
        store.store(group="schema", name=name, node=node)
