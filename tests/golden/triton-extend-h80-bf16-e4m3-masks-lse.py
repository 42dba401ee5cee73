"""extend-h80-q28-kv4-b16-bf16-kvf8e4m3-headscale-lse-window1024-cap50.0-sinks for sm_80

schedule: fp8_decodebits-idspage-num_stages2-num_warps8-prefetch_ids0-seq_lanes32-tile64-tile_m128 (triton-extend, pagedgen 0.1.0)

Extend: the last tokens of each sequence as queries against its paged keys and values, causal, a window of 1024: prefill,
chunked prefill and decodes in one launch. A program takes one tile of 128 rows of one sequence and one KV head; a
row is one query token and one of the 7 query heads that share the KV head.

    q, out        [num_tokens, 28, 80] bf16
    k, v          [num_blocks, 16, 4, 80] fp8_e4m3, any strides but the last (1)
    block_table   [num_seqs, max_blocks] int32      seq_lens [num_seqs] int32
    cu_seqlens_q  [num_seqs + 1] int32: queries of sequence s are q[cu_seqlens_q[s] : cu_seqlens_q[s + 1]]
    position      of a token in its sequence; the last query's is seq_len - 1
    word          two fp8 neighbours along head_dim, read as one uint16 and decoded to an even and an odd half
    m, l, acc     running maximum (base 2), sum and weighted values of the softmax
"""

import triton
import triton.language as tl


