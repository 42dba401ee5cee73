"""extend-h192v128-q16-kv16-b16-f16-window4096-alibi-chunk8192-percausal for sm_90

schedule: fp8_decodenone-idspage-num_stages2-num_warps8-prefetch_ids0-seq_lanes32-tile64-tile_m128 (triton-extend, pagedgen 0.1.0)

Extend: the last tokens of each sequence as queries against its paged keys and values, causal where the call says so, a window of 4096, chunks of 8192: prefill,
chunked prefill and decodes in one launch. A program takes one tile of 128 rows of one sequence and one KV head; a
row is one query token and one of the 1 query heads that share the KV head.

    q, out        [num_tokens, 16, 192] f16
    k, v          [num_blocks, 16, 16, 192] f16, any strides but the last (1)
                  v and out have rows of 128
    block_table   [num_seqs, max_blocks] int32      seq_lens [num_seqs] int32
    cu_seqlens_q  [num_seqs + 1] int32: queries of sequence s are q[cu_seqlens_q[s] : cu_seqlens_q[s + 1]]
    position      of a token in its sequence; the last query's is seq_len - 1
    m, l, acc     running maximum (base 2), sum and weighted values of the softmax
"""

import triton
import triton.language as tl


@triton.jit
def paged_extend(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    out_ptr,
    alibi_slopes_ptr,
    causal_ptr,
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
        wholes = tl.load(causal_ptr + base + lanes, mask=there, other=1) == 0
        queries = tl.minimum(tl.maximum(reach[None, :] - 1 - (lens[:, None] - q_lens[:, None]), 0), q_lens[:, None])
        queries = tl.where(wholes[:, None], tl.where(lens[:, None] < reach[None, :], q_lens[:, None], 0), queries)
        short = tl.where(queries == q_lens[:, None], (q_lens[:, None] * 1 + 127) // 128, queries * 1 // 128)
        tiles += tl.sum((q_lens[:, None] * 1 + 127) // 128 - short, axis=0)
    place = tl.program_id(0) // 16  # in the order of all tiles
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
        wholes = tl.load(causal_ptr + base + lanes, mask=there, other=1) == 0
        queries = tl.minimum(tl.maximum(most - 1 - (lens - q_lens), 0), q_lens)
        queries = tl.where(wholes, tl.where(lens < most, q_lens, 0), queries)
        short = tl.where(queries == q_lens, (q_lens * 1 + 127) // 128, queries * 1 // 128)
        upto = short
        queries = tl.minimum(tl.maximum(least - 1 - (lens - q_lens), 0), q_lens)
        queries = tl.where(wholes, tl.where(lens < least, q_lens, 0), queries)
        short = tl.where(queries == q_lens, (q_lens * 1 + 127) // 128, queries * 1 // 128)
        places = seen + tl.cumsum(upto - short, axis=0)
        before = places <= place
        seq += tl.sum(before.to(tl.int32), axis=0)
        first = tl.maximum(first, tl.max(tl.where(before, places, 0), axis=0))
        seen = tl.max(places, axis=0)

    seq_len = tl.load(seq_lens_ptr + seq)
    q_begin = tl.load(cu_seqlens_q_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_begin
    whole = tl.load(causal_ptr + seq) == 0
    queries = tl.minimum(tl.maximum(most - 1 - (seq_len - q_len), 0), q_len)
    queries = tl.where(whole, tl.where(seq_len < most, q_len, 0), queries)
    short = tl.where(queries == q_len, (q_len * 1 + 127) // 128, queries * 1 // 128)
    first_row = (short - 1 - (place - first)) * 128  # of my tile, in rows of its sequence

    kv_head = tl.program_id(0) % 16
    rows = first_row + tl.arange(0, 128)
    queries = rows // 1  # tokens of the sequence's queries
    positions = seq_len - q_len + queries
    row_ok = (queries < q_len) & (positions >= 0)
    q_heads = kv_head * 1 + rows % 1
    q_tokens = (q_begin + queries).to(tl.int64)
    first_position = seq_len - q_len + first_row // 1
    last_position = tl.minimum(seq_len - q_len + (first_row + 127) // 1, seq_len - 1)
    kv_end = tl.minimum(tl.minimum(tl.minimum(tl.where(whole, seq_len, last_position + 1), last_position + 4096), (last_position // 8192 + 1) * 8192), seq_len)
    kv_begin = tl.maximum(first_position - 4095, tl.maximum(first_position, 0) // 8192 * 8192)

    col0 = tl.arange(0, 128)
    dim0 = col0
    col1 = 128 + tl.arange(0, 64)
    dim1 = col1
    v_col0 = tl.arange(0, 128)
    v_dim0 = v_col0
    tokens = tl.arange(0, 64)
    pages = tl.arange(0, 4)
    slots = tl.arange(0, 16)
    last_page = (seq_len - 1) // 16
    scores_scale = qk_scale
    k_block, k_token = k_stride_block, k_stride_token
    v_block, v_token = v_stride_block, v_stride_token
    k_base = k_ptr + kv_head.to(tl.int64) * k_stride_head
    v_base = v_ptr + kv_head.to(tl.int64) * v_stride_head
    table_ptr = block_table_ptr + seq.to(tl.int64) * block_table_stride

    q_base = q_ptr + q_tokens * q_stride_token + q_heads.to(tl.int64) * q_stride_head
    q_ptrs = q_base[:, None] + dim0[None, :]
    q0 = tl.load(q_ptrs, mask=row_ok[:, None], other=0.0)  # [128, 128]
    q_ptrs = q_base[:, None] + dim1[None, :]
    q1 = tl.load(q_ptrs, mask=row_ok[:, None], other=0.0)  # [128, 64]
    scale = scores_scale
    slopes = tl.load(alibi_slopes_ptr + q_heads, mask=row_ok, other=0.0) * 1.4426950408889634

    m = tl.full([128], -1e30, tl.float32)  # finite: a row may see nothing of its first tile
    l = tl.zeros([128], tl.float32)
    acc0 = tl.zeros([128, 128], tl.float32)
    full_end = tl.minimum(tl.minimum(tl.minimum(tl.where(whole, seq_len, tl.maximum(first_position, 0) + 1), tl.maximum(first_position, 0) + 4096), (tl.maximum(first_position, 0) // 8192 + 1) * 8192), seq_len) // 64 * 64  # up to here every row sees all
    begin = kv_begin // 64 * 64
    full_begin = (tl.maximum(last_position - 4095, tl.maximum(last_position, 0) // 8192 * 8192) + 63) // 64 * 64  # from here on, too
    full_end = tl.maximum(full_begin, full_end)
    for pos in tl.range(begin, tl.minimum(full_begin, kv_end), 64, num_stages=2):
        ids = tl.load(table_ptr + tl.minimum(pos // 16 + pages, last_page))  # [4]
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        live = (pos + tokens >= kv_begin) & (pos + tokens < kv_end)  # what some row sees
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs, mask=live[None, :], other=0)  # [128, 64]
        k_ptrs = k_base + col1[:, None] + k_rows[None, :]
        k1 = tl.load(k_ptrs, mask=live[None, :], other=0)  # [64, 64]
        s = tl.dot(q0, k0)  # [128, 64]
        s = tl.dot(q1, k1, s)
        s = s * scale - slopes[:, None] * (tl.abs(positions[:, None] - pos - tokens[None, :])).to(tl.float32)
        visible = ((pos + tokens[None, :] <= positions[:, None]) | whole) & live[None, :]
        visible &= pos + tokens[None, :] > positions[:, None] - 4096
        visible &= pos + tokens[None, :] < positions[:, None] + 4096
        visible &= (pos + tokens[None, :]) // 8192 == positions[:, None] // 8192
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        p = p.to(tl.float16)
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + v_col0[None, :]
        v0 = tl.load(v_ptrs, mask=live[:, None], other=0)  # [64, 128]
        acc0 = tl.dot(p, v0, acc0 * alpha[:, None])

    for pos in tl.range(full_begin, full_end, 64, num_stages=2):
        ids = tl.load(table_ptr + tl.minimum(pos // 16 + pages, last_page))  # [4]
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs)  # [128, 64]
        k_ptrs = k_base + col1[:, None] + k_rows[None, :]
        k1 = tl.load(k_ptrs)  # [64, 64]
        s = tl.dot(q0, k0)  # [128, 64]
        s = tl.dot(q1, k1, s)
        s = s * scale - slopes[:, None] * (tl.abs(positions[:, None] - pos - tokens[None, :])).to(tl.float32)
        m_new = tl.maximum(m, tl.max(s, axis=1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        p = p.to(tl.float16)
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + v_col0[None, :]
        v0 = tl.load(v_ptrs)  # [64, 128]
        acc0 = tl.dot(p, v0, acc0 * alpha[:, None])

    for pos in tl.range(full_end, kv_end, 64, num_stages=2):
        ids = tl.load(table_ptr + tl.minimum(pos // 16 + pages, last_page))  # [4]
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        live = (pos + tokens >= kv_begin) & (pos + tokens < kv_end)  # what some row sees
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs, mask=live[None, :], other=0)  # [128, 64]
        k_ptrs = k_base + col1[:, None] + k_rows[None, :]
        k1 = tl.load(k_ptrs, mask=live[None, :], other=0)  # [64, 64]
        s = tl.dot(q0, k0)  # [128, 64]
        s = tl.dot(q1, k1, s)
        s = s * scale - slopes[:, None] * (tl.abs(positions[:, None] - pos - tokens[None, :])).to(tl.float32)
        visible = ((pos + tokens[None, :] <= positions[:, None]) | whole) & live[None, :]
        visible &= pos + tokens[None, :] > positions[:, None] - 4096
        visible &= pos + tokens[None, :] < positions[:, None] + 4096
        visible &= (pos + tokens[None, :]) // 8192 == positions[:, None] // 8192
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        p = p.to(tl.float16)
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + v_col0[None, :]
        v0 = tl.load(v_ptrs, mask=live[:, None], other=0)  # [64, 128]
        acc0 = tl.dot(p, v0, acc0 * alpha[:, None])

    # Where rows go is found anew: kept through the loops, it would take the registers that scores need. Reading
    # q_begin again hides from the compiler that it is the same.
    q_begin_again = tl.load(cu_seqlens_q_ptr + seq, volatile=True)
    rows = first_row + (q_begin_again - q_begin) + tl.arange(0, 128)
    queries = rows // 1
    row_ok = (queries < q_len) & (seq_len - q_len + queries >= 0)
    q_heads = kv_head * 1 + rows % 1
    q_tokens = (q_begin_again + queries).to(tl.int64)
    out_base = out_ptr + q_tokens * out_stride_token + q_heads.to(tl.int64) * out_stride_head
    factor = 1.0 / l
    out0 = (acc0 * factor[:, None]).to(tl.float16)
    tl.store(out_base[:, None] + v_dim0[None, :], out0, mask=row_ok[:, None])
