#!/usr/bin/env python3
"""Compiles the kernels in Triton for GPUs that this machine does not have, and prints what the assembler made of them.

    python scripts/compile_kernels.py [sm_80 sm_90 ...]

A launch on the CPU is recorded with its arguments instead of being run; what was recorded is then compiled.
Columns: registers a thread, bytes spilled a thread, shared memory of a program in KiB, seconds that it took.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

from distattn.axis import Axis
from distattn.kernels import (
    attention,
    chosen_pages_triton,
    chunk_places_triton,
    chunks_triton,
    decode_triton,
    items_triton,
    page_bounds_triton,
    rows_triton,
    summary_pages_triton,
)
from distattn.kernels.attention import Biases, Choice, Pages
from distattn.kernels.chosen_pages import Where
from distattn.kernels.chunks import Choosers, Choosing, Ladder, Rung
from distattn.kernels.decode import Source
from distattn.kernels.rows import Places
from distattn.kernels.selected import SelectedTable
from distattn.patterns import Causal, GlobalTokens, SlidingWindow
from distattn.tiles import Extents, assemble, visit

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
    torch.int8: "i8",
}  # fmt: skip
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launch(NamedTuple):
    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def record(engine: str, dtype: torch.dtype, block_q: int, block_k: int, head_dim: int, value_dim: int) -> list[Launch]:
    """The launches of a forward and a backward pass of 8 query heads and 2 key heads.

    Portable kernels have a key bias, and are followed by what is done to rows.
    """
    found: list[Launch] = []

    def run(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if all((launch.kernel, launch.options) != (kernel, options) for launch in found):
            found.append(Launch(kernel, arguments, options))

    tokens, heads, kv_heads = 64 * max(block_q, block_k), 8, 2
    queries, keys = Axis.grid(tokens, block_q), Axis.grid(tokens, block_k)
    visits = visit(Causal() & (SlidingWindow(4 * block_k, 0) | GlobalTokens(range(4))), queries, keys)
    parts = [[(visits, Extents.of(torch.arange(keys.blocks).numpy(), 0))]]
    table = assemble(parts, [0] * heads, queries.blocks, (block_q, block_k), keys.blocks, 0)
    q, grad = (torch.zeros(1, tokens, heads, n, dtype=dtype) for n in (head_dim, value_dim))
    own = Pages(*(torch.zeros(1, tokens, kv_heads, n, dtype=dtype) for n in (head_dim, value_dim)))
    lse = torch.zeros(1, tokens, heads)
    nobody = Pages(own.k[:, :0], own.v[:, :0])
    before = JITFunction.run, attention.choose
    JITFunction.run, attention.choose = run, lambda *_, **__: Choice(engine, "it is asked for")
    try:
        bias = d_bias = None
        if engine == "triton":
            bias, d_bias = (Biases(own.k[..., 0].float(), nobody.k[..., 0].float()) for _ in range(2))
        for earlier in (None, grad.float()):
            attention.attention_forward(q, own, nobody, table, grad, lse, scale=0.1, before=earlier, bias=bias)
        gradients = [Pages(x.k.float(), x.v.float()) for x in (own, nobody)]
        attention.attention_backward(
            q, own, nobody, table, grad, lse, lse, q.float(), *gradients, scale=0.1, bias=bias, d_bias=d_bias
        )
        if engine == "hopper":  # whole pages, or short ones with masks and a bias
            masked = dtype == torch.bfloat16
            page = 32 if masked else 64
            chosen = torch.zeros(1, tokens // 64, 5, dtype=torch.int32)
            masks = torch.zeros(1, tokens // 64, 5, 1, 1, dtype=torch.int32) if masked else None
            some = SelectedTable(64, page, tokens // 64, tokens // page, 0, (0,) * heads, chosen, masks)
            bias = Biases(own.k[..., 0].float(), nobody.k[..., 0].float()) if masked else None
            attention.attention_forward(q, own, nobody, some, grad, lse, scale=0.1, before=grad.float(), bias=bias)
        if engine == "triton":
            rows_triton.add_rows(own.k, Places(np.array([[1, 9], [20, 40]]), (1,)), own.k[:, :28, :1])
            some = torch.tensor([0, 1])
            rows_triton.add_chunks(own, some, some, rows_triton.take_chunks(own, some, some, 64))
            rows_triton.copy_tiles(grad.float(), grad, torch.zeros(1, queries.blocks) > 0, (0,) * heads, block_q)
            rows_triton.merge(q.float(), lse, q.float(), lse)
            means, counts = rows_triton.chunk_means(own.k, 64, torch.zeros(tokens, dtype=torch.bool))
            rows_triton.chunk_means_backward(means, counts, tokens, 64, None, dtype)
            rows_triton.gate_backward(grad, [grad, grad], lse[..., None].repeat(1, 1, 1, 2))
            record_items()
            record_choice(q)
            record_decoding(q, own)
    finally:
        JITFunction.run, attention.choose = before
    return found


def record_items() -> None:
    """Of tables whose tiles visit 16 whole pages, 20 with masks, or a hundred; and how tables of chunks are made."""
    for n, masked in ((16, False), (20, True), (100, True)):
        selected = torch.zeros(2, 256, n, dtype=torch.int32)
        masks = torch.zeros(2, 256, n, 1, 1, dtype=torch.int32) if masked else None
        items_triton.query_work(SelectedTable(64, 32, 256, 1024, 0, (0, 1), selected, masks))
    chosen = torch.zeros(1, 2, 256, 16, dtype=torch.int32)
    chunk_places_triton.pages_of_chunks(chosen, torch.zeros(1, 1024, dtype=torch.int64))
    for position in (None, torch.arange(256)):
        chunk_places_triton.masks_of_chunks(chosen, torch.zeros(1024, 2, dtype=torch.int32), 64, position)


def record_choice(q: torch.Tensor) -> None:
    """Each token chooses of a thousand chunks, by products and by the mass of summaries, and visits two levels beside
    these."""
    chunks, share = 1024, q.shape[2] // 2
    own, allowed = torch.arange(q.shape[1], dtype=torch.int32) // 64, torch.ones(chunks, dtype=torch.bool)
    keys = q[:, :1, :2].repeat(1, chunks * 4, 1, 1)
    choosers = Choosers(q, torch.arange(q.shape[1]).numpy(), own, own)
    products = Choosing(chunks, 16, 1, True, ("first", "own", "previous"), False, 1, 1, 1, 64)
    chunks_triton.choose_chunks(products, choosers, keys[:, :chunks], None, allowed, 0.1, False)
    one = Choosers(q[:, :1], choosers.number[:1], own[:1], own[:1])
    together = products._replace(share=share)
    chunks_triton.choose_chunks(together, one, keys[:, :chunks], None, allowed, 0.1, True)
    choosers = choosers._replace(until=own * 4)
    masses = Choosing(chunks, 16, 1, True, ("first", "own"), True, 4, 2, share, 64)
    chosen = chunks_triton.choose_chunks(masses, choosers, keys, None, allowed, 0.1, False)
    rungs = [Rung(64, 1024, 0, 4, 4, 16), Rung(1024, 64, 1024, 4, 0, 1)]
    exists = torch.zeros(34, 1, dtype=torch.int32)
    summary_pages_triton.summary_pages(chosen, own, exists, Ladder(rungs, True, 64, 32, 34, 20))


def record_decoding(q: torch.Tensor, own: Pages) -> None:
    """One query: it is stored, chooses pages by their bounds, and attends to these, and to others of which one is
    PARTIAL."""
    slots, kv_heads = own.k.shape[1:3]
    pages = slots // 128
    last = torch.tensor([slots - 1])
    visits = visit(SlidingWindow(slots - 2, 0), Axis(slots, 1, last.numpy()), Axis.grid(slots, 128))
    parts = [[(visits, Extents.of(np.arange(pages), 0))]]
    table = assemble(parts, [0] * q.shape[2], 1, (1, 128), pages, 0)
    q, k, v = q[0, :1], own.k[0], own.v[0]
    rows_triton.store_rows((k, v), last, (k[:1], v[:1]))
    high, low = k[::128].clone(), k[::128].clone()
    page_bounds_triton.update_bounds(high, low, 5, k[:1], 128)
    by = Choosing(pages, 5, 1, True, ("own",), False, 1, 1, 1, 128)
    number, selectable = torch.tensor([pages - 1], dtype=torch.int32), torch.ones(pages, dtype=torch.bool)
    chosen = page_bounds_triton.choose_pages(by, q, high, low, number, selectable)
    first = torch.tensor([0, pages])
    where = Where(torch.arange(pages), first, torch.zeros(pages, 4, dtype=torch.int32), 1, 128)
    some, masks = chosen_pages_triton.chosen_pages(chosen, first[:1], last, where)
    head_table = tuple(head * kv_heads // q.shape[1] for head in range(q.shape[1]))
    selected = SelectedTable(1, 128, 1, pages, 0, head_table, some, masks)
    out, lse = torch.zeros(1, q.shape[1], v.shape[2], dtype=q.dtype), torch.zeros(1, q.shape[1])
    sources = [Source(k, v, table), Source(k, v, selected, k[..., 0].float()), Source(k, v, selected)]
    decode_triton.decode(q, sources, out, lse, 0.1)


def compile_launch(launch: Launch, capability: int) -> Any:
    """As Triton would specialize it: pointers and numbers that 16 divides, ones as constants."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[index] if index < len(launch.arguments) else launch.options[name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}],{value.layout!r}>"
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if special and isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    made = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = made(launch.kernel, signature, constants, attributes)
    options = {name: launch.options[name] for name in ("num_warps", "num_stages") if name in launch.options}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=["sm_90"], help="default: sm_90")
    for architecture in parser.parse_args().architectures:
        for engine, dtype, *sizes in (
            ("hopper", torch.bfloat16, 128, 128, 128, 128),
            ("hopper", torch.float16, 128, 128, 64, 64),
            ("triton", torch.bfloat16, 128, 128, 128, 128),
            ("triton", torch.bfloat16, 16, 64, 64, 64),
            ("triton", torch.float32, 64, 64, 80, 96),
        ):
            if engine == "hopper" and architecture != "sm_90":
                continue
            for launch in record(engine, dtype, *sizes):
                began = time.monotonic()
                kernel = compile_launch(launch, int(architecture.removeprefix("sm_")))
                took = time.monotonic() - began
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(kernel.asm["cubin"])
                    file.flush()
                    command = [CUOBJDUMP, "-res-usage", file.name]
                    usage = subprocess.run(command, capture_output=True, text=True, check=True)
                registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()  # type: ignore[union-attr]
                what = f"{architecture} {engine} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, sizes))}"
                print(
                    f"{what:41} {launch.kernel.fn.__name__:14} registers {registers:>3} spilled {stack:>4} "
                    f"shared {kernel.metadata.shared / 1024:5.0f} KiB {took:5.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(main())