@triton.jit
def decode_fp8_pair(word):
    """Two e4m3 codes in each uint16 -> (even, odd) float16, each value times 2^-8."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 s, m;
        shl.b32 s, $2, 8;
        and.b32 s, s, 0x80008000;
        shl.b32 m, $2, 7;
        lop3.b32 $0, m, 0x3f803f80, s, 0xea;
        and.b32 s, $2, 0x80008000;
        shr.u32 m, $2, 1;
        lop3.b32 $1, m, 0x3f803f80, s, 0xea;
        }""",
        "=&r,=&r,r",
        [word],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def paged_extend(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    out_ptr,
    lse_ptr,
    k_scale_ptr,
    v_scale_ptr,
    sinks_ptr,
    qk_scale,
    num_seqs,
    q_stride_token,
    q_stride_head,
    out_stride_token,
    out_stride_head,
    k_stride_block,
    k_stride_token,
    k_stride_head,
    v_stride_block,
    v_stride_token,
    v_stride_head,
    block_table_stride,
):
    lanes = tl.arange(0, 32)
    longest = 0
    for base in range(0, num_seqs, 32):
        lens = tl.load(seq_lens_ptr + base + lanes, mask=base + lanes < num_seqs, other=0)
        longest = tl.maximum(longest, tl.max(lens, axis=0))
    step = (longest + 15) // 16  # KV tokens between two levels
    reach = step * (15 - tl.arange(0, 16)) + 1  # of a level's shortest tile
    tiles = tl.zeros([16], tl.int32)  # that reach as far
    for base in range(0, num_seqs, 32):
        there = base + lanes < num_seqs
        lens = tl.load(seq_lens_ptr + base + lanes, mask=there, other=0)
        begins = tl.load(cu_seqlens_q_ptr + base + lanes, mask=there, other=0)
        ends = tl.load(cu_seqlens_q_ptr + base + lanes + 1, mask=there, other=0)
        q_lens = tl.maximum(ends - begins, 0)
        queries = tl.minimum(tl.maximum(reach[None, :] - 1 - (lens[:, None] - q_lens[:, None]), 0), q_lens[:, None])
        short = tl.where(queries == q_lens[:, None], (q_lens[:, None] * 7 + 127) // 128, queries * 7 // 128)
        tiles += tl.sum((q_lens[:, None] * 7 + 127) // 128 - short, axis=0)
    place = tl.program_id(0) // 4  # in the order of all tiles
    longer = tiles <= place  # levels whose tiles all come before mine
    level = tl.sum(longer.to(tl.int32), axis=0)
    if level == 16:
        return
    place -= tl.max(tl.where(longer, tiles, 0), axis=0)
    least = step * (15 - level) + 1
    most = least + step

    seq = 0  # sequences whose tiles of this level all come before mine
    seen = 0  # tiles of this level in the sequences seen so far
    first = 0  # the place of my sequence's first tile
    for base in range(0, num_seqs, 32):
        there = base + lanes < num_seqs
        lens = tl.load(seq_lens_ptr + base + lanes, mask=there, other=0)
        begins = tl.load(cu_seqlens_q_ptr + base + lanes, mask=there, other=0)
        ends = tl.load(cu_seqlens_q_ptr + base + lanes + 1, mask=there, other=0)
        q_lens = tl.maximum(ends - begins, 0)
        queries = tl.minimum(tl.maximum(most - 1 - (lens - q_lens), 0), q_lens)
        short = tl.where(queries == q_lens, (q_lens * 7 + 127) // 128, queries * 7 // 128)
        upto = short
        queries = tl.minimum(tl.maximum(least - 1 - (lens - q_lens), 0), q_lens)
        short = tl.where(queries == q_lens, (q_lens * 7 + 127) // 128, queries * 7 // 128)
        places = seen + tl.cumsum(upto - short, axis=0)
        before = places <= place
        seq += tl.sum(before.to(tl.int32), axis=0)
        first = tl.maximum(first, tl.max(tl.where(before, places, 0), axis=0))
        seen = tl.max(places, axis=0)

    seq_len = tl.load(seq_lens_ptr + seq)
    q_begin = tl.load(cu_seqlens_q_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_begin
    queries = tl.minimum(tl.maximum(most - 1 - (seq_len - q_len), 0), q_len)
    short = tl.where(queries == q_len, (q_len * 7 + 127) // 128, queries * 7 // 128)
    first_row = (short - 1 - (place - first)) * 128  # of my tile, in rows of its sequence

    kv_head = tl.program_id(0) % 4
    rows = first_row + tl.arange(0, 128)
    queries = rows // 7  # tokens of the sequence's queries
    positions = seq_len - q_len + queries
    row_ok = (queries < q_len) & (positions >= 0)
    q_heads = kv_head * 7 + rows % 7
    q_tokens = (q_begin + queries).to(tl.int64)
    first_position = seq_len - q_len + first_row // 7
    kv_end = tl.minimum(seq_len - q_len + (first_row + 127) // 7 + 1, seq_len)
    kv_begin = tl.maximum(first_position - 1023, 0)

    col0 = tl.arange(0, 32)
    dim0 = tl.arange(0, 64)  # the same columns of q and out
    col1 = 32 + tl.arange(0, 16)
    col1_ok = col1 < 40
    dim1 = 64 + tl.arange(0, 32)  # the same columns of q and out
    dim1_ok = dim1 < 80
    tokens = tl.arange(0, 64)
    pages = tl.arange(0, 4)
    slots = tl.arange(0, 16)
    last_page = (seq_len - 1) // 16
    scores_scale = qk_scale * tl.load(k_scale_ptr + kv_head) * 256.0  # decoding left K * 2^-8
    v_factor = tl.load(v_scale_ptr + kv_head) * 256.0
    k_block, k_token = k_stride_block // 2, k_stride_token // 2  # strides in words
    v_block, v_token = v_stride_block // 2, v_stride_token // 2
    k_base = (k_ptr + kv_head.to(tl.int64) * k_stride_head).to(tl.pointer_type(tl.uint16))
    v_base = (v_ptr + kv_head.to(tl.int64) * v_stride_head).to(tl.pointer_type(tl.uint16))
    table_ptr = block_table_ptr + seq.to(tl.int64) * block_table_stride

    q_base = q_ptr + q_tokens * q_stride_token + q_heads.to(tl.int64) * q_stride_head
    q_ptrs = q_base[:, None] + dim0[None, :]
    q0 = tl.load(q_ptrs, mask=row_ok[:, None], other=0.0)  # [128, 64]
    q0_even, q0_odd = tl.split(tl.reshape(q0, [128, 32, 2]))
    q_ptrs = q_base[:, None] + dim1[None, :]
    q1 = tl.load(q_ptrs, mask=row_ok[:, None] & dim1_ok[None, :], other=0.0)  # [128, 32]
    q1_even, q1_odd = tl.split(tl.reshape(q1, [128, 16, 2]))
    # bfloat16 queries meet float16 values: scale each row by a power of two so that float16 holds it
    q_max = tl.full([128], 1e-30, tl.float32)
    q_max = tl.maximum(q_max, tl.max(tl.abs(q0_even), axis=1).to(tl.float32))
    q_max = tl.maximum(q_max, tl.max(tl.abs(q0_odd), axis=1).to(tl.float32))
    q_max = tl.maximum(q_max, tl.max(tl.abs(q1_even), axis=1).to(tl.float32))
    q_max = tl.maximum(q_max, tl.max(tl.abs(q1_odd), axis=1).to(tl.float32))
    q_unit = tl.exp2(tl.floor(tl.log2(q_max)))  # [128]
    q0_even = (q0_even / q_unit[:, None]).to(tl.float16)
    q0_odd = (q0_odd / q_unit[:, None]).to(tl.float16)
    q1_even = (q1_even / q_unit[:, None]).to(tl.float16)
    q1_odd = (q1_odd / q_unit[:, None]).to(tl.float16)
    scale = scores_scale * q_unit
    cap_scale = scale * 0.04

    # the softmax begins with the sink, of weight 1
    m = tl.maximum(tl.load(sinks_ptr + q_heads, mask=row_ok, other=0.0) * 1.4426950408889634, -1e30)  # [128]
    l = tl.full([128], 1.0, tl.float32)
    acc0_even = tl.zeros([128, 32], tl.float32)
    acc0_odd = tl.zeros([128, 32], tl.float32)
    acc1_even = tl.zeros([128, 16], tl.float32)
    acc1_odd = tl.zeros([128, 16], tl.float32)
    full_end = tl.maximum(first_position + 1, 0) // 64 * 64  # up to here every row sees all
    begin = kv_begin // 64 * 64
    full_begin = (tl.maximum(kv_end - 1 - 1023, 0) + 63) // 64 * 64  # from here on, too
    full_end = tl.maximum(full_begin, full_end)
    for pos in tl.range(begin, tl.minimum(full_begin, kv_end), 64, num_stages=2):
        ids = tl.load(table_ptr + tl.minimum(pos // 16 + pages, last_page))  # [4]
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        live = (pos + tokens >= kv_begin) & (pos + tokens < kv_end)  # what some row sees
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs, mask=live[None, :], other=0)  # [32, 64]
        k_ptrs = k_base + col1[:, None] + k_rows[None, :]
        k1 = tl.load(k_ptrs, mask=live[None, :] & col1_ok[:, None], other=0)  # [16, 64]
        k0_even, k0_odd = decode_fp8_pair(k0)
        k1_even, k1_odd = decode_fp8_pair(k1)
        s = tl.dot(q0_even, k0_even)  # [128, 64]
        s = tl.dot(q0_odd, k0_odd, s)
        s = tl.dot(q1_even, k1_even, s)
        s = tl.dot(q1_odd, k1_odd, s)
        s = 72.13475204444816 - 144.26950408889633 / (1.0 + tl.exp2(s * cap_scale[:, None]))
        visible = pos + tokens[None, :] <= positions[:, None]
        visible &= pos + tokens[None, :] > positions[:, None] - 1024
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        p = p.to(tl.float16)
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + col0[None, :]
        v0 = tl.load(v_ptrs, mask=live[:, None], other=0)  # [64, 32]
        v_ptrs = v_base + v_rows[:, None] + col1[None, :]
        v1 = tl.load(v_ptrs, mask=live[:, None] & col1_ok[None, :], other=0)  # [64, 16]
        v0_even, v0_odd = decode_fp8_pair(v0)
        v1_even, v1_odd = decode_fp8_pair(v1)
        acc0_even = tl.dot(p, v0_even, acc0_even * alpha[:, None])
        acc0_odd = tl.dot(p, v0_odd, acc0_odd * alpha[:, None])
        acc1_even = tl.dot(p, v1_even, acc1_even * alpha[:, None])
        acc1_odd = tl.dot(p, v1_odd, acc1_odd * alpha[:, None])

    for pos in tl.range(full_begin, full_end, 64, num_stages=2):
        ids = tl.load(table_ptr + tl.minimum(pos // 16 + pages, last_page))  # [4]
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs)  # [32, 64]
        k_ptrs = k_base + col1[:, None] + k_rows[None, :]
        k1 = tl.load(k_ptrs, mask=col1_ok[:, None], other=0)  # [16, 64]
        k0_even, k0_odd = decode_fp8_pair(k0)
        k1_even, k1_odd = decode_fp8_pair(k1)
        s = tl.dot(q0_even, k0_even)  # [128, 64]
        s = tl.dot(q0_odd, k0_odd, s)
        s = tl.dot(q1_even, k1_even, s)
        s = tl.dot(q1_odd, k1_odd, s)
        s = 72.13475204444816 - 144.26950408889633 / (1.0 + tl.exp2(s * cap_scale[:, None]))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        p = p.to(tl.float16)
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + col0[None, :]
        v0 = tl.load(v_ptrs)  # [64, 32]
        v_ptrs = v_base + v_rows[:, None] + col1[None, :]
        v1 = tl.load(v_ptrs, mask=col1_ok[None, :], other=0)  # [64, 16]
        v0_even, v0_odd = decode_fp8_pair(v0)
        v1_even, v1_odd = decode_fp8_pair(v1)
        acc0_even = tl.dot(p, v0_even, acc0_even * alpha[:, None])
        acc0_odd = tl.dot(p, v0_odd, acc0_odd * alpha[:, None])
        acc1_even = tl.dot(p, v1_even, acc1_even * alpha[:, None])
        acc1_odd = tl.dot(p, v1_odd, acc1_odd * alpha[:, None])

    for pos in tl.range(full_end, kv_end, 64, num_stages=2):
        ids = tl.load(table_ptr + tl.minimum(pos // 16 + pages, last_page))  # [4]
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        live = (pos + tokens >= kv_begin) & (pos + tokens < kv_end)  # what some row sees
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs, mask=live[None, :], other=0)  # [32, 64]
        k_ptrs = k_base + col1[:, None] + k_rows[None, :]
        k1 = tl.load(k_ptrs, mask=live[None, :] & col1_ok[:, None], other=0)  # [16, 64]
        k0_even, k0_odd = decode_fp8_pair(k0)
        k1_even, k1_odd = decode_fp8_pair(k1)
        s = tl.dot(q0_even, k0_even)  # [128, 64]
        s = tl.dot(q0_odd, k0_odd, s)
        s = tl.dot(q1_even, k1_even, s)
        s = tl.dot(q1_odd, k1_odd, s)
        s = 72.13475204444816 - 144.26950408889633 / (1.0 + tl.exp2(s * cap_scale[:, None]))
        visible = pos + tokens[None, :] <= positions[:, None]
        visible &= pos + tokens[None, :] > positions[:, None] - 1024
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        p = p.to(tl.float16)
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + col0[None, :]
        v0 = tl.load(v_ptrs, mask=live[:, None], other=0)  # [64, 32]
        v_ptrs = v_base + v_rows[:, None] + col1[None, :]
        v1 = tl.load(v_ptrs, mask=live[:, None] & col1_ok[None, :], other=0)  # [64, 16]
        v0_even, v0_odd = decode_fp8_pair(v0)
        v1_even, v1_odd = decode_fp8_pair(v1)
        acc0_even = tl.dot(p, v0_even, acc0_even * alpha[:, None])
        acc0_odd = tl.dot(p, v0_odd, acc0_odd * alpha[:, None])
        acc1_even = tl.dot(p, v1_even, acc1_even * alpha[:, None])
        acc1_odd = tl.dot(p, v1_odd, acc1_odd * alpha[:, None])

    # Where rows go is found anew: kept through the loops, it would take the registers that scores need. Reading
    # q_begin again hides from the compiler that it is the same.
    q_begin_again = tl.load(cu_seqlens_q_ptr + seq, volatile=True)
    rows = first_row + (q_begin_again - q_begin) + tl.arange(0, 128)
    queries = rows // 7
    row_ok = (queries < q_len) & (seq_len - q_len + queries >= 0)
    q_heads = kv_head * 7 + rows % 7
    q_tokens = (q_begin_again + queries).to(tl.int64)
    out_base = out_ptr + q_tokens * out_stride_token + q_heads.to(tl.int64) * out_stride_head
    factor = v_factor / l
    out0_even = (acc0_even * factor[:, None]).to(tl.bfloat16)
    out0_odd = (acc0_odd * factor[:, None]).to(tl.bfloat16)
    out0 = tl.reshape(tl.join(out0_even, out0_odd), [128, 64])
    tl.store(out_base[:, None] + dim0[None, :], out0, mask=row_ok[:, None])
    out1_even = (acc1_even * factor[:, None]).to(tl.bfloat16)
    out1_odd = (acc1_odd * factor[:, None]).to(tl.bfloat16)
    out1 = tl.reshape(tl.join(out1_even, out1_odd), [128, 32])
    tl.store(out_base[:, None] + dim1[None, :], out1, mask=row_ok[:, None] & dim1_ok[None, :])
    lse = (m + tl.log2(l)) * 0.6931471805599453
    tl.store(lse_ptr + q_tokens * 28 + q_heads, lse, mask=row_ok)
