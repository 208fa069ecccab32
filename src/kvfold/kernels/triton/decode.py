"""The decoding kernels: attention of a few queries over pages of encoded keys and values.

One program reads the keys of one split of one KV head of one sequence, once, for all query rows
that share them (R heads x T queries, the M side of the products). Scores and sums are float32;
products take the queries' dtype. Scales never touch single numbers where a row has one: a key's
scale multiplies its column of scores, a value's its column of weights. Numbers of four bits have a
scale per group and are decoded in registers; the two halves of their bytes are two planes, which
meet the even and the odd dimensions of the query, so nothing is interleaved.

Where values are the first numbers of their keys' rows (latents, MLA), a tile of them is loaded
once and is both: rows of rank + rope numbers are two arrays, so that powers of two suffice, and the
first is multiplied by the queries and then by the weights.

Works under Triton's interpreter (``TRITON_INTERPRET=1``) on a CPU, and uses nothing that only
one maker's GPUs have.
"""

import triton
import triton.language as tl

from kvfold.kernels.triton.bits import rounded_to_bf16
from kvfold.kernels.triton.formats import halves, row_scale, widened

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend_kernel(
    Q, q_batch, q_head, q_token,
    K, k_page, k_head, k_row, KS, ks_page, ks_head,
    V, v_page, v_head, v_row, VS, vs_page, vs_head,
    TABLE, table_row, table_head, page_size,
    range_row, range_head, BEGIN, END, LENGTH,
    MASK, mask_batch, mask_head, mask_token, mask_key,
    OUT, out_row, LSE, slots, slot,
    kv_heads, group, tokens,
    START, ALIBI_SLOPES, scale, softcap, left, right, sinks,  # options, by name
    head_dim: tl.constexpr, v_head_dim: tl.constexpr, rope_dim: tl.constexpr,
    k_width: tl.constexpr, v_width: tl.constexpr, k_groups: tl.constexpr, v_groups: tl.constexpr,
    SPLITS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, ROPE: tl.constexpr,
    K_GROUPS: tl.constexpr, V_GROUPS: tl.constexpr,
    K_FORMAT: tl.constexpr, V_FORMAT: tl.constexpr, K_HALVES: tl.constexpr, V_HALVES: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    ONE_PAGE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_BEGIN: tl.constexpr, HAS_START: tl.constexpr,
    HAS_ALIBI_SLOPES: tl.constexpr, MASK_KIND: tl.constexpr,
):  # fmt: skip
    """Partial attention over one split of one part of the cache.

    Q ``[B, Hq, T, D]`` by strides. K, V: pages; rows of a head lie k_row numbers (of four
    bits: bytes) apart and have k_width of them. K_FORMAT: a cache format's code; K_HALVES: it has
    four bits. TABLE int32 ``[B, P]`` or, by strides, ``[B, Hkv, P]``; BEGIN and END likewise. OUT
    float32 ``[B * Hq * T, slots, Dv]`` and LSE (base 2) ``[B * Hq * T, slots]`` get this program's
    split at ``slot + split``. MASK_KIND: 0 none, 1 zero hides, 2 added to the scores; MASK ``[B,
    Hq, T, S]`` by strides. ROPE: values are the first numbers of their keys, and rope_dim more
    follow; head_dim, D and k_width are those of the values then. Sizes of heads are constants: only
    then can Triton load rows 16 bytes at a time, and ahead of their use.
    """
    split, tile = tl.program_id(0), tl.program_id(1)
    b, kv_head = tl.program_id(2) // kv_heads, tl.program_id(2) % kv_heads
    row = tile * M + tl.arange(0, M)  # of the group's R x T query rows
    real = row < group * tokens
    head, token = kv_head * group + row // tokens, row % tokens

    # Which positions anybody here may see: [a, a + n_a), and with a window [c, c + n_c) too.
    table = TABLE + b * table_row + kv_head * table_head
    range_at = b * range_row + kv_head * range_head
    length = tl.load(LENGTH + b)
    begin = tl.load(BEGIN + range_at) if HAS_BEGIN else 0
    start = tl.load(START + b) if HAS_START else 0
    end = tl.minimum(tl.load(END + range_at), length)
    a = tl.maximum(begin, start)
    a_end = tl.maximum(end, a)
    c, c_end = a_end, a_end
    if HAS_LEFT:
        a_end = tl.maximum(tl.minimum(end, start + sinks), a)
        c = tl.maximum(length - tokens - left, a_end)
        c_end = tl.maximum(end, c)
    n_a, n_c = a_end - a, c_end - c
    tiles = tl.cdiv(n_a + n_c, N)

    q_at = Q + b.to(tl.int64) * q_batch + head.to(tl.int64) * q_head + token.to(tl.int64) * q_token
    if K_HALVES:
        kd = tl.arange(0, D // 2)
        known = real[:, None] & (2 * kd < head_dim)[None, :]
        q_low = tl.load(q_at[:, None] + 2 * kd[None, :], mask=known, other=0.0).to(DOT)
        known = real[:, None] & (2 * kd + 1 < head_dim)[None, :]
        q_high = tl.load(q_at[:, None] + 2 * kd[None, :] + 1, mask=known, other=0.0).to(DOT)
    else:
        kd = tl.arange(0, D)
        known = real[:, None] & (kd < head_dim)[None, :]
        q = tl.load(q_at[:, None] + kd[None, :], mask=known, other=0.0).to(DOT)
    if ROPE:
        rd = tl.arange(0, ROPE)
        known = real[:, None] & (rd < rope_dim)[None, :]
        q_rope = tl.load(q_at[:, None] + head_dim + rd[None, :], mask=known, other=0.0).to(DOT)
    if V_HALVES:
        vd = tl.arange(0, DV // 2)
        acc_low = tl.zeros((M, DV // 2), tl.float32)
        acc_high = tl.zeros((M, DV // 2), tl.float32)
    else:
        vd = tl.arange(0, DV)
        acc = tl.zeros((M, DV), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    position = length - tokens + token

    for step in range(split * tiles // SPLITS, (split + 1) * tiles // SPLITS):
        i = step * N + tl.arange(0, N)
        j = tl.where(i < n_a, a + i, c + i - n_a)
        inside = i < n_a + n_c
        if ONE_PAGE:
            page = tl.load(table).to(tl.int64) + tl.zeros((N,), tl.int64)
            at = j.to(tl.int64)
        else:
            page = tl.load(table + j // page_size, mask=inside, other=-1)
            page = page.to(tl.int64)
            inside = inside & (page >= 0)
            at = (j % page_size).to(tl.int64)

        k_at = page * k_page + kv_head * k_head + at * k_row
        there = inside[:, None] & (kd < k_width)[None, :]
        raw = tl.load(K + k_at[:, None] + kd[None, :], mask=there, other=0)
        ks_at = page * ks_page + kv_head * ks_head + at * k_groups
        if K_HALVES:
            low, high = halves(raw, KS, ks_at, inside, N, D // 2, k_groups, K_GROUPS, K_FORMAT, DOT)
            scores = tl.dot(q_low, tl.trans(low), input_precision=PRECISION)
            scores += tl.dot(q_high, tl.trans(high), input_precision=PRECISION)
        else:
            keys = widened(raw, K_FORMAT, DOT)
            scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
            if ROPE:
                there = inside[:, None] & (rd < rope_dim)[None, :]
                turned = tl.load(K + k_at[:, None] + head_dim + rd[None, :], mask=there, other=0)
                turned = tl.trans(widened(turned, K_FORMAT, DOT))
                scores += tl.dot(q_rope, turned, input_precision=PRECISION)
            if k_groups != 0:
                scores = scores * row_scale(KS, ks_at, inside, K_FORMAT)[None, :]
        scores = scores * scale
        if HAS_SOFTCAP:
            # softcap tanh(x / softcap), by an exponential that cannot overflow
            e = tl.exp2(tl.abs(scores) * (-2.0 * _LOG2E / softcap))
            bent = softcap * (1.0 - e) / (1.0 + e)
            scores = tl.where(scores < 0, -bent, bent)
        if HAS_ALIBI_SLOPES:
            slope = tl.load(ALIBI_SLOPES + head, mask=real, other=0.0)
            scores -= slope[:, None] * tl.abs(position[:, None] - j[None, :]).to(tl.float32)
        seen = inside[None, :] & real[:, None]
        if HAS_RIGHT:
            seen = seen & (j[None, :] <= position[:, None] + right)
        if HAS_LEFT:
            near = j[None, :] >= position[:, None] - left
            seen = seen & (near | (j < start + sinks)[None, :])
        if MASK_KIND != 0:
            m_at = b.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head + token * mask_token
            given = tl.load(MASK + m_at[:, None] + j[None, :] * mask_key, mask=seen, other=0)
            if MASK_KIND == 1:
                seen = seen & (given != 0)
            else:
                seen = seen & (given != float("-inf"))
                scores += given
            inside = inside & (tl.max(seen.to(tl.int32), 0) > 0)  # 0 times NaN would be NaN
        scores = tl.where(seen, scores * _LOG2E, float("-inf"))

        new = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        top = new

        vs_at = page * vs_page + kv_head * vs_head + at * v_groups
        if not ROPE:
            v_at = page * v_page + kv_head * v_head + at * v_row
            there = inside[:, None] & (vd < v_width)[None, :]
            raw = tl.load(V + v_at[:, None] + vd[None, :], mask=there, other=0)
        if V_HALVES:
            low, high = halves(
                raw, VS, vs_at, inside, N, DV // 2, v_groups, V_GROUPS, V_FORMAT, DOT
            )
            p = p.to(DOT)
            acc_low = acc_low * fade[:, None] + tl.dot(p, low, input_precision=PRECISION)
            acc_high = acc_high * fade[:, None] + tl.dot(p, high, input_precision=PRECISION)
        else:
            if v_groups != 0:
                p = p * row_scale(VS, vs_at, inside, V_FORMAT)[None, :]
            if ROPE:
                values = keys
                if MASK_KIND != 0:
                    values = tl.where(inside[:, None], keys, 0.0)
            else:
                values = widened(raw, V_FORMAT, DOT)
            acc = acc * fade[:, None] + tl.dot(p.to(DOT), values, input_precision=PRECISION)

    divisor = tl.where(total == 0.0, 1.0, total)[:, None]
    place = ((b * kv_heads * group + head) * tokens + token).to(tl.int64) * slots + slot + split
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    tl.store(LSE + place, lse, mask=real)
    to = OUT + place[:, None] * out_row
    if V_HALVES:
        first = real[:, None] & (2 * vd < v_head_dim)[None, :]
        tl.store(to + 2 * vd[None, :], acc_low / divisor, mask=first)
        second = real[:, None] & (2 * vd + 1 < v_head_dim)[None, :]
        tl.store(to + 2 * vd[None, :] + 1, acc_high / divisor, mask=second)
    else:
        tl.store(to + vd[None, :], acc / divisor, mask=real[:, None] & (vd < v_head_dim)[None, :])


@triton.jit
def merge_kernel(
    PARTS, part_row, PART_LSE, slots, heads, tokens, OUT, LSE, v_head_dim, SINK_LOGITS,
    SLOTS: tl.constexpr, DV: tl.constexpr, HAS_SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """Put the splits of one query row together: the split-KV identity (see ``ops.merge``).

    One program does it for DV numbers of the output. A head's sink logit is one more split, of a
    key without value.
    """
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SLOTS), tl.program_id(1) * DV + tl.arange(0, DV)
    lse = tl.load(PART_LSE + row * slots + s, mask=s < slots, other=float("-inf"))
    top = tl.max(lse, 0)
    if HAS_SINK_LOGITS:
        sink = tl.load(SINK_LOGITS + row // tokens % heads) * _LOG2E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(lse - base)
    total = tl.sum(weight, 0)
    if HAS_SINK_LOGITS:
        total += tl.exp2(sink - base)
    there = (s < slots)[:, None] & (d < v_head_dim)[None, :]
    parts = tl.load(PARTS + (row * slots + s)[:, None] * part_row + d[None, :], mask=there, other=0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    if OUT.dtype.element_ty == tl.bfloat16:
        out = rounded_to_bf16(out)  # Triton's interpreter would cut digits off
    tl.store(OUT + row * v_head_dim + d, out.to(OUT.dtype.element_ty), mask=d < v_head_dim)
    natural = (top + tl.log2(total)) / _LOG2E
    tl.store(LSE + row, tl.where(total == 0.0, float("-inf"), natural))
