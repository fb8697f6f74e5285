"""Recorded launches: what is replayed is what an ordinary call with the same tensors would have launched."""

import gc
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from kernel_cases import DEVICE, Case, inputs, split, table_of
from torch import Tensor

from distattn import reference
from distattn.kernels.attention import Choice, Pages, attention_backward, attention_forward, row_deltas
from distattn.kernels.launching import Launches, Recording, kinds
from distattn.patterns import Causal, GlobalTokens, SlidingWindow


class Descriptor:
    """As those of Triton: of a tensor, and what is told of it."""

    def __init__(self, base: Tensor) -> None:
        self.base, self.shape = base, [*base.shape]


class Compiled(NamedTuple):
    log: list[Any]
    packed_metadata: None = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self.log.append((grid, [*map(seen, values)]))


class Kernel:
    """Logs its launches; compiled, it logs those of the compiled kernel."""

    arg_names = ("x", "rows", "length", "fixed", "nothing", "made", "stride", "HEADS", "num_warps")

    def __init__(self, compiles: bool = True) -> None:
        self.log: list[Any] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            values = [*arguments, *(constants[name] for name in self.arg_names[len(arguments) :])]
            self.log.append(((*grid, 1, 1)[:3], [*map(seen, values)]))
            return Compiled(self.log) if self.compiles else None

        return launch


def seen(value: Any) -> Any:
    """What a kernel sees of an argument."""
    if isinstance(value, Descriptor):
        return value.base.data_ptr(), value.shape
    return value.data_ptr() if isinstance(value, Tensor) else value


def launch(kernel: Kernel, given: list[Tensor], fixed: Tensor) -> Recording:
    recording = Recording(given)
    x, y = recording.given
    nothing, made = recording.temporary(0, 5), recording.temporary(3, 5)
    for b in range(2):
        recording.launch(
            kernel, (4, b), x.at(b), y.at(b, Descriptor), x.shape[1], fixed, nothing, made, x.strides[1],
            num_warps=4, other_option=True, HEADS=2,
        )  # fmt: skip
    return recording


def test_replays_are_ordinary_launches() -> None:
    fixed = torch.ones(3)
    first, second = ([torch.zeros(2, 7, 12)[:, :, :8], torch.zeros(2, 5, dtype=torch.bfloat16)] for _ in range(2))
    assert kinds(first) == kinds(second)
    kernel, ordinary = Kernel(), Kernel()
    recording = launch(kernel, first, fixed)
    assert recording.ends(first)
    kernel.log.clear()
    recording.replay(second)
    launch(ordinary, second, fixed)
    for (grid, values), (expected_grid, expected) in zip(kernel.log, ordinary.log, strict=True):
        made, expected[5] = values[5], values[5]  # made anew
        assert (grid, values) == (expected_grid, expected)
        assert made and made not in values[:5]


def test_nothing_is_kept_of_the_first_call() -> None:
    first = [torch.zeros(2, 7, 8), torch.zeros(2, 5)]
    recording = launch(Kernel(), first, torch.ones(3))
    assert recording.ends(first)
    kept = weakref.ref(first[1])
    del first
    gc.collect()
    assert kept() is None


def test_what_cannot_be_replayed() -> None:
    given = [torch.zeros(2, 7, 8), torch.zeros(2, 5)]
    assert not launch(Kernel(compiles=False), given, torch.ones(3)).ends(given)
    assert not launch(Kernel(), [x.clone() for x in given], torch.ones(3)).ends(given)


def test_launches_are_recorded_by_kinds_and_numbers_and_the_oldest_forgotten() -> None:
    kernel, fixed, launches, recorded = Kernel(), torch.ones(3), Launches(most=2), []

    def run(number: int, *given: Tensor) -> None:
        def record(recording: Recording) -> None:
            recorded.append(number)
            made = recording.temporary(2)
            recording.launch(kernel, (number,), *recording.parts, number, fixed, fixed, made, 1, HEADS=2, num_warps=4)

        launches.run(given, number, record)

    x, y = torch.zeros(4, 7), torch.zeros(4, 7)
    for number, given in ((1, (x, y)), (2, (x, y)), (1, (y, x)), (1, (x, x)), (3, (x, y)), (2, (x, y)), (1, (x, y))):
        run(number, *given)
        grid, values = kernel.log[-1]
        assert grid == (number, 1, 1) and values[:3] == [x.data_ptr() for x in given] + [number]
    assert recorded == [1, 2, 3, 1] and len(kernel.log) == 7


def test_what_was_made_of_another_table_is_given_as_well() -> None:
    kernel, launches, recorded = Kernel(), Launches(), []

    def record(recording: Recording, made: tuple[Tensor, ...]) -> None:
        recorded.append(made)
        x, temporary = recording.parts[0], recording.temporary(2)
        recording.launch(kernel, (1,), x, made[0], made[1], made[0], temporary, 5, 1, HEADS=2, num_warps=4)

    x, bound = torch.zeros(4, 7), []
    tables = [(torch.zeros(n, dtype=torch.int32), torch.zeros(n + 1)) for n in (3, 9, 5)]
    for made in (*tables, (STORAGE[1:4].int(), STORAGE[1:4])):  # the last one begins elsewhere
        bound.append(launches.run((x,), "numbers", lambda recording, made=made: record(recording, made), made))
        _, values = kernel.log[-1]
        assert values[:4] == [y.data_ptr() for y in (x, made[0], made[1], made[0])]
    assert [*map(len, recorded[0])] == [3, 4] and len(recorded) == 2
    other = torch.zeros(4, 7)
    assert bound[0] is not None
    bound[0].replay((other,))
    _, values = kernel.log[-1]
    assert values[:4] == [y.data_ptr() for y in (other, tables[0][0], tables[0][1], tables[0][0])]
    assert values[4] not in values[:4]


