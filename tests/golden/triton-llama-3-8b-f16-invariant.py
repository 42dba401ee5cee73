"""decode-h128-q32-kv8-b16-f16-invariant for sm_90

schedule: columnspieces-fp8_decodenone-max_parts32-max_regs0-merge32-num_stages3-num_warps4-part256-pdl1-rows16-seq_lanes128-splitfixed-sumsreduce-tile64-waves4 (triton-decode, pagedgen 0.1.0)

Decode: one query token a sequence against its paged keys and values. A program takes one piece (a run of tokens)
of one sequence and the 4 query heads that share a KV head; pieces of a long sequence leave partial results, and the
program that finishes last merges them.

    q, out       [num_seqs, 32, 128] f16
    k, v         [num_blocks, 16, 8, 128] f16, any strides but the last (1)
    block_table  [num_seqs, max_blocks] int32      seq_lens [num_seqs] int32
    piece        a run of tokens of one sequence, worked on 64 tokens at a time
    m, l, acc    running maximum (base 2), sum and weighted values of the softmax
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def paged_decode(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
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
    gdc_wait()  # nothing is read or written before the kernel before this one is done
    head_program = tl.program_id(0) % 8  # neighbours read other heads of the same tokens, near in memory
    program = tl.program_id(0) // 8
    lanes = tl.arange(0, 128)
    total = tl.zeros([], tl.int64)  # KV tokens of the batch
    for base in range(0, num_seqs, 128):
        lens = tl.load(seq_lens_ptr + base + lanes, mask=base + lanes < num_seqs, other=0)
        total += tl.sum(lens.to(tl.int64), axis=0)
    chunk = (total + partitions - 1) // partitions
    chunk = tl.maximum((chunk.to(tl.int32) + 63) // 64 * 64, 256)

    piece = program
    seq = 0  # sequences whose pieces all come before mine
    first_piece = 0  # the first piece of my sequence
    num_pieces = 0  # pieces of the sequences seen so far
    for base in range(0, num_seqs, 128):
        lens = tl.load(seq_lens_ptr + base + lanes, mask=base + lanes < num_seqs, other=0)
        tiles = (lens + 63) // 64
        part_tiles = tl.maximum((tiles + 31) // 32, 4)
        part_tiles = tl.where(tiles <= 8, 8, part_tiles)  # a short sequence stays whole
        parts = (lens + part_tiles * 64 - 1) // (part_tiles * 64)
        pieces = tl.maximum(tl.minimum(parts, (lens + chunk - 1) // chunk), 1)
        at_once = tl.maximum((parts + pieces - 1) // pieces, 1)
        pieces = (parts + at_once - 1) // at_once
        pieces_end = num_pieces + tl.cumsum(pieces, axis=0)
        before = pieces_end <= piece
        seq += tl.sum(before.to(tl.int32), axis=0)
        first_piece = tl.maximum(first_piece, tl.max(tl.where(before, pieces_end, 0), axis=0))
        num_pieces = tl.max(pieces_end, axis=0)
    if piece >= num_pieces:
        return

    seq_len = tl.load(seq_lens_ptr + seq)
    tiles = (seq_len + 63) // 64
    part_tiles = tl.maximum((tiles + 31) // 32, 4)
    part_tiles = tl.where(tiles <= 8, 8, part_tiles)  # a short sequence stays whole
    parts = (seq_len + part_tiles * 64 - 1) // (part_tiles * 64)
    pieces = tl.maximum(tl.minimum(parts, (seq_len + chunk - 1) // chunk), 1)
    at_once = tl.maximum((parts + pieces - 1) // pieces, 1)
    pieces = (parts + at_once - 1) // at_once
    num_parts = parts  # of my sequence
    first_part = (piece - first_piece) * at_once
    end_part = tl.minimum(first_part + at_once, num_parts)
    part = first_part
    part_len = part_tiles * 64
    begin = first_part * part_len
    end = tl.minimum(end_part * part_len, seq_len)

    kv_head = head_program
    heads_base = kv_head * 4
    rows = tl.arange(0, 16)
    row_ok = rows < 4
    q_heads = heads_base + rows
    col0 = tl.arange(0, 128)
    tokens = tl.arange(0, 64)
    pages = tl.arange(0, 4)
    slots = tl.arange(0, 16)
    scores_scale = qk_scale
    k_block, k_token = k_stride_block, k_stride_token
    v_block, v_token = v_stride_block, v_stride_token
    k_base = k_ptr + kv_head.to(tl.int64) * k_stride_head
    v_base = v_ptr + kv_head.to(tl.int64) * v_stride_head
    first_slot = head_program.to(tl.int64) * (num_seqs * 32)
    lse_slots_ptr = partial_lse_ptr + first_slot * 4
    part_slots_ptr = partial_ptr + first_slot * 512

    table_ptr = block_table_ptr + seq.to(tl.int64) * block_table_stride
    last_page = (seq_len - 1) // 16
    ids = tl.load(table_ptr + tl.minimum(begin // 16 + pages, last_page))  # [4]
    q_base = q_ptr + seq.to(tl.int64) * q_stride_seq + q_heads.to(tl.int64) * q_stride_head
    q_ptrs = q_base[:, None] + col0[None, :]
    q_0 = tl.load(q_ptrs, mask=row_ok[:, None], other=0.0)  # [16, 128]
    scale = scores_scale
    m = tl.full([16], float("-inf"), tl.float32)
    l = tl.zeros([16], tl.float32)
    acc_0 = tl.zeros([16, 128], tl.float32)
    part_end = begin + part_len
    full_end = begin + (end - begin) // 64 * 64
    for pos in tl.range(begin, full_end, 64, num_stages=3):
        next_ids = tl.load(table_ptr + tl.minimum((pos + 64) // 16 + pages, last_page))  # [4]
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs)  # [128, 64]
        s = tl.dot(q_0, k0)  # [16, 64]
        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        p = p.to(tl.float16)
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + col0[None, :]
        v0 = tl.load(v_ptrs)  # [64, 128]
        acc_0 = tl.dot(p, v0, acc_0 * alpha[:, None])
        ids = next_ids

        if (pos + 64 == part_end) & (part_end < end):
            done_l = l
            # Where the part goes is one number, and rows and columns beside it 32-bit ones: 64-bit addresses of every element,
            # kept through the loop, took all of a thread's registers.
            done_slot = (seq.to(tl.int64) * 32 + part) * 4
            tl.store(lse_slots_ptr + done_slot + rows, m + tl.log2(done_l), mask=row_ok)
            done_factor = (1.0 / done_l)[:, None]
            done_ptrs = (part_slots_ptr + done_slot * 128) + (rows[:, None] * 128 + col0[None, :])
            tl.store(done_ptrs, acc_0 * done_factor, mask=row_ok[:, None])
            part += 1
            part_end += part_len
            m = tl.full([16], float("-inf"), tl.float32)
    if full_end < end:
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        live = full_end + tokens < end
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs, mask=live[None, :], other=0)  # [128, 64]
        s = tl.dot(q_0, k0)  # [16, 64]
        s = tl.where(live[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale - m_new[:, None])
        l = l * alpha + tl.sum(p, axis=1)
        p = p.to(tl.float16)
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + col0[None, :]
        v0 = tl.load(v_ptrs, mask=live[:, None], other=0)  # [64, 128]
        acc_0 = tl.dot(p, v0, acc_0 * alpha[:, None])

    gdc_launch_dependents()  # the next kernel may start: what is left here is merging
    lse = m + tl.log2(l)  # base 2
    acc_0 = acc_0 * (1.0 / l)[:, None]

    out_base = out_ptr + seq.to(tl.int64) * out_stride_seq + heads_base.to(tl.int64) * out_stride_head
    if num_parts == 1:
        row_out = out_base + rows.to(tl.int64) * out_stride_head
        out_0 = acc_0.to(tl.float16)
        tl.store(row_out[:, None] + col0[None, :], out_0, mask=row_ok[:, None])
    else:
        # leave my part; the last program of this sequence to arrive merges them all
        my_rows = (seq.to(tl.int64) * 32 + part) * 4 + rows
        tl.store(lse_slots_ptr + my_rows, lse, mask=row_ok)
        my_ptrs = part_slots_ptr + my_rows[:, None] * 128 + col0[None, :]
        tl.store(my_ptrs, acc_0, mask=row_ok[:, None])
        counter = counter_ptr + head_program * num_seqs + seq
        tl.debug_barrier()  # every thread's stores come before the release below
        if tl.atomic_add(counter, end_part - first_part, sem="acq_rel") == num_parts - (end_part - first_part):
            tl.store(counter, 0)  # ready for the next call
            row = tl.arange(0, 4)
            dim = tl.arange(0, 128)
            merge_part = tl.arange(0, 8)
            merged_m = tl.full([4], -1e30, tl.float32)
            merged_l = tl.zeros([4], tl.float32)
            merged = tl.zeros([4, 128], tl.float32)
            for base in range(0, num_parts, 8):
                others = base + merge_part
                part_rows = (seq.to(tl.int64) * 32 + others)[:, None] * 4 + row[None, :]  # [8, 4]
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
