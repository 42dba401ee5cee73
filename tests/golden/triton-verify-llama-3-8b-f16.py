"""verify-h128-q32-kv8-b16-f16 for sm_90

schedule: fp8_decodenone-merge32-num_stages3-num_warps4-seq_lanes128-tile64-tile_m64-waves2 (triton-verify, pagedgen 0.1.0)

Verify: a few queries a sequence, its last tokens, against its paged keys and values, causal. A
program takes one piece (a run of tokens) of one sequence and one tile of 64 rows of one KV head; a row is one query
and one of the 4 query heads that share the KV head. Pieces of a long sequence leave partial results, and the
program that finishes last merges them.

    q, out        [num_tokens, 32, 128] f16
    k, v          [num_blocks, 16, 8, 128] f16, any strides but the last (1)
    block_table   [num_seqs, max_blocks] int32      seq_lens [num_seqs] int32
    cu_seqlens_q  [num_seqs + 1] int32: queries of sequence s are q[cu_seqlens_q[s] : cu_seqlens_q[s + 1]]
    piece         a run of tokens of one sequence, worked on 64 tokens at a time
    m, l, acc     running maximum (base 2), sum and weighted values of the softmax
"""

import triton
import triton.language as tl


@triton.jit
def paged_verify(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    counter_ptr,
    qk_scale,
    num_seqs,
    partitions,
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
    kv_head = tl.program_id(0) % 8  # neighbours read other heads of the same tokens, near in memory
    program = tl.program_id(0) // 8
    lanes = tl.arange(0, 128)
    total = tl.zeros([], tl.int64)  # KV tokens of all query tiles
    for base in range(0, num_seqs, 128):
        ok = base + lanes < num_seqs
        lens = tl.load(seq_lens_ptr + base + lanes, mask=ok, other=0)
        q_lens = tl.load(cu_seqlens_q_ptr + base + lanes + 1, mask=ok, other=0)
        q_lens = tl.maximum(q_lens - tl.load(cu_seqlens_q_ptr + base + lanes, mask=ok, other=0), 0)
        tiles = (q_lens * 4 + 63) // 64
        total += tl.sum(lens.to(tl.int64) * tiles, axis=0)
    chunk = (total + partitions - 1) // partitions
    chunk = tl.maximum((chunk.to(tl.int32) + 63) // 64 * 64, 256)

    seq = 0  # sequences whose pieces all come before mine
    first_program = 0  # of my sequence
    seq_slot = 0  # the first of my sequence's partial results
    num_pieces = 0  # of the sequences seen so far
    for base in range(0, num_seqs, 128):
        ok = base + lanes < num_seqs
        lens = tl.load(seq_lens_ptr + base + lanes, mask=ok, other=0)
        q_lens = tl.load(cu_seqlens_q_ptr + base + lanes + 1, mask=ok, other=0)
        q_lens = tl.maximum(q_lens - tl.load(cu_seqlens_q_ptr + base + lanes, mask=ok, other=0), 0)
        tiles = (q_lens * 4 + 63) // 64
        parts = (lens + chunk - 1) // chunk
        pieces_end = num_pieces + tl.cumsum(parts * tiles, axis=0)
        before = pieces_end <= program
        seq += tl.sum(before.to(tl.int32), axis=0)
        first_program = tl.maximum(first_program, tl.max(tl.where(before, pieces_end, 0), axis=0))
        seq_slot += tl.sum(tl.where(before & (parts > 1), parts * tiles, 0), axis=0)
        num_pieces = tl.max(pieces_end, axis=0)
    if program >= num_pieces:
        return

    seq_len = tl.load(seq_lens_ptr + seq)
    q_begin = tl.load(cu_seqlens_q_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_begin
    num_tiles = (q_len * 4 + 63) // 64
    num_parts = (seq_len + chunk - 1) // chunk  # pieces of my query tile
    part = (program - first_program) // num_tiles
    q_tile = (program - first_program) % num_tiles
    first_piece = seq_slot + q_tile * num_parts  # where my query tile's partial results begin
    part_len = ((seq_len + num_parts - 1) // num_parts + 63) // 64 * 64
    begin = part * part_len
    end = tl.minimum(begin + part_len, seq_len)

    rows = tl.arange(0, 64)
    my_rows = q_tile * 64 + rows
    queries = my_rows // 4  # of the sequence
    context = seq_len - q_len  # tokens that every query sees
    row_ok = (queries < q_len) & (context + queries >= 0)
    q_heads = kv_head * 4 + my_rows % 4
    q_tokens = (q_begin + queries).to(tl.int64)
    positions = context + queries

    col0 = tl.arange(0, 128)
    dim0 = col0
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
    q0 = tl.load(q_ptrs, mask=row_ok[:, None], other=0.0)  # [64, 128]
    scale = scores_scale

    m = tl.full([64], -1e30, tl.float32)  # finite: a row may see nothing of its piece
    l = tl.zeros([64], tl.float32)
    acc0 = tl.zeros([64, 128], tl.float32)
    # Up to full_end every row sees all; the queries' own tokens come after it.
    full_end = tl.minimum(end, tl.maximum(context, begin))
    full_end = begin + (full_end - begin) // 64 * 64
    pos = begin
    ids = tl.load(table_ptr + tl.minimum(pos // 16 + pages, last_page))  # [4]
    for pos in tl.range(begin, full_end, 64, num_stages=3):
        next_ids = tl.load(table_ptr + tl.minimum((pos + 64) // 16 + pages, last_page))  # [4]

        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs)  # [128, 64]
        s = tl.dot(q0, k0)  # [64, 64]
        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        p = p.to(tl.float16)
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + col0[None, :]
        v0 = tl.load(v_ptrs)  # [64, 128]
        acc0 = tl.dot(p, v0, acc0 * alpha[:, None])
        ids = next_ids
    for pos in tl.range(full_end, end, 64, num_stages=3):
        next_ids = tl.load(table_ptr + tl.minimum((pos + 64) // 16 + pages, last_page))  # [4]

        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        live = pos + tokens < end
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs, mask=live[None, :], other=0)  # [128, 64]
        s = tl.dot(q0, k0)  # [64, 64]
        visible = (pos + tokens[None, :] <= positions[:, None]) & live[None, :]
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        p = p.to(tl.float16)
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + col0[None, :]
        v0 = tl.load(v_ptrs, mask=live[:, None], other=0)  # [64, 128]
        acc0 = tl.dot(p, v0, acc0 * alpha[:, None])
        ids = next_ids

    lse = m + tl.log2(l)  # base 2; -inf where a row saw nothing
    factor = tl.where(l > 0, 1.0 / l, 0.0)
    acc0 = acc0 * factor[:, None]
    if num_parts == 1:
        out_base = out_ptr + q_tokens * out_stride_token + q_heads.to(tl.int64) * out_stride_head
        out0 = acc0.to(tl.float16)
        tl.store(out_base[:, None] + dim0[None, :], out0, mask=row_ok[:, None])
    else:
        # leave my part; the last program of this query tile to arrive merges them all
        head_slot = kv_head.to(tl.int64) * (2 * partitions)
        lse_slots_ptr = partial_lse_ptr + head_slot * 64
        part_slots_ptr = partial_ptr + head_slot * 8192
        slot_rows = (first_piece + part) * 64 + rows
        tl.store(lse_slots_ptr + slot_rows, lse)
        my_ptrs = part_slots_ptr + slot_rows[:, None] * 128 + dim0[None, :]
        tl.store(my_ptrs, acc0)
        counter = counter_ptr + head_slot + first_piece
        tl.debug_barrier()  # every thread's stores come before the release below
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1:
            tl.store(counter, 0)  # ready for the next call
            row = tl.arange(0, 64)
            dim = tl.arange(0, 128)
            merge_part = tl.arange(0, 1)
            merged_m = tl.full([64], -1e30, tl.float32)
            merged_l = tl.zeros([64], tl.float32)
            merged = tl.zeros([64, 128], tl.float32)
            for base in range(0, num_parts, 1):
                others = base + merge_part
                part_rows = (first_piece + others)[:, None] * 64 + row[None, :]  # [1, 64]
                ok = (others < num_parts)[:, None]
                part_lse = tl.load(lse_slots_ptr + part_rows, mask=ok, other=float("-inf"), cache_modifier=".cg")
                part_ptrs = part_slots_ptr + part_rows[:, :, None] * 128 + dim[None, None, :]
                part_ok = ok[:, :, None]
                part_out = tl.load(part_ptrs, mask=part_ok, other=0.0, cache_modifier=".cg")
                m_new = tl.maximum(merged_m, tl.max(part_lse, axis=0))
                weight = tl.exp2(part_lse - m_new[None, :])
                shrink = tl.exp2(merged_m - m_new)
                merged_l = merged_l * shrink + tl.sum(weight, axis=0)
                merged = merged * shrink[:, None] + tl.sum(part_out * weight[:, :, None], axis=0)
                merged_m = m_new
            merged = merged / merged_l[:, None]
            my_rows = q_tile * 64 + row
            queries = my_rows // 4
            live = (queries < q_len) & (context + queries >= 0)
            q_heads = kv_head * 4 + my_rows % 4
            q_tokens = (q_begin + queries).to(tl.int64)
            merged_base = out_ptr + q_tokens * out_stride_token + q_heads.to(tl.int64) * out_stride_head
            ok = live[:, None]
            tl.store(merged_base[:, None] + dim[None, :], merged.to(tl.float16), mask=ok)
