"""decode-h80-q71-kv1-b16-bf16-kvf8e4m3-headscale-lse for sm_80

schedule: columnspieces-fp8_decodebits-max_regs0-merge32-num_stages3-num_warps4-pdl0-rows128-seq_lanes128-splitpieces-sumsdot-tile64-waves4 (triton-decode, pagedgen 0.1.0)

Decode: one query token a sequence against its paged keys and values. A program takes one piece (a run of tokens)
of one sequence and the 71 query heads that share a KV head; pieces of a long sequence leave partial results, and the
program that finishes last merges them.

    q, out       [num_seqs, 71, 80] bf16
    k, v         [num_blocks, 16, 1, 80] fp8_e4m3, any strides but the last (1)
    block_table  [num_seqs, max_blocks] int32      seq_lens [num_seqs] int32
    piece        a run of tokens of one sequence, worked on 64 tokens at a time
    word         two fp8 neighbours along head_dim, read as one uint16 and decoded to an even and an odd half
    m, l, acc    running maximum (base 2), sum and weighted values of the softmax
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
def paged_decode(
    q_ptr,
    k_ptr,
    v_ptr,
    block_table_ptr,
    seq_lens_ptr,
    out_ptr,
    lse_ptr,
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
    head_program = tl.program_id(0) % 1  # neighbours read other heads of the same tokens, near in memory
    program = tl.program_id(0) // 1
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
        pieces_end = num_pieces + tl.cumsum((lens + chunk - 1) // chunk, axis=0)
        before = pieces_end <= piece
        seq += tl.sum(before.to(tl.int32), axis=0)
        first_piece = tl.maximum(first_piece, tl.max(tl.where(before, pieces_end, 0), axis=0))
        num_pieces = tl.max(pieces_end, axis=0)
    if piece >= num_pieces:
        return

    seq_len = tl.load(seq_lens_ptr + seq)
    num_parts = (seq_len + chunk - 1) // chunk  # pieces of my sequence
    part = piece - first_piece
    part_len = ((seq_len + num_parts - 1) // num_parts + 63) // 64 * 64
    begin = part * part_len
    end = tl.minimum(begin + part_len, seq_len)

    kv_head = head_program
    heads_base = kv_head * 71
    rows = tl.arange(0, 128)
    row_ok = rows < 71
    q_heads = heads_base + rows
    col0 = tl.arange(0, 32)
    dim0 = tl.arange(0, 64)  # the same columns of q and out
    col1 = 32 + tl.arange(0, 16)
    col1_ok = col1 < 40
    dim1 = 64 + tl.arange(0, 32)  # the same columns of q and out
    dim1_ok = dim1 < 80
    tokens = tl.arange(0, 64)
    pages = tl.arange(0, 4)
    slots = tl.arange(0, 16)
    scores_scale = qk_scale * tl.load(k_scale_ptr + kv_head) * 256.0  # decoding left K * 2^-8
    v_factor = tl.load(v_scale_ptr + kv_head) * 256.0
    k_block, k_token = k_stride_block // 2, k_stride_token // 2  # strides in words
    v_block, v_token = v_stride_block // 2, v_stride_token // 2
    k_base = (k_ptr + kv_head.to(tl.int64) * k_stride_head).to(tl.pointer_type(tl.uint16))
    v_base = (v_ptr + kv_head.to(tl.int64) * v_stride_head).to(tl.pointer_type(tl.uint16))
    first_slot = head_program.to(tl.int64) * (partitions + num_seqs)
    lse_slots_ptr = partial_lse_ptr + first_slot * 71
    part_slots_ptr = partial_ptr + first_slot * 5680

    table_ptr = block_table_ptr + seq.to(tl.int64) * block_table_stride
    last_page = (seq_len - 1) // 16
    ids = tl.load(table_ptr + tl.minimum(begin // 16 + pages, last_page))  # [4]
    q_base = q_ptr + seq.to(tl.int64) * q_stride_seq + q_heads.to(tl.int64) * q_stride_head
    q_ptrs = q_base[:, None] + dim0[None, :]
    q_0 = tl.load(q_ptrs, mask=row_ok[:, None], other=0.0)  # [128, 64]
    q_0_even, q_0_odd = tl.split(tl.reshape(q_0, [128, 32, 2]))
    q_ptrs = q_base[:, None] + dim1[None, :]
    q_1 = tl.load(q_ptrs, mask=row_ok[:, None] & dim1_ok[None, :], other=0.0)  # [128, 32]
    q_1_even, q_1_odd = tl.split(tl.reshape(q_1, [128, 16, 2]))
    # bfloat16 queries meet float16 values: scale each row by a power of two so that float16 holds it
    q_max = tl.full([128], 1e-30, tl.float32)
    q_max = tl.maximum(q_max, tl.max(tl.abs(q_0_even), axis=1).to(tl.float32))
    q_max = tl.maximum(q_max, tl.max(tl.abs(q_0_odd), axis=1).to(tl.float32))
    q_max = tl.maximum(q_max, tl.max(tl.abs(q_1_even), axis=1).to(tl.float32))
    q_max = tl.maximum(q_max, tl.max(tl.abs(q_1_odd), axis=1).to(tl.float32))
    q_unit = tl.exp2(tl.floor(tl.log2(q_max)))  # [128]
    q_0_even = (q_0_even / q_unit[:, None]).to(tl.float16)
    q_0_odd = (q_0_odd / q_unit[:, None]).to(tl.float16)
    q_1_even = (q_1_even / q_unit[:, None]).to(tl.float16)
    q_1_odd = (q_1_odd / q_unit[:, None]).to(tl.float16)
    scale = scores_scale * q_unit
    m = tl.full([128], float("-inf"), tl.float32)
    l = tl.zeros([128, 16], tl.float32)
    ones = tl.full([64, 16], 1.0, tl.float16)
    acc_0_even = tl.zeros([128, 32], tl.float32)
    acc_0_odd = tl.zeros([128, 32], tl.float32)
    acc_1_even = tl.zeros([128, 16], tl.float32)
    acc_1_odd = tl.zeros([128, 16], tl.float32)
    full_end = begin + (end - begin) // 64 * 64
    for pos in tl.range(begin, full_end, 64, num_stages=3):
        next_ids = tl.load(table_ptr + tl.minimum((pos + 64) // 16 + pages, last_page))  # [4]
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
        s = tl.dot(q_0_even, k0_even)  # [128, 64]
        s = tl.dot(q_0_odd, k0_odd, s)
        s = tl.dot(q_1_even, k1_even, s)
        s = tl.dot(q_1_odd, k1_odd, s)
        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale[:, None] - m_new[:, None])
        p = p.to(tl.float16)
        l = tl.dot(p, ones, l * alpha[:, None])  # every column is the sum
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + col0[None, :]
        v0 = tl.load(v_ptrs)  # [64, 32]
        v_ptrs = v_base + v_rows[:, None] + col1[None, :]
        v1 = tl.load(v_ptrs, mask=col1_ok[None, :], other=0)  # [64, 16]
        v0_even, v0_odd = decode_fp8_pair(v0)
        v1_even, v1_odd = decode_fp8_pair(v1)
        acc_0_even = tl.dot(p, v0_even, acc_0_even * alpha[:, None])
        acc_0_odd = tl.dot(p, v0_odd, acc_0_odd * alpha[:, None])
        acc_1_even = tl.dot(p, v1_even, acc_1_even * alpha[:, None])
        acc_1_odd = tl.dot(p, v1_odd, acc_1_odd * alpha[:, None])
        ids = next_ids

    if full_end < end:
        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        live = full_end + tokens < end
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs, mask=live[None, :], other=0)  # [32, 64]
        k_ptrs = k_base + col1[:, None] + k_rows[None, :]
        k1 = tl.load(k_ptrs, mask=live[None, :] & col1_ok[:, None], other=0)  # [16, 64]
        k0_even, k0_odd = decode_fp8_pair(k0)
        k1_even, k1_odd = decode_fp8_pair(k1)
        s = tl.dot(q_0_even, k0_even)  # [128, 64]
        s = tl.dot(q_0_odd, k0_odd, s)
        s = tl.dot(q_1_even, k1_even, s)
        s = tl.dot(q_1_odd, k1_odd, s)
        s = tl.where(live[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale[:, None] - m_new[:, None])
        p = p.to(tl.float16)
        l = tl.dot(p, ones, l * alpha[:, None])  # every column is the sum
        m = m_new
        v_ptrs = v_base + v_rows[:, None] + col0[None, :]
        v0 = tl.load(v_ptrs, mask=live[:, None], other=0)  # [64, 32]
        v_ptrs = v_base + v_rows[:, None] + col1[None, :]
        v1 = tl.load(v_ptrs, mask=live[:, None] & col1_ok[None, :], other=0)  # [64, 16]
        v0_even, v0_odd = decode_fp8_pair(v0)
        v1_even, v1_odd = decode_fp8_pair(v1)
        acc_0_even = tl.dot(p, v0_even, acc_0_even * alpha[:, None])
        acc_0_odd = tl.dot(p, v0_odd, acc_0_odd * alpha[:, None])
        acc_1_even = tl.dot(p, v1_even, acc_1_even * alpha[:, None])
        acc_1_odd = tl.dot(p, v1_odd, acc_1_odd * alpha[:, None])

    l = tl.max(l, axis=1)
    lse = m + tl.log2(l)  # base 2
    acc_0_even = acc_0_even * (v_factor / l)[:, None]
    acc_0_odd = acc_0_odd * (v_factor / l)[:, None]
    acc_1_even = acc_1_even * (v_factor / l)[:, None]
    acc_1_odd = acc_1_odd * (v_factor / l)[:, None]

    out_base = out_ptr + seq.to(tl.int64) * out_stride_seq + heads_base.to(tl.int64) * out_stride_head
    lse_base = lse_ptr + seq.to(tl.int64) * 71 + heads_base
    acc_0 = tl.reshape(tl.join(acc_0_even, acc_0_odd), [128, 64])
    acc_1 = tl.reshape(tl.join(acc_1_even, acc_1_odd), [128, 32])
    if num_parts == 1:
        row_out = out_base + rows.to(tl.int64) * out_stride_head
        out_0 = acc_0.to(tl.bfloat16)
        tl.store(row_out[:, None] + dim0[None, :], out_0, mask=row_ok[:, None])
        out_1 = acc_1.to(tl.bfloat16)
        tl.store(row_out[:, None] + dim1[None, :], out_1, mask=row_ok[:, None] & dim1_ok[None, :])
        tl.store(lse_base + rows, lse * 0.6931471805599453, mask=row_ok)
    else:
        # leave my part; the last program of this sequence to arrive merges them all
        my_rows = (first_piece + part) * 71 + rows
        tl.store(lse_slots_ptr + my_rows, lse, mask=row_ok)
        my_ptrs = part_slots_ptr + my_rows[:, None] * 80 + dim0[None, :]
        tl.store(my_ptrs, acc_0, mask=row_ok[:, None])
        my_ptrs = part_slots_ptr + my_rows[:, None] * 80 + dim1[None, :]
        tl.store(my_ptrs, acc_1, mask=row_ok[:, None] & dim1_ok[None, :])
        counter = counter_ptr + head_program * num_seqs + seq
        tl.debug_barrier()  # every thread's stores come before the release below
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1:
            tl.store(counter, 0)  # ready for the next call
            row = tl.arange(0, 128)
            dim = tl.arange(0, 128)
            merge_part = tl.arange(0, 1)
            merged_m = tl.full([128], -1e30, tl.float32)
            merged_l = tl.zeros([128], tl.float32)
            merged = tl.zeros([128, 128], tl.float32)
            for base in range(0, num_parts, 1):
                others = base + merge_part
                part_rows = (first_piece + others)[:, None] * 71 + row[None, :]  # [1, 128]
                ok = (others < num_parts)[:, None] & (row < 71)[None, :]
                part_lse = tl.load(lse_slots_ptr + part_rows, mask=ok, other=float("-inf"), cache_modifier=".cg")
                part_ptrs = part_slots_ptr + part_rows[:, :, None] * 80 + dim[None, None, :]
                part_ok = ok[:, :, None] & (dim < 80)[None, None, :]
                part_out = tl.load(part_ptrs, mask=part_ok, other=0.0, cache_modifier=".cg")
                m_new = tl.maximum(merged_m, tl.max(part_lse, axis=0))
                weight = tl.exp2(part_lse - m_new[None, :])
                shrink = tl.exp2(merged_m - m_new)
                merged_l = merged_l * shrink + tl.sum(weight, axis=0)
                merged = merged * shrink[:, None] + tl.sum(part_out * weight[:, :, None], axis=0)
                merged_m = m_new
            merged = merged / merged_l[:, None]
            merged_lse = merged_m + tl.log2(merged_l)  # [128]
            live = row < 71
            merged_ptrs = out_base + row.to(tl.int64)[:, None] * out_stride_head + dim[None, :]
            ok = live[:, None] & (dim < 80)[None, :]
            tl.store(merged_ptrs, merged.to(tl.bfloat16), mask=ok)
            tl.store(lse_base + row, merged_lse * 0.6931471805599453, mask=live)
