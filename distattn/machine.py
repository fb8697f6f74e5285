"""How fast a machine is: what scripts/calibrate.py measures, as a small JSON file.

Kernels are described by three numbers, since a launch takes as long as the tiles that it visits, plus something for
each row of tiles (reading its queries, writing its output) and for each visit that has a mask. What travels is
described by curves, since small messages are slow: seconds by bytes, between which one interpolates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distattn.errors import ConfigError

Floats = NDArray[np.float64]

KINDS = ("pattern", "biased", "chosen", "summaries")
WAYS = ("forward", "resume", "backward")
EXCHANGES = ("neighbours", "all_to_all", "all_gather")
DRAG = ("forward", "backward")
HOST = ("launch", "forward", "backward", "exchange")


@dataclass(frozen=True)
class KernelSpeed:
    """Of one kind of launch. A launch takes ``visits * visit + rows * row + masked * masked`` seconds.

    Attributes:
        kind: what the tiles are: "pattern" and "biased" (with a bias of keys) of tables that were planned, "chosen" and
            "summaries" (with a bias, and masks of one row) of tables that were made on the device.
        way: "forward", "resume" (forward, from a float32 output that is there), or "backward".
        itemsize, block_q, block_k, dim: what it was measured with; dim is head_dim + value_dim.
        visit: seconds of a visit of one query head's tile, on the whole device.
        row: seconds of a row of tiles of one query head.
        masked: seconds more of a visit with a mask.
        host: seconds that the host needs for a launch, 0 where the call waits for the result.
    """

    kind: str
    way: str
    itemsize: int
    block_q: int
    block_k: int
    dim: int
    visit: float
    row: float
    masked: float
    host: float

    def seconds(
        self, visits: Floats, rows: Floats, masked: Floats, blocks: tuple[int, int], dim: int, itemsize: int
    ) -> Floats:
        """Of launches with tiles of a size: numbers of operations are in proportion to what was measured.

        16-bit speeds stand for 32-bit ones, where these were not measured, in proportion to the bytes.
        """
        area = blocks[0] * blocks[1] * dim / (self.block_q * self.block_k * self.dim)
        line = blocks[0] * dim * itemsize / (self.block_q * self.dim * self.itemsize)
        wider = itemsize / self.itemsize
        return np.asarray((visits * self.visit + masked * self.masked) * area * wider + rows * self.row * line)


@dataclass(frozen=True)
class ChoiceSpeed:
    """Of choosing chunks, with the tables of what is then visited.

    per, score: as in ``TopChunks``. row: seconds of a row that chooses; column: seconds of one score.
    """

    per: str
    score: str
    row: float
    column: float


@dataclass(frozen=True)
class Curve:
    """Seconds of an exchange by the bytes that a rank sends to others, or receives if that is more.

    nbytes ascending, seconds of each. Interpolated between logarithms; beyond the ends it goes on with the last slope,
    and below the first it stays.
    """

    nbytes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __call__(self, nbytes: Floats) -> Floats:
        """0 where nothing travels."""
        size = np.maximum(np.asarray(nbytes, np.float64), 1.0)
        found = np.exp(np.interp(np.log(size), np.log(self.nbytes), np.log(self.seconds)))
        beyond = np.maximum(size - self.nbytes[-1], 0.0)
        if len(self.nbytes) > 1:
            rise = max(self.seconds[-1] - self.seconds[-2], 0.0) / (self.nbytes[-1] - self.nbytes[-2])
        else:
            rise = self.seconds[-1] / self.nbytes[-1]
        return np.where(np.asarray(nbytes) > 0, found + beyond * rise, 0.0)


@dataclass(frozen=True)
class Machine:
    """Measured speeds of one rank's device, and of what lies between ranks.

    Attributes:
        name: of the machine.
        conditions: (what, which) of the measurement: GPU, versions, commit, date.
        kernels, choices: see there.
        matmul: FLOP/s of a large product of matrices, for orientation.
        copy: bytes a second that are read and written, of a plain copy on the device.
        pack: the same of packing rows for a journey, or unpacking them.
        host: seconds of the host: "launch" of a small kernel, "forward" and "backward" of a call beside its
            launches of tile kernels, "exchange" of one transfer.
        exchanges: by kind of transfer, see ``messages.Transfer``.
        drag: "forward" and "backward", how many seconds such a kernel loses for each second of an exchange that
            runs beside it: 0 where they do not disturb each other, 1 where they might as well run one after the other.
        ranks: between which exchanges were measured.
        gpus_per_node: ranks that are as near to each other as these.
        between_nodes: bytes a second and rank between nodes; between_latency: seconds of an exchange at least.
        assumed: (field, where the number is from) of what was not measured under the conditions.
    """

    name: str
    conditions: tuple[tuple[str, str], ...]
    kernels: tuple[KernelSpeed, ...]
    choices: tuple[ChoiceSpeed, ...]
    matmul: float
    copy: float
    pack: float
    host: Mapping[str, float]
    exchanges: Mapping[str, Curve]
    drag: Mapping[str, float]
    ranks: int
    gpus_per_node: int
    between_nodes: float
    between_latency: float
    assumed: tuple[tuple[str, str], ...] = field(default=())

    @staticmethod
    def load(name: str | Path) -> Machine:
        """A machine of a name that comes with the library, or of a file.

        Raises:
            ConfigError: there is none, or the file is not one that :meth:`save` wrote.
        """
        folder = resources.files("distattn") / "machines"
        known = sorted(x.name.removesuffix(".json") for x in folder.iterdir() if x.name.endswith(".json"))
        if str(name) in known:
            return _packaged(str(name))
        path = Path(name).expanduser()
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"machine is {str(name)!r}; expected a file that scripts/calibrate.py wrote, or one of "
                f"{', '.join(known)}: {error}"
            ) from error
        return _read(text, str(path))

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(_plain(asdict(self)), indent=1) + "\n")

    def kernel(self, kind: str, way: str, itemsize: int, blocks: tuple[int, int]) -> KernelSpeed:
        """What was measured of a kind and way, or else of the nearest: by itemsize, then by sizes of tiles."""

        def distance(speed: KernelSpeed) -> tuple[float, ...]:
            sizes = math.log(speed.block_q / blocks[0]), math.log(speed.block_k / blocks[1])
            ways = abs(WAYS.index(speed.way) - WAYS.index(way))
            # A backward pass is unlike both ways forward.
            ways += 2 * ((speed.way == "backward") != (way == "backward"))
            return ways, speed.kind != kind, speed.itemsize != itemsize, sum(map(abs, sizes))

        return min(self.kernels, key=distance)

    def choice(self, per: str, score: str) -> ChoiceSpeed:
        """What was measured of it, or of the nearest."""
        return min(self.choices, key=lambda x: (x.per != per, x.score != score))

    def travels(self, kind: str, nbytes: Floats, world_size: int, abroad: float = 1.0) -> Floats:
        """Seconds of an exchange of so many bytes a rank.

        abroad: share of the bytes that goes between nodes, where there are several.
        """
        near = self.exchanges[kind](nbytes)
        if world_size <= self.gpus_per_node:
            return near
        far = np.where(np.asarray(nbytes) > 0, self.between_latency + nbytes * abroad / self.between_nodes, 0.0)
        return np.maximum(near, far)

    def with_nodes(self, gpus_per_node: int) -> Machine:
        """The same with other nodes."""
        return replace(self, gpus_per_node=gpus_per_node)


@cache
def _packaged(name: str) -> Machine:
    path = resources.files("distattn") / "machines" / f"{name}.json"
    return _read(path.read_text(), f"machine {name}")


def _plain(value: Any) -> Any:
    """What JSON can say; numbers to five digits."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _read(text: str, where: str) -> Machine:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where} is not JSON: {error}; expected a file that scripts/calibrate.py wrote") from error
    values = _fields(Machine, values, where)
    numbers = ("matmul", "copy", "pack", "ranks", "gpus_per_node", "between_nodes")
    for name in numbers:
        _number(values[name], f"{name} of {where}", above=0.0)
    _number(values["between_latency"], f"between_latency of {where}")
    values["kernels"] = tuple(
        _row(KernelSpeed, x, f"kernels of {where}", ("itemsize", "block_q", "block_k", "dim"))
        for x in _list(values["kernels"], f"kernels of {where}")
    )
    values["choices"] = tuple(
        _row(ChoiceSpeed, x, f"choices of {where}", ()) for x in _list(values["choices"], f"choices of {where}")
    )
    for speed in values["kernels"]:
        if speed.kind not in KINDS or speed.way not in WAYS:
            raise ConfigError(f"kernels of {where} has {speed.kind!r}, {speed.way!r}; expected {KINDS}, {WAYS}")
    for name, keys in (("host", HOST), ("exchanges", EXCHANGES), ("drag", DRAG)):
        if not isinstance(values[name], dict) or sorted(values[name]) != sorted(keys):
            raise ConfigError(f"{name} of {where} is {values[name]!r}; expected {', '.join(keys)}")
    for name in ("host", "drag"):
        for key, x in values[name].items():
            _number(x, f"{name}.{key} of {where}")
    values["exchanges"] = {key: _curve(x, f"exchanges.{key} of {where}") for key, x in values["exchanges"].items()}
    for name in ("conditions", "assumed"):
        values[name] = tuple((str(a), str(b)) for a, b in values[name])
    return Machine(**values)


