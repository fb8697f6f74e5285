"""Launching kernels again with other tensors, without what an ordinary call of Triton's costs.

Such a call looks at each of some forty arguments to find out which compiled kernel they are for, and descriptors of
tensors are checked when they are made: hundreds of microseconds of a CPU's time. But from one call of attention over a
table to the next, only addresses differ. So the launches of a first call, which are ordinary ones, are recorded with
their compiled kernels, and are replayed with the addresses of other tensors.

It is exact. What Triton compiles a kernel for (dtypes, constants, which numbers are 1, what 16 divides) depends on
numbers that the host makes of shapes and strides, and on tensors; a recording is kept under a key that holds all
:func:`kinds` of tensors and all other numbers that its launches are made from. It belongs to the one table, unless it
is given what was made of the table as well, and the key holds what launches take of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor


def kinds(tensors: Sequence[Tensor]) -> Hashable:
    """All that launches depend on of tensors on one device: all but which multiples of 16 bytes they begin at."""
    each = [(x.dtype, x.shape, x.stride(), x.data_ptr() % 16) for x in tensors]
    return tensors[0].get_device(), *each


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of a CPU, which only tries kernels out, 2."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


class Part(NamedTuple):
    """An argument that differs from call to call.

    number: of the tensor, among those that a call is given and the temporary ones. offset: from its address, in bytes.
    now: the argument in the call that is recorded, a tensor or a descriptor of one.
    """

    number: int
    offset: int
    now: Any


class Given(NamedTuple):
    """A tensor [batch, ...] that each call is given; ``tensor`` is that of the call that is recorded."""

    number: int
    tensor: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return self.tensor.stride()

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def at(self, b: int, describe: Callable[[Tensor], Any] | None = None) -> Part:
        """Sequence b of the batch, as a pointer, or as a descriptor."""
        now = self.tensor[b]
        offset = b * self.strides[0] * self.tensor.element_size()
        return Part(self.number, offset, now if describe is None else describe(now))


def strides_of(*given: Given) -> list[int]:
    """Of the rows and the heads of each."""
    return [n for x in given for n in x.strides[1:3]]


class Recording:
    """Launches one after the other: those of the call that is recorded, and then, :meth:`replay`, those of others.

    given: the tensors of the call that is recorded. again: whether others may follow; else it only launches. also: more
    tensors of the call, which launches take as they are: of these, nothing but where they begin may matter.
    """

    def __init__(self, given: Sequence[Tensor], again: bool = True, also: Sequence[Tensor] = ()) -> None:
        self.given = [Given(number, x) for number, x in enumerate(given)]
        self._also = [Part(len(given) + number, 0, x) for number, x in enumerate(also)]
        self._count = len(given) + len(also)
        self._temporary: list[tuple[int, ...]] = []
        self._launches: list[_Launch] | None = [] if again else None

    @property
    def parts(self) -> list[Part]:
        """The tensors that the call is given, as arguments of launches."""
        return [Part(x.number, 0, x.tensor) for x in self.given]

    def temporary(self, *shape: int) -> Part | Tensor:
        """A float32 tensor that each call makes anew; one without elements serves all calls."""
        made = self.given[0].tensor.new_empty(shape, dtype=torch.float32)
        if not prod(shape):
            return made
        self._temporary.append(shape)
        return Part(self._count + len(self._temporary) - 1, 0, made)

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launches ``kernel[grid](*arguments, **constants)``.

        arguments: a Part, or what is the same in each call; a tensor among these is kept. constants: all other
        parameters of the kernel, and options of Triton's.
        """
        arguments = tuple(next((part for part in self._also if part.now is x), x) for x in arguments)
        compiled = kernel[grid](*(x.now if isinstance(x, Part) else x for x in arguments), **constants)
        if self._launches is not None and hasattr(compiled, "packed_metadata"):
            self._launches.append(_Launch.of(compiled, grid, [*arguments], kernel.arg_names, constants))
        else:  # not compiled, but interpreted, or only recorded by someone else
            self._launches = None

    def ends(self, given: Sequence[Tensor]) -> bool:
        """Forgets the tensors of the call that is recorded. Returns whether it can be replayed with tensors like
        ``given``: what was launched were compiled kernels, and with these tensors and not with copies.
        """
        same = all(x is y.tensor for x, y in zip(given, self.given, strict=True))
        self.given, self._also = [], []
        return same and self._launches is not None

    def replay(self, given: Sequence[Tensor]) -> None:
        """The same launches with tensors of the same kinds: those that are given, and then the others."""
        assert self._launches is not None
        temporary = [given[0].new_empty(shape, dtype=torch.float32) for shape in self._temporary]
        addresses = [x.data_ptr() for x in (*given, *temporary)]
        for launch in self._launches:
            launch.run(*launch.values_at(addresses))


