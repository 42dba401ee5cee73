"""verify-h80-q28-kv4-b16-bf16-kvf8e4m3-headscale-lse-cap50.0-tree for sm_80

schedule: fp8_decodebits-merge32-num_stages3-num_warps4-seq_lanes128-tile64-tile_m64-waves2 (triton-verify, pagedgen 0.1.0)

Verify: a few queries a sequence, its last tokens, against its paged keys and values, each seeing the queries of its mask. A
program takes one piece (a run of tokens) of one sequence and one tile of 64 rows of one KV head; a row is one query
and one of the 7 query heads that share the KV head. Pieces of a long sequence leave partial results, and the
program that finishes last merges them.

    q, out        [num_tokens, 28, 80] bf16
    k, v          [num_blocks, 16, 4, 80] fp8_e4m3, any strides but the last (1)
    block_table   [num_seqs, max_blocks] int32      seq_lens [num_seqs] int32
    cu_seqlens_q  [num_seqs + 1] int32: queries of sequence s are q[cu_seqlens_q[s] : cu_seqlens_q[s + 1]]
    tree_mask     [num_tokens] int64: bit j, this query sees query j of its sequence
    piece         a run of tokens of one sequence, worked on 64 tokens at a time
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
def paged_verify(
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
    tree_mask_ptr,
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
    kv_head = tl.program_id(0) % 4  # neighbours read other heads of the same tokens, near in memory
    program = tl.program_id(0) // 4
    lanes = tl.arange(0, 128)
    total = tl.zeros([], tl.int64)  # KV tokens of all query tiles
    for base in range(0, num_seqs, 128):
        ok = base + lanes < num_seqs
        lens = tl.load(seq_lens_ptr + base + lanes, mask=ok, other=0)
        q_lens = tl.load(cu_seqlens_q_ptr + base + lanes + 1, mask=ok, other=0)
        q_lens = tl.maximum(q_lens - tl.load(cu_seqlens_q_ptr + base + lanes, mask=ok, other=0), 0)
        tiles = (q_lens * 7 + 63) // 64
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
        tiles = (q_lens * 7 + 63) // 64
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
    num_tiles = (q_len * 7 + 63) // 64
    num_parts = (seq_len + chunk - 1) // chunk  # pieces of my query tile
    part = (program - first_program) // num_tiles
    q_tile = (program - first_program) % num_tiles
    first_piece = seq_slot + q_tile * num_parts  # where my query tile's partial results begin
    part_len = ((seq_len + num_parts - 1) // num_parts + 63) // 64 * 64
    begin = part * part_len
    end = tl.minimum(begin + part_len, seq_len)

    rows = tl.arange(0, 64)
    my_rows = q_tile * 64 + rows
    queries = my_rows // 7  # of the sequence
    context = seq_len - q_len  # tokens that every query sees
    row_ok = (queries < q_len) & (context + queries >= 0)
    q_heads = kv_head * 7 + my_rows % 7
    q_tokens = (q_begin + queries).to(tl.int64)
    bits = tl.load(tree_mask_ptr + q_tokens, mask=row_ok, other=0)  # [64]
    bits |= tl.full([], 1, tl.int64) << tl.minimum(queries, 63).to(tl.int64)  # a query sees itself

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
    q0 = tl.load(q_ptrs, mask=row_ok[:, None], other=0.0)  # [64, 64]
    q0_even, q0_odd = tl.split(tl.reshape(q0, [64, 32, 2]))
    q_ptrs = q_base[:, None] + dim1[None, :]
    q1 = tl.load(q_ptrs, mask=row_ok[:, None] & dim1_ok[None, :], other=0.0)  # [64, 32]
    q1_even, q1_odd = tl.split(tl.reshape(q1, [64, 16, 2]))
    # bfloat16 queries meet float16 values: scale each row by a power of two so that float16 holds it
    q_max = tl.full([64], 1e-30, tl.float32)
    q_max = tl.maximum(q_max, tl.max(tl.abs(q0_even), axis=1).to(tl.float32))
    q_max = tl.maximum(q_max, tl.max(tl.abs(q0_odd), axis=1).to(tl.float32))
    q_max = tl.maximum(q_max, tl.max(tl.abs(q1_even), axis=1).to(tl.float32))
    q_max = tl.maximum(q_max, tl.max(tl.abs(q1_odd), axis=1).to(tl.float32))
    q_unit = tl.exp2(tl.floor(tl.log2(q_max)))  # [64]
    q0_even = (q0_even / q_unit[:, None]).to(tl.float16)
    q0_odd = (q0_odd / q_unit[:, None]).to(tl.float16)
    q1_even = (q1_even / q_unit[:, None]).to(tl.float16)
    q1_odd = (q1_odd / q_unit[:, None]).to(tl.float16)
    scale = scores_scale * q_unit
    cap_scale = scale * 0.04

    m = tl.full([64], -1e30, tl.float32)  # finite: a row may see nothing of its piece
    l = tl.zeros([64], tl.float32)
    acc0_even = tl.zeros([64, 32], tl.float32)
    acc0_odd = tl.zeros([64, 32], tl.float32)
    acc1_even = tl.zeros([64, 16], tl.float32)
    acc1_odd = tl.zeros([64, 16], tl.float32)
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
        k0 = tl.load(k_ptrs)  # [32, 64]
        k_ptrs = k_base + col1[:, None] + k_rows[None, :]
        k1 = tl.load(k_ptrs, mask=col1_ok[:, None], other=0)  # [16, 64]
        k0_even, k0_odd = decode_fp8_pair(k0)
        k1_even, k1_odd = decode_fp8_pair(k1)
        s = tl.dot(q0_even, k0_even)  # [64, 64]
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
        ids = next_ids
    for pos in tl.range(full_end, end, 64, num_stages=3):
        next_ids = tl.load(table_ptr + tl.minimum((pos + 64) // 16 + pages, last_page))  # [4]

        k_rows = (ids.to(tl.int64) * k_block)[:, None] + (slots * k_token)[None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [64]), 8)
        v_rows = (ids.to(tl.int64) * v_block)[:, None] + (slots * v_token)[None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [64]), 8)
        live = pos + tokens < end
        k_ptrs = k_base + col0[:, None] + k_rows[None, :]
        k0 = tl.load(k_ptrs, mask=live[None, :], other=0)  # [32, 64]
        k_ptrs = k_base + col1[:, None] + k_rows[None, :]
        k1 = tl.load(k_ptrs, mask=live[None, :] & col1_ok[:, None], other=0)  # [16, 64]
        k0_even, k0_odd = decode_fp8_pair(k0)
        k1_even, k1_odd = decode_fp8_pair(k1)
        s = tl.dot(q0_even, k0_even)  # [64, 64]
        s = tl.dot(q0_odd, k0_odd, s)
        s = tl.dot(q1_even, k1_even, s)
        s = tl.dot(q1_odd, k1_odd, s)
        s = 72.13475204444816 - 144.26950408889633 / (1.0 + tl.exp2(s * cap_scale[:, None]))
        query = pos + tokens[None, :] - context  # [1, 64], below 0 before the queries
        visible = ((bits[:, None] >> tl.minimum(tl.maximum(query, 0), 63).to(tl.int64)) & 1) == 1
        visible = ((query < 0) | visible) & live[None, :]
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
        ids = next_ids

    lse = m + tl.log2(l)  # base 2; -inf where a row saw nothing
    factor = tl.where(l > 0, v_factor / l, 0.0)
    acc0_even = acc0_even * factor[:, None]
    acc0_odd = acc0_odd * factor[:, None]
    acc0 = tl.reshape(tl.join(acc0_even, acc0_odd), [64, 64])
    acc1_even = acc1_even * factor[:, None]
    acc1_odd = acc1_odd * factor[:, None]
    acc1 = tl.reshape(tl.join(acc1_even, acc1_odd), [64, 32])
    if num_parts == 1:
        out_base = out_ptr + q_tokens * out_stride_token + q_heads.to(tl.int64) * out_stride_head
        out0 = acc0.to(tl.bfloat16)
        tl.store(out_base[:, None] + dim0[None, :], out0, mask=row_ok[:, None])
        out1 = acc1.to(tl.bfloat16)
        tl.store(out_base[:, None] + dim1[None, :], out1, mask=row_ok[:, None] & dim1_ok[None, :])
        tl.store(lse_ptr + q_tokens * 28 + q_heads, lse * 0.6931471805599453, mask=row_ok)
    else:
        # leave my part; the last program of this query tile to arrive merges them all
        head_slot = kv_head.to(tl.int64) * (2 * partitions)
        lse_slots_ptr = partial_lse_ptr + head_slot * 64
        part_slots_ptr = partial_ptr + head_slot * 5120
        slot_rows = (first_piece + part) * 64 + rows
        tl.store(lse_slots_ptr + slot_rows, lse)
        my_ptrs = part_slots_ptr + slot_rows[:, None] * 80 + dim0[None, :]
        tl.store(my_ptrs, acc0)
        my_ptrs = part_slots_ptr + slot_rows[:, None] * 80 + dim1[None, :]
        tl.store(my_ptrs, acc1, mask=dim1_ok[None, :])
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
            merged_lse = merged_m + tl.log2(merged_l)  # [64]
            my_rows = q_tile * 64 + row
            queries = my_rows // 7
            live = (queries < q_len) & (context + queries >= 0)
            q_heads = kv_head * 7 + my_rows % 7
            q_tokens = (q_begin + queries).to(tl.int64)
            merged_base = out_ptr + q_tokens * out_stride_token + q_heads.to(tl.int64) * out_stride_head
            ok = live[:, None] & (dim < 80)[None, :]
            tl.store(merged_base[:, None] + dim[None, :], merged.to(tl.bfloat16), mask=ok)
            tl.store(lse_ptr + q_tokens * 28 + q_heads, merged_lse * 0.6931471805599453, mask=live)
