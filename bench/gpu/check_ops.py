"""The small kernels against float64; where they only move or choose, against the exact answer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu.paged import error_of, ulp
from bench.gpu.setting import HALVES, Row, Rows, Setting, checked
from engine.kernels.argmax import argmax
from engine.kernels.move_kv import gather_kv, gather_kv_reference, scatter_kv
from engine.kernels.norm import add_rms_norm, rms_norm
from engine.kernels.rope_write import rope_write
from engine.kernels.swiglu import swiglu

_EPS = 1e-5


def norms(setting: Setting, half: str) -> Rows:
    for rows in setting.sizes.rows:
        for hidden in (setting.sizes.hidden, setting.sizes.hidden // 4 + 8):
            x, residual, weight = _randn(setting, half, (rows, hidden), (rows, hidden), (hidden,))
            wanted = _rms(x) * weight.double()
            yield _close(f"rms_norm {rows}x{hidden}", rms_norm(x, weight, _EPS), wanted)
            total = (x.float() + residual.float()).to(x.dtype)
            wanted = _rms(total) * weight.double()
            out = add_rms_norm(x, residual, weight, _EPS)
            yield _close(f"add_rms_norm {rows}x{hidden}", out, wanted)
            yield _same(f"add_rms_norm {rows}x{hidden}: the sum", residual, total)


def rope(setting: Setting, half: str, head_dim: int) -> Rows:
    """With and without qk-norm; every fifth row pads and must write nothing."""
    heads, kv_heads = setting.sizes.heads, setting.sizes.kv_heads
    for rows in setting.sizes.rows:
        for normed in (False, True):
            (qkv,) = _randn(setting, half, (rows, (heads + 2 * kv_heads) * head_dim))
            norms = _randn(setting, half, (head_dim,), (head_dim,)) if normed else None
            angle = torch.rand(
                (rows, head_dim // 2), generator=setting.random(3), device=setting.place
            )
            cos, sin = (100 * angle).cos(), (100 * angle).sin()
            slots = torch.randperm(rows + 7, generator=setting.random(4), device=setting.place)
            slots = slots[:rows].where(torch.arange(rows, device=setting.place) % 5 != 4, -1)
            pages = torch.full(
                (2, rows + 7, kv_heads, head_dim), 7.0, dtype=qkv.dtype, device=setting.place
            )
            q_norm, k_norm = norms or (None, None)
            q = rope_write(
                qkv, heads, kv_heads, q_norm, k_norm, _EPS, cos, sin, pages[0], pages[1], slots
            )
            wide = qkv.double().view(rows, -1, head_dim)
            parts = list(torch.split(wide, [heads, kv_heads, kv_heads], dim=1))
            if norms:
                parts[0], parts[1] = (
                    _rms(part) * norm.double() for part, norm in zip(parts, norms, strict=False)
                )
            what = f"rope_write {rows}x{heads}/{kv_heads}x{head_dim}{' qk-norm' if normed else ''}"
            yield _close(f"{what}: q", q, _rotated(parts[0], cos, sin), 2 if normed else 1)
            real = slots >= 0
            wanted = torch.full_like(pages, 7.0, dtype=torch.float64)
            wanted[0, slots[real]] = _rotated(parts[1], cos, sin)[real]
            wanted[1, slots[real]] = parts[2][real]
            yield _close(f"{what}: keys", pages[0], wanted[0], 2 if normed else 1)
            yield _same(f"{what}: values", pages[1], wanted[1].to(pages.dtype))


def activation(setting: Setting, half: str) -> Rows:
    for rows in setting.sizes.rows:
        for inner in (setting.sizes.inner, setting.sizes.inner // 3):
            (gate_up,) = _randn(setting, half, (rows, 2 * inner))
            gate, up = (3 * gate_up).double().chunk(2, dim=-1)
            out = swiglu(3 * gate_up)
            yield _close(f"swiglu {rows}x{inner}", out, functional.silu(gate) * up)


def greedy(setting: Setting) -> Rows:
    """bf16 logits of a large vocabulary tie all the time: the lowest index counts."""
    vocab = setting.sizes.vocab
    for rows in (1, 3, 17, 64, 256):
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and not setting.on_gpu:
                continue
            x = torch.randn((rows, vocab), generator=setting.random(rows), device=setting.place)
            x = (8 * x).round() / 8
            x = x.to(dtype)
            x[rows // 2, vocab // 3] = float("nan")
            if rows > 2:
                x[0, vocab - 1] = float("inf")
                x[1, 0] = x[1, vocab - 1] = 99.0
            top = x.float().nan_to_num().max(dim=-1, keepdim=True).values
            index = torch.arange(vocab, device=x.device)
            first = index.where(x.float() == top, vocab).min(dim=-1).values
            wanted = first.where(x.float().isfinite().all(dim=-1), -1)
            yield _same(f"argmax {rows}x{vocab} {dtype}"[:40], argmax(x), wanted)


def moving(setting: Setting) -> Rows:
    """Bits, whatever they mean: all layers of a chunk, some heads, a pinned buffer."""
    kv_heads, tokens = setting.sizes.kv_heads, max(setting.sizes.rows) // 2 + 1
    for dtype in (torch.float32, torch.bfloat16):
        shape = (4, 2, 3 * tokens, kv_heads, 128)
        pages = torch.randn(shape, generator=setting.random(), device=setting.place).to(dtype)
        slots = torch.randperm(3 * tokens, generator=setting.random(1), device=setting.place)
        slots = slots[:tokens]
        for heads in (None, range(1, kv_heads)):
            what = f"{dtype} {tokens} tokens, heads {'all' if heads is None else list(heads)}"
            wanted = gather_kv_reference(pages, slots, heads)
            yield _same(f"gather {what}", gather_kv(pages, slots, heads), wanted)
            if setting.on_gpu:
                pinned = torch.empty(wanted.shape, dtype=dtype, pin_memory=True)
                gather_kv(pages, slots, heads, out=pinned)
                torch.cuda.synchronize()
                yield _same(f"gather to pinned {what}", pinned, wanted.cpu())
            target = torch.full_like(pages, 7.0)
            scatter_kv(target, slots, wanted, heads)
            back = torch.full_like(pages, 7.0)
            chosen = slice(None) if heads is None else slice(heads.start, heads.stop)
            back[:, :, slots, chosen] = pages[:, :, slots, chosen]
            yield _same(f"scatter {what}", target, back)


def _randn(setting: Setting, half: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    random = setting.random(len(shapes))
    return [
        torch.randn(shape, generator=random, device=setting.place).to(HALVES[half])
        for shape in shapes
    ]


def _rms(x: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(dim=-1, keepdim=True) + _EPS).sqrt()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In float64, which the definition would leave."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _close(what: str, out: Tensor, wanted: Tensor, roundings: float = 1.0) -> Row:
    """`roundings`: how many steps of the dtype an entry may be off."""
    bound = roundings * ulp(out.dtype) if out.dtype != torch.float32 else 1e-5
    return checked(what, error_of(out, wanted), bound)


def _same(what: str, out: Tensor, wanted: Tensor) -> Row:
    """Entries that differ; none may. NaN where one is wanted is the same."""
    same = (out == wanted) | (out.isnan() & wanted.isnan())
    return checked(f"{what}: entries that differ", int((~same).sum()), 0)
