"""decode-h128-q32-kv8-b16-f16-kvf8e4m3-window4096 for sm_90

schedule: columnspieces-fp8_decodecvt-max_regs0-merge32-num_stages3-num_warps1-pdl0-rows8-seq_lanes128-splitpieces-sumsdot-tile32-waves4 (triton-decode, pagedgen 0.1.0)

Decode: one query token a sequence against its paged keys and values. A program takes one piece (a run of tokens)
of one sequence and the 4 query heads that share a KV head; pieces of a long sequence leave partial results, and the
program that finishes last merges them.

    q, out       [num_seqs, 32, 128] f16
    k, v         [num_blocks, 16, 8, 128] fp8_e4m3, any strides but the last (1)
    block_table  [num_seqs, max_blocks] int32      seq_lens [num_seqs] int32
    piece        a run of tokens of one sequence, worked on 32 tokens at a time
    word         two fp8 neighbours along head_dim, read as one uint16 and decoded to an even and an odd half
    m, l, acc    running maximum (base 2), sum and weighted values of the softmax
"""

import triton
import triton.language as tl


@triton.jit
def decode_fp8_pair(word):
    """Two fp8 codes in each uint16 -> (even, odd) float16, fp8_e4m3 by the conversion instruction."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 even, odd;
        .reg .b32 sorted;
        prmt.b32 sorted, $2, 0, 0x3120;
        mov.b32 {even, odd}, sorted;
        cvt.rn.f16x2.e4m3x2 $0, even;
        cvt.rn.f16x2.e4m3x2 $1, odd;
        }""",
        "=&r,=r,r",
        [word],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def paged_decode(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
    k_scale_ptr,
    v_scale_ptr,
    partial_ptr,
    partial_lse_ptr,
    counter_ptr,
    qk_scale,
    num_seqs,
    partitions,
    q_stride_seq,
    q_stride_head,
    out_stride_seq,
    out_stride_head,
    k_stride_block,
    k_stride_token,
    k_stride_head,
    v_stride_block,
    v_stride_token,
    v_stride_head,
    block_table_stride,
):
    head_program = tl.program_id(0) % 8  # neighbours read other heads of the same tokens, near in memory
    program = tl.program_id(0) // 8
    lanes = tl.arange(0, 128)
    total = tl.zeros([], tl.int64)  # KV tokens of the batch
    for base in range(0, num_seqs, 128):
        lens = tl.load(seq_lens_ptr + base + lanes, mask=base + lanes < num_seqs, other=0)
        lens -= tl.maximum(lens - 4096, 0) // 32 * 32
        total += tl.sum(lens.to(tl.int64), axis=0)
    chunk = (total + partitions - 1) // partitions
    chunk = tl.maximum((chunk.to(tl.int32) + 31) // 32 * 32, 256)

    piece = program
    seq = 0  # sequences whose pieces all come before mine
    first_piece = 0  # the first piece of my sequence
    num_pieces = 0  # pieces of the sequences seen so far
    for base in range(0, num_seqs, 128):
        lens = tl.load(seq_lens_ptr + base + lanes, mask=base + lanes < num_seqs, other=0)
        lens -= tl.maximum(lens - 4096, 0) // 32 * 32
        pieces_end = num_pieces + tl.cumsum((lens + chunk - 1) // chunk, axis=0)
        before = pieces_end <= piece
        seq += tl.sum(before.to(tl.int32), axis=0)
        first_piece = tl.maximum(first_piece, tl.max(tl.where(before, pieces_end, 0), axis=0))
        num_pieces = tl.max(pieces_end, axis=0)
    if piece >= num_pieces:
        return

    seq_len = tl.load(seq_lens_ptr + seq)
    skipped = tl.maximum(seq_len - 4096, 0) // 32 * 32
    num_parts = (seq_len - skipped + chunk - 1) // chunk  # pieces of my sequence
    part = piece - first_piece
    part_len = ((seq_len - skipped + num_parts - 1) // num_parts + 31) // 32 * 32
    begin = skipped + part * part_len
    end = tl.minimum(begin + part_len, seq_len)

    kv_head = head_program
    heads_base = kv_head * 4
    rows = tl.arange(0, 8)
    row_ok = rows < 4
    q_heads = heads_base + rows
    col0 = tl.arange(0, 64)
    dim0 = tl.arange(0, 128)  # the same columns of q and out
    tokens = tl.arange(0, 32)
    pages = tl.arange(0, 2)
    slots = tl.arange(0, 16)
    scores_scale = qk_scale * tl.load(k_scale_ptr)
    v_factor = tl.load(v_scale_ptr)
    k_block, k_token = k_stride_block // 2, k_stride_token // 2  # strides in words
    v_block, v_token = v_stride_block // 2, v_stride_token // 2
    k_base = (k_ptr + kv_head.to(tl.int64) * k_stride_head).to(tl.pointer_type(tl.uint16))
    v_base = (v_ptr + kv_head.to(tl.int64) * v_stride_head).to(tl.pointer_type(tl.uint16))
    first_slot = head_program.to(tl.int64) * (partitions + num_seqs)
    lse_slots_ptr = partial_lse_ptr + first_slot * 4
    part_slots_ptr = partial_ptr + first_slot * 512

    table_ptr = block_table_ptr + seq.to(tl.int64) * block_table_stride
    last_page = (seq_len - 1) // 16
    ids = tl.load(table_ptr + tl.minimum(begin // 16 + pages, last_page))  # [2]
    q_base = q_ptr + seq.to(tl.int64) * q_stride_seq + q_heads.to(tl.int64) * q_stride_head
    q_ptrs = q_base[:, None] + dim0[None, :]
    q_0 = tl.load(q_ptrs, mask=row_ok[:, None], other=0.0)  # [8, 128]
    q_0_even, q_0_odd = tl.split(tl.reshape(q_0, [8, 64, 2]))
    scale = scores_scale
    q_0_even = tl.trans(q_0_even)  # [64, 8]
    q_0_odd = tl.trans(q_0_odd)  # [64, 8]
    m = tl.full([8], float("-inf"), tl.float32)
    l = tl.zeros([16, 8], tl.float32)
    ones = tl.full([16, 32], 1.0, tl.float16)
    acc_0_even = tl.zeros([64, 8], tl.float32)
    acc_0_odd = tl.zeros([64, 8], tl.float32)
    window_begin = tl.maximum(seq_len - 1 - 4095, 0)
    if begin < window_begin:  # inside my first tile
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [32]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [32]), 8)
        live = (begin + tokens >= window_begin) & (begin + tokens < end)
        k_ptrs = k_base + col0[None, :] + k_rows[:, None]
        k0 = tl.load(k_ptrs, mask=live[:, None], other=0)  # [32, 64]
        k0_even, k0_odd = decode_fp8_pair(k0)
        s = tl.dot(k0_even, q_0_even)  # [32, 8]
        s = tl.dot(k0_odd, q_0_odd, s)
        s = tl.where(live[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=0) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale - m_new[None, :])
        p = p.to(tl.float16)
        l = tl.dot(ones, p, l * alpha[None, :])  # every row is the sum
        m = m_new
        v_ptrs = v_base + v_rows[None, :] + col0[:, None]
        v0 = tl.load(v_ptrs, mask=live[None, :], other=0)  # [64, 32]
        v0_even, v0_odd = decode_fp8_pair(v0)
        acc_0_even = tl.dot(v0_even, p, acc_0_even * alpha[None, :])
        acc_0_odd = tl.dot(v0_odd, p, acc_0_odd * alpha[None, :])

        begin = tl.minimum(begin + 32, end)
        ids = tl.load(table_ptr + tl.minimum(begin // 16 + pages, last_page))  # [2]
    full_end = begin + (end - begin) // 32 * 32
    for pos in tl.range(begin, full_end, 32, num_stages=3):
        next_ids = tl.load(table_ptr + tl.minimum((pos + 32) // 16 + pages, last_page))  # [2]
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [32]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [32]), 8)
        k_ptrs = k_base + col0[None, :] + k_rows[:, None]
        k0 = tl.load(k_ptrs)  # [32, 64]
        k0_even, k0_odd = decode_fp8_pair(k0)
        s = tl.dot(k0_even, q_0_even)  # [32, 8]
        s = tl.dot(k0_odd, q_0_odd, s)
        m_new = tl.maximum(m, tl.max(s, axis=0) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale - m_new[None, :])
        p = p.to(tl.float16)
        l = tl.dot(ones, p, l * alpha[None, :])  # every row is the sum
        m = m_new
        v_ptrs = v_base + v_rows[None, :] + col0[:, None]
        v0 = tl.load(v_ptrs)  # [64, 32]
        v0_even, v0_odd = decode_fp8_pair(v0)
        acc_0_even = tl.dot(v0_even, p, acc_0_even * alpha[None, :])
        acc_0_odd = tl.dot(v0_odd, p, acc_0_odd * alpha[None, :])
        ids = next_ids

    if full_end < end:
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [32]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [32]), 8)
        live = (full_end + tokens >= window_begin) & (full_end + tokens < end)
        k_ptrs = k_base + col0[None, :] + k_rows[:, None]
        k0 = tl.load(k_ptrs, mask=live[:, None], other=0)  # [32, 64]
        k0_even, k0_odd = decode_fp8_pair(k0)
        s = tl.dot(k0_even, q_0_even)  # [32, 8]
        s = tl.dot(k0_odd, q_0_odd, s)
        s = tl.where(live[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=0) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale - m_new[None, :])
        p = p.to(tl.float16)
        l = tl.dot(ones, p, l * alpha[None, :])  # every row is the sum
        m = m_new
        v_ptrs = v_base + v_rows[None, :] + col0[:, None]
        v0 = tl.load(v_ptrs, mask=live[None, :], other=0)  # [64, 32]
        v0_even, v0_odd = decode_fp8_pair(v0)
        acc_0_even = tl.dot(v0_even, p, acc_0_even * alpha[None, :])
        acc_0_odd = tl.dot(v0_odd, p, acc_0_odd * alpha[None, :])

    l = tl.max(l, axis=0)
    lse = m + tl.log2(l)  # base 2
    acc_0_even = tl.trans(acc_0_even * (v_factor / l)[None, :])
    acc_0_odd = tl.trans(acc_0_odd * (v_factor / l)[None, :])

    out_base = out_ptr + seq.to(tl.int64) * out_stride_seq + heads_base.to(tl.int64) * out_stride_head
    acc_0 = tl.reshape(tl.join(acc_0_even, acc_0_odd), [8, 128])
    if num_parts == 1:
        row_out = out_base + rows.to(tl.int64) * out_stride_head
        out_0 = acc_0.to(tl.float16)
        tl.store(row_out[:, None] + dim0[None, :], out_0, mask=row_ok[:, None])
    else:
        # leave my part; the last program of this sequence to arrive merges them all
        my_rows = (first_piece + part) * 4 + rows
        tl.store(lse_slots_ptr + my_rows, lse, mask=row_ok)
        my_ptrs = part_slots_ptr + my_rows[:, None] * 128 + dim0[None, :]
        tl.store(my_ptrs, acc_0, mask=row_ok[:, None])
        counter = counter_ptr + head_program * num_seqs + seq
        tl.debug_barrier()  # every thread's stores come before the release below
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1:
            tl.store(counter, 0)  # ready for the next call
            row = tl.arange(0, 4)
            dim = tl.arange(0, 128)
            merge_part = tl.arange(0, 2)
            merged_m = tl.full([4], -1e30, tl.float32)
            merged_l = tl.zeros([4], tl.float32)
            merged = tl.zeros([4, 128], tl.float32)
            for base in range(0, num_parts, 2):
                others = base + merge_part
                part_rows = (first_piece + others)[:, None] * 4 + row[None, :]  # [2, 4]
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
            live = row < 4
            merged_ptrs = out_base + row.to(tl.int64)[:, None] * out_stride_head + dim[None, :]
            ok = live[:, None]
            tl.store(merged_ptrs, merged.to(tl.float16), mask=ok)
