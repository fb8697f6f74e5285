"""What a job knows about the rank it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from distattn.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh


class Reporter(Protocol):
    """Where progress and lines of text go; the launcher provides one."""

    def progress(self, stage: str, done: float, total: float, info: dict[str, object]) -> None: ...

    def log(self, text: str) -> None: ...


class Silent:
    """A reporter that drops everything."""

    def progress(self, stage: str, done: float, total: float, info: dict[str, object]) -> None:
        pass

    def log(self, text: str) -> None:
        pass


@dataclass(frozen=True)
class Context:
    """One rank's place among the others.

    Attributes:
        rank, world_size: of this process among all processes of the job.
        local_rank: of this process among those on its machine.
        device: where its tensors live; on GPUs already the current device.
        mesh: 1-D device mesh over all ranks, or None if world_size is 1 (there is no process group then).
        output_dir: absolute path of a folder that exists; the same path on every rank.
        reporter: use the two methods instead.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh | None
    output_dir: Path
    reporter: Reporter = field(default_factory=Silent, repr=False)

    def mesh_for(self, head_ranks: int, data_ranks: int = 1) -> DeviceMesh | None:
        """The mesh of attention in one of `data_ranks` groups of ranks, of which so many in a row exchange heads.

        All ranks ask for it together. None: this rank is a group of its own.

        Raises:
            ConfigError: they do not divide the ranks.
        """
        if self.world_size % (head_ranks * data_ranks):
            groups = f" in each of {data_ranks} groups" if data_ranks > 1 else ""
            raise ConfigError(
                f"head_ranks is {head_ranks}{groups}; expected a divisor of the number of ranks, {self.world_size}"
            )
        if head_ranks == data_ranks == 1:
            return self.mesh
        if self.world_size == data_ranks:
            return None
        key = head_ranks, data_ranks
        if key not in self._meshes:
            from torch.distributed.device_mesh import init_device_mesh

            shape = (data_ranks, self.world_size // (data_ranks * head_ranks), head_ranks)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "sequence", "heads"))
            self._meshes[key] = mesh["sequence"] if head_ranks == 1 else mesh["sequence", "heads"]
        return self._meshes[key]

    @cached_property
    def _meshes(self) -> dict[tuple[int, int], DeviceMesh]:
        return {}

    def progress(self, stage: str, done: float, total: float, **info: object) -> None:
        """Tell how far this rank is: cheap enough for every step, since most calls within 0.1 s are dropped.

        Args:
            stage: what is being done; a new text begins a new stage.
            done, total: of this stage, in any unit.
            info: short values that are shown beside the bar, such as tokens_per_s=12345.
        """
        self.reporter.progress(stage, done, total, info)

    def log(self, text: str) -> None:
        """Print a line, with the rank in front of it."""
        self.reporter.log(text)
