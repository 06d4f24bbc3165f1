"""Checks of what a decode step does besides linears."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from mmr5_bench.kernels_bench.step_ops import Sizes
from mmr5_bench.proof.case import Case, Finding, Scale, near, same, worst
from mmr5_kernels import attention_reference
from mmr5_kernels.attention_reference import Arena, quantize_kv, table_of
from mmr5_kernels.greedy_reference import greedy_tokens
from mmr5_runtime.capacity import KVFormat

KV_FORMATS: tuple[KVFormat, ...] = ("bf16", "int8")
_LAYERS, _LAYER, _ROOM = 2, 1, 16
# Against fp32 sums of the same keys: probabilities and the output are rounded to bf16.
_ATTENTION = 6e-3


def step_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Rotation and appending, attention over the arena, the greedy choice."""
    for kv in KV_FORMATS:
        for tokens in scale.tokens:
            for length in scale.lengths:
                about = f"T={tokens} S={length} {kv}"
                check = partial(_append, scale, kv, tokens, length, device)
                yield Case(("rope_append",), f"rope_append {about}", check)
                check = partial(_attention, scale, kv, tokens, length, device)
                yield Case(("decode_attention",), f"decode_attention {about}", check)
            check = partial(_company, scale, kv, tokens, device)
            name = f"decode_attention T={tokens} {kv}: rows do not depend on their company"
            yield Case(("decode_attention",), name, check)
    for rows in (1, 3, 8):
        check = partial(_greedy, scale, rows, device)
        yield Case(("greedy",), f"greedy, {rows} rows", check)


def _append(scale: Scale, kv: KVFormat, tokens: int, length: int, device: torch.device) -> Finding:
    from mmr5_kernels.ops.rope_append import rope_append

    heads, kv_heads, dim = scale.heads
    ours, plain = _arenas(scale, kv, [length, None, length // 2], device, copies=2)
    rows = 3 * tokens
    qkv = _draw((rows, (heads + 2 * kv_heads) * dim), device)
    angles = torch.rand(length + 2 * tokens + 1, dim // 2).to(device)
    tables = (angles.cos().bfloat16(), angles.sin().bfloat16())
    positions = torch.arange(rows, device=device) % len(angles)
    common = (qkv, positions, *tables)
    table = table_of(ours).to(device)
    sizes = Sizes(tokens, heads, kv_heads)
    found = rope_append(*common, table, _LAYER, kv=kv, **sizes._asdict())
    wanted = attention_reference.rope_append(*common, plain, _LAYER, **sizes._asdict())
    pairs = zip(ours, plain, strict=True)
    written = [same(_all(a), _all(b)) for a, b in pairs if a is not None and b is not None]
    return worst(same(found, wanted), *written)


def _attention(
    scale: Scale, kv: KVFormat, tokens: int, length: int, device: torch.device
) -> Finding:
    heads, _, dim = scale.heads
    lengths: list[int | None] = [length, None, length // 2]
    (arenas,) = _arenas(scale, kv, lengths, device, copies=1, room=tokens)
    q = _draw((len(arenas) * tokens, heads, dim), device)
    found = _attend(scale, kv, q, arenas, tokens, length + tokens, device)
    again = _attend(scale, kv, q, arenas, tokens, length + tokens, device)
    wanted = attention_reference.decode_attention(
        q, arenas, _LAYER, tokens=tokens, num_kv_heads=scale.heads[1]
    )
    return worst(near(found, wanted, _ATTENTION), same(found, again))


def _company(scale: Scale, kv: KVFormat, tokens: int, device: torch.device) -> Finding:
    """A row alone, among others, and in a step that could be longer: the same bits."""
    heads, _, dim = scale.heads
    longest = max(scale.lengths)
    lengths: list[int | None] = [longest, longest // 2, 1]
    (arenas,) = _arenas(scale, kv, lengths, device, copies=1, room=tokens)
    q = _draw((3 * tokens, heads, dim), device)
    together = _attend(scale, kv, q, arenas, tokens, 2 * (longest + tokens), device)
    findings = []
    for slot, arena in enumerate(arenas):
        assert arena is not None
        rows = q[slot * tokens : (slot + 1) * tokens]
        alone = _attend(scale, kv, rows, [arena], tokens, arena.length + tokens, device)
        findings.append(same(alone, together[slot * tokens : (slot + 1) * tokens]))
        first = _attend(scale, kv, rows[:1], [arena], 1, arena.length + 1, device)
        findings.append(same(first, alone[:1]))
    return worst(*findings)


def _attend(
    scale: Scale,
    kv: KVFormat,
    q: Tensor,
    arenas: list[Arena | None],
    tokens: int,
    longest: int,
    device: torch.device,
) -> Tensor:
    from mmr5_kernels.ops.decode_attention import decode_attention

    table = table_of(arenas).to(device)
    return decode_attention(
        *(q, table, _LAYER),
        tokens=tokens,
        num_kv_heads=scale.heads[1],
        max_length=longest,
        kv=kv,
    )


def _greedy(scale: Scale, rows: int, device: torch.device) -> Finding:
    from mmr5_kernels.ops.greedy import greedy_tokens as ours

    logits = torch.randn(rows, scale.vocabulary).to(device)
    seen = torch.rand(rows, scale.vocabulary).to(device) < 0.1
    tied = logits.clone()
    tied[:, scale.vocabulary // 2 :] = tied.amax() + 1
    holed = logits.clone()
    holed[rows // 2, scale.vocabulary - 1] = float("nan")
    return worst(
        *(
            same(ours(given, marks, penalty), greedy_tokens(given, marks, penalty))
            for given in (logits, tied, holed)
            for marks, penalty in ((None, 1.0), (seen, 1.05), (seen, 0.9))
        )
    )


def _arenas(
    scale: Scale,
    kv: KVFormat,
    lengths: list[int | None],
    device: torch.device,
    *,
    copies: int,
    room: int = 0,
) -> list[list[Arena | None]]:
    """The same arenas ``copies`` times; what lies beyond a sequence's tokens (and ``room`` more) is
    NaN, which no kernel may let through."""
    _, kv_heads, dim = scale.heads
    made: list[list[Arena | None]] = [[] for _ in range(copies)]
    for length in lengths:
        if length is None:
            for one in made:
                one.append(None)
            continue
        size = (_LAYERS, kv_heads, length + _ROOM, dim)
        held = [_draw(size, device) for _ in range(2)]
        scales: list[Tensor | None] = [None, None]
        if kv == "int8":
            pairs = [quantize_kv(x) for x in held]
            held, scales = [codes for codes, _ in pairs], [one for _, one in pairs]
        beyond = length + room
        for x, scale_of in zip(held, scales, strict=True):
            poisoned = x if scale_of is None else scale_of
            poisoned[:, :, beyond:] = float("nan")
        for one in made:
            k, v, k_scales, v_scales = (None if x is None else x.clone() for x in (*held, *scales))
            assert k is not None and v is not None
            one.append(Arena(k, v, length, k_scales, v_scales))
    return made


def _all(arena: Arena) -> Tensor:
    """Everything an arena holds, NaN made comparable."""
    parts = (arena.k, arena.v, arena.k_scales, arena.v_scales)
    flat = [part.float().flatten() for part in parts if part is not None]
    return torch.cat(flat).nan_to_num_(nan=-7.0)


def _draw(size: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(*size).to(device, torch.bfloat16)