class Bound(NamedTuple):
    """A recording, and the ``also`` of the calls for which it is replayed."""

    recording: Recording
    also: tuple[Tensor, ...]

    def replay(self, given: Sequence[Tensor]) -> None:
        """The same launches with tensors of the same kinds."""
        self.recording.replay((*given, *self.also))


class Launches:
    """Recordings of what one function launches, for calls that belong to no table: by all that they were made from."""

    def __init__(self, most: int = 128) -> None:
        self._most = most
        self._kept: dict[Hashable, Recording] = {}

    def run(
        self,
        given: Sequence[Tensor],
        numbers: Hashable,
        record: Callable[[Recording], None],
        also: tuple[Tensor, ...] = (),
    ) -> Bound | None:
        """Launches with the tensors ``given`` what ``record`` does, which depends on their kinds and on ``numbers``.

        also: see :class:`Recording`; which of them are one tensor, ``numbers`` must tell, too.

        Returns:
            what can be replayed with other tensors; None if it cannot.
        """
        key = numbers, kinds(given), tuple((x.dtype, x.data_ptr() % 16) for x in also)
        if recorded := self._kept.get(key):
            recorded.replay((*given, *also))
            return Bound(recorded, also)
        recording = Recording(given, also=also)
        record(recording)
        if not recording.ends(given):
            return None
        for old in [*self._kept][: max(len(self._kept) - self._most + 1, 0)]:
            self._kept.pop(old, None)
        self._kept[key] = recording
        return Bound(recording, also)


class _Launch(NamedTuple):
    """run: launches the compiled kernel with all values, in the order of its parameters. kept: what values point to."""

    run: Callable[..., None]
    values: list[Any]
    pointers: list[tuple[int, int, int]]
    descriptors: list[tuple[int, int, int, Callable[[int], Any]]]
    kept: list[Tensor]

    @staticmethod
    def of(
        compiled: Any, grid: tuple[int, ...], arguments: list[Any], names: list[str], constants: dict[str, Any]
    ) -> _Launch:
        run = compiled[(*grid, 1, 1)[:3]]
        values = arguments + [constants[name] for name in names[len(arguments) :]]
        made = _Launch(run, values, [], [], [x for x in arguments if isinstance(x, Tensor)])
        for place, x in enumerate(arguments):
            if isinstance(x, Tensor):
                values[place] = x.data_ptr()
            elif isinstance(x, Part):
                values[place] = None
                if isinstance(x.now, Tensor):
                    made.pointers.append((place, x.number, x.offset))
                else:
                    # Tensors often come to lie where others lay before.
                    at = lru_cache(maxsize=64)(partial(_at, _at(x.now, 0)))
                    made.descriptors.append((place, x.number, x.offset, at))
        return made

    def values_at(self, addresses: list[int]) -> list[Any]:
        values = self.values.copy()  # several threads may replay a recording
        for place, number, offset in self.pointers:
            values[place] = addresses[number] + offset
        for place, number, offset, descriptor_at in self.descriptors:
            values[place] = descriptor_at(addresses[number] + offset)
        return values


class _Address(int):
    """Stands for a tensor in a descriptor."""

    def data_ptr(self) -> int:
        return self


def _at(descriptor: Any, address: int) -> Any:
    """The descriptor for a tensor elsewhere, which it need not check again, and does not keep."""
    moved = object.__new__(type(descriptor))
    moved.__dict__.update(descriptor.__dict__)
    moved.base = _Address(address)
    return moved