def _fields(kind: type, values: Any, where: str) -> dict[str, Any]:
    names = [x.name for x in fields(kind)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        found = ", ".join(values) if isinstance(values, dict) else repr(values)
        raise ConfigError(f"{where} has {found}; expected {', '.join(names)}")
    return dict(values)


def _list(values: Any, where: str) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{where} is {values!r}; expected a list")
    return values


def _row(kind: type, values: Any, where: str, sizes: tuple[str, ...]) -> Any:
    values = _fields(kind, values, where)
    for name, x in values.items():
        if not isinstance(x, str):
            _number(x, f"{name} in {where}", above=0.0 if name in sizes else None)
    return kind(**values)


def _curve(values: Any, where: str) -> Curve:
    values = _fields(Curve, values, where)
    nbytes, seconds = (tuple(_list(values[name], where)) for name in ("nbytes", "seconds"))
    for x in (*nbytes, *seconds):
        _number(x, where, above=0.0)
    if len(nbytes) != len(seconds) or list(nbytes) != sorted(set(nbytes)):
        raise ConfigError(f"{where} has {len(nbytes)} sizes, {len(seconds)} times; expected as many, ascending sizes")
    return Curve(nbytes, seconds)


def _number(x: Any, what: str, above: float | None = None) -> None:
    good = isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
    if not good or x < 0 or (above is not None and x <= above):
        raise ConfigError(f"{what} is {x!r}; expected a number {'of at least 0' if above is None else 'above 0'}")