STORAGE = torch.zeros(8192)
MADE = {
    "dtype": STORAGE.bfloat16()[:4096].view(2, 64, 4, 8),
    "shape": STORAGE[:2048].view(2, 32, 4, 8),
    "strides": STORAGE[:8192].view(2, 64, 8, 8)[:, :, :4],
    "a token's heads apart": STORAGE[:4160].as_strided((2, 64, 4, 8), (2080, 33, 8, 1)),
    "an odd address": STORAGE[1:4097].view(2, 64, 4, 8),
    "an address that 8 divides": STORAGE[2:4098].view(2, 64, 4, 8),
}


@pytest.mark.parametrize("name", MADE)
def test_kinds_tell_apart(name: str) -> None:
    usual = STORAGE[:4096].view(2, 64, 4, 8)
    assert kinds([usual, usual]) == kinds([STORAGE[64:4160].view(2, 64, 4, 8), usual])  # by a multiple of 16 bytes
    assert len({kinds([usual, usual]), kinds([usual, MADE[name]]), kinds([MADE[name], usual])}) == 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "dim", "block"), [(torch.bfloat16, 128, 128), (torch.float16, 64, 128), (torch.float32, 64, 64)]
)
def test_one_table_serves_tensors_of_all_kinds(dtype: torch.dtype, dim: int, block: int) -> None:
    """Each kind is recorded once, and replayed with other values elsewhere."""
    pattern = Causal() & (SlidingWindow(300, 0) | GlobalTokens(range(3)))
    case = Case(pattern, 777, block, block, 4, 2, dim, dim, dtype, 2, 0.09)
    table, kept = table_of(case), []
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for number, (shift, apart) in enumerate([(0, 1), (1, 1), (0, 2)] * 2):
        q, k, v, grad = (_moved(x.roll(number, 1), shift, apart) for x in inputs(case)[:4])
        own, guests = (
            Pages(*(_moved(x, shift, apart) for x in pair)) for pair in zip(split(case, k), split(case, v), strict=True)
        )
        kept += [q, *own, *guests, grad]  # so that the next ones lie elsewhere
        out, lse = torch.zeros_like(grad), torch.full(q.shape[:3], -torch.inf, device=DEVICE)
        attention_forward(q, own, guests, table, out, lse, scale=case.scale)
        wide = [x.double() for x in (q, *own, *guests)]
        pages = Pages(*wide[1:3]), Pages(*wide[3:])
        expected, expected_lse = grad.double(), lse.double()
        attention_forward(wide[0], *pages, table, expected, expected_lse, scale=case.scale)
        assert reference.max_error(out, expected) < tolerance
        assert reference.max_error(lse, expected_lse) < tolerance
        delta = row_deltas(expected, grad.double(), torch.zeros_like(expected_lse))
        found, wanted = (
            [torch.zeros(x.shape, dtype=to, device=DEVICE) for x in wide] for to in (lse.dtype, delta.dtype)
        )
        for rows, sums in (
            ((q, own, guests, table, grad, lse, delta.float()), found),
            ((wide[0], *pages, table, grad.double(), expected_lse, delta), wanted),
        ):
            attention_backward(*rows, sums[0], Pages(*sums[1:3]), Pages(*sums[3:]), scale=case.scale)
        for x, y in zip(found, wanted, strict=True):
            assert reference.max_error(x, y) < tolerance
    assert len(table.recordings) == 6  # three kinds, forward and backward; those in float64 are not launched


def _moved(x: Tensor, shift: int, apart: int) -> Tensor:
    """x, tokens before heads, ``shift`` elements behind where allocations begin; rows ``apart`` times as far apart."""
    batch, tokens, heads, dim = x.shape
    room = x.new_zeros(batch * tokens * heads * dim * apart + shift)
    row = heads * dim * apart
    moved = room[shift:].as_strided(x.shape, (tokens * row, row, dim, 1), shift)
    return moved.copy_(x)


def test_ordinary_launches_of_the_interpreter_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if DEVICE == "cuda":
        pytest.skip("kernels are compiled here")
    monkeypatch.setattr("distattn.kernels.attention.choose", lambda *_, **__: Choice("triton", "a test of it"))
    case = Case(Causal(), 20)
    table, (q, k, v, grad, _) = table_of(case), inputs(case)
    own, guests = (Pages(*pair) for pair in zip(split(case, k), split(case, v), strict=True))
    attention_forward(q, own, guests, table, torch.zeros_like(grad), torch.zeros(q.shape[:3]), scale=case.scale)
    assert not table.recordings
