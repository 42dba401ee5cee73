"""decode-h128-q32-kv8-b16-f16-kvf8e4m3-lse-window4096 for sm_90

schedule: columnspieces-fp8_decodecvt-max_regs0-merge32-num_stages3-num_warps4-pdl1-rows16-seq_lanes128-splitcluster-sumsdot-tile128-waves1 (triton-decode, pagedgen 0.1.0)

Decode: one query token a sequence against its paged keys and values. A program takes one piece (a run of tokens)
of one sequence and the 4 query heads that share a KV head; the programs of a cluster share a sequence, send each other
partial results, and merge a part of head_dim each.

    q, out       [num_seqs, 32, 128] f16
    k, v         [num_blocks, 16, 8, 128] fp8_e4m3, any strides but the last (1)
    block_table  [num_seqs, max_blocks] int32      seq_lens [num_seqs] int32
    piece        a run of tokens of one sequence, worked on 128 tokens at a time
    word         two fp8 neighbours along head_dim, read as one uint16 and decoded to an even and an odd half
    m, l, acc    running maximum (base 2), sum and weighted values of the softmax
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


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
def make_box():
    """Where in shared memory results are sent to, the same in each program of a cluster."""
    return tl.inline_asm_elementwise(
        ".shared .align 1024 .b8 box[9216]; mov.u32 $0, box;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def say_begun():
    """Tell the cluster that this program has begun."""
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.relaxed.aligned; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def say_sent():
    """Tell the cluster that all that this thread sends has been sent."""
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def hear_all():
    """Wait until every thread of the cluster has said so; what it had sent by then is here."""
    tl.inline_asm_elementwise(
        "barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def send(values, to, at, ok):
    """Store float32 values at addresses of the shared memory of programs of the cluster."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred wanted;
        .reg .b32 there;
        setp.ne.b32 wanted, $4, 0;
        @wanted mapa.shared::cluster.u32 there, $3, $2;
        @wanted st.shared::cluster.b32 [there], $1;
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,r",
        [values.to(tl.int32, bitcast=True), to, at, ok.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def receive(at):
    """float32 values at addresses of this program's shared memory."""
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1
    ).to(tl.float32, bitcast=True)


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
    box = make_box()
    say_begun()
    gdc_wait()  # nothing is read or written before the kernel before this one is done
    program = tl.program_id(0) // 8  # neighbours make a cluster, and share a sequence
    head_program = program % 8
    seq = program // 8
    part = tl.program_id(0) % 8
    seq_len = tl.load(seq_lens_ptr + seq)
    skipped = tl.maximum(seq_len - 4096, 0) // 128 * 128
    if seq_len <= 0:
        return

    part_len = (seq_len - skipped + 1023) // 1024 * 128
    begin = skipped + part * part_len
    end = tl.maximum(tl.minimum(begin + part_len, seq_len), begin)  # of a short sequence, some have nothing

    kv_head = head_program
    heads_base = kv_head * 4
    rows = tl.arange(0, 16)
    row_ok = rows < 4
    q_heads = heads_base + rows
    col0 = tl.arange(0, 64)
    dim0 = tl.arange(0, 128)  # the same columns of q and out
    tokens = (tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :])
    pages = (tl.arange(0, 4)[:, None] * 2 + tl.arange(0, 2)[None, :])
    slots = tl.arange(0, 16)
    scores_scale = qk_scale * tl.load(k_scale_ptr)
    v_factor = tl.load(v_scale_ptr)
    k_block, k_token = k_stride_block // 2, k_stride_token // 2  # strides in words
    v_block, v_token = v_stride_block // 2, v_stride_token // 2
    k_base = (k_ptr + kv_head.to(tl.int64) * k_stride_head).to(tl.pointer_type(tl.uint16))
    v_base = (v_ptr + kv_head.to(tl.int64) * v_stride_head).to(tl.pointer_type(tl.uint16))

    table_ptr = block_table_ptr + seq.to(tl.int64) * block_table_stride
    last_page = (seq_len - 1) // 16
    ids = tl.load(table_ptr + tl.minimum(begin // 16 + pages, last_page))  # [8]
    q_base = q_ptr + seq.to(tl.int64) * q_stride_seq + q_heads.to(tl.int64) * q_stride_head
    q_ptrs = q_base[:, None] + dim0[None, :]
    q_0 = tl.load(q_ptrs, mask=row_ok[:, None], other=0.0)  # [16, 128]
    q_0_even, q_0_odd = tl.split(tl.reshape(q_0, [16, 64, 2]))
    scale = scores_scale
    q_0_even = tl.broadcast_to(q_0_even[None, :, :], [4, 16, 64])
    q_0_odd = tl.broadcast_to(q_0_odd[None, :, :], [4, 16, 64])
    m = tl.full([4, 16], -1e30, tl.float32)  # not -inf: a warp may have no token
    l = tl.zeros([4, 16, 16], tl.float32)
    ones = tl.full([4, 32, 16], 1.0, tl.float16)
    acc_0_even = tl.zeros([4, 16, 64], tl.float32)
    acc_0_odd = tl.zeros([4, 16, 64], tl.float32)
    window_begin = tl.maximum(seq_len - 1 - 4095, 0)
    if begin < window_begin:  # inside my first tile
        k_rows = (ids.to(tl.int64) * k_block)[:, :, None] + (slots * k_token)[None, None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [4, 32]), [8, 8])
        v_rows = (ids.to(tl.int64) * v_block)[:, :, None] + (slots * v_token)[None, None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [4, 32]), [8, 8])
        live = (begin + tokens >= window_begin) & (begin + tokens < end)
        k_ptrs = k_base + col0[None, :, None] + k_rows[:, None, :]
        k_ptrs = tl.max_contiguous(tl.multiple_of(k_ptrs, [16, 16, 16]), [1, 64, 2])
        k0 = tl.load(k_ptrs, mask=live[:, None, :], other=0)  # [4, 64, 32]
        k0_even, k0_odd = decode_fp8_pair(k0)
        s = tl.dot(q_0_even, k0_even)  # [4, 16, 32]
        s = tl.dot(q_0_odd, k0_odd, s)
        s = tl.where(live[:, None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=2) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale - m_new[:, :, None])
        p = p.to(tl.float16)
        l = tl.dot(p, ones, l * alpha[:, :, None])  # every column is the sum
        m = m_new
        v_ptrs = v_base + v_rows[:, :, None] + col0[None, None, :]
        v_ptrs = tl.max_contiguous(tl.multiple_of(v_ptrs, [16, 16, 16]), [1, 2, 64])
        v0 = tl.load(v_ptrs, mask=live[:, :, None], other=0)  # [4, 32, 64]
        v0_even, v0_odd = decode_fp8_pair(v0)
        acc_0_even = tl.dot(p, v0_even, acc_0_even * alpha[:, :, None])
        acc_0_odd = tl.dot(p, v0_odd, acc_0_odd * alpha[:, :, None])

        begin = tl.minimum(begin + 128, end)
        ids = tl.load(table_ptr + tl.minimum(begin // 16 + pages, last_page))  # [8]
    full_end = begin + (end - begin) // 128 * 128
    for pos in tl.range(begin, full_end, 128, num_stages=3):
        next_ids = tl.load(table_ptr + tl.minimum((pos + 128) // 16 + pages, last_page))  # [8]
        k_rows = (ids.to(tl.int64) * k_block)[:, :, None] + (slots * k_token)[None, None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [4, 32]), [8, 8])
        v_rows = (ids.to(tl.int64) * v_block)[:, :, None] + (slots * v_token)[None, None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [4, 32]), [8, 8])
        k_ptrs = k_base + col0[None, :, None] + k_rows[:, None, :]
        k_ptrs = tl.max_contiguous(tl.multiple_of(k_ptrs, [16, 16, 16]), [1, 64, 2])
        k0 = tl.load(k_ptrs)  # [4, 64, 32]
        k0_even, k0_odd = decode_fp8_pair(k0)
        s = tl.dot(q_0_even, k0_even)  # [4, 16, 32]
        s = tl.dot(q_0_odd, k0_odd, s)
        m_new = tl.maximum(m, tl.max(s, axis=2) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale - m_new[:, :, None])
        p = p.to(tl.float16)
        l = tl.dot(p, ones, l * alpha[:, :, None])  # every column is the sum
        m = m_new
        v_ptrs = v_base + v_rows[:, :, None] + col0[None, None, :]
        v_ptrs = tl.max_contiguous(tl.multiple_of(v_ptrs, [16, 16, 16]), [1, 2, 64])
        v0 = tl.load(v_ptrs)  # [4, 32, 64]
        v0_even, v0_odd = decode_fp8_pair(v0)
        acc_0_even = tl.dot(p, v0_even, acc_0_even * alpha[:, :, None])
        acc_0_odd = tl.dot(p, v0_odd, acc_0_odd * alpha[:, :, None])
        ids = next_ids

    if full_end < end:
        k_rows = (ids.to(tl.int64) * k_block)[:, :, None] + (slots * k_token)[None, None, :]
        k_rows = tl.multiple_of(tl.reshape(k_rows, [4, 32]), [8, 8])
        v_rows = (ids.to(tl.int64) * v_block)[:, :, None] + (slots * v_token)[None, None, :]
        v_rows = tl.multiple_of(tl.reshape(v_rows, [4, 32]), [8, 8])
        live = (full_end + tokens >= window_begin) & (full_end + tokens < end)
        k_ptrs = k_base + col0[None, :, None] + k_rows[:, None, :]
        k_ptrs = tl.max_contiguous(tl.multiple_of(k_ptrs, [16, 16, 16]), [1, 64, 2])
        k0 = tl.load(k_ptrs, mask=live[:, None, :], other=0)  # [4, 64, 32]
        k0_even, k0_odd = decode_fp8_pair(k0)
        s = tl.dot(q_0_even, k0_even)  # [4, 16, 32]
        s = tl.dot(q_0_odd, k0_odd, s)
        s = tl.where(live[:, None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=2) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(s * scale - m_new[:, :, None])
        p = p.to(tl.float16)
        l = tl.dot(p, ones, l * alpha[:, :, None])  # every column is the sum
        m = m_new
        v_ptrs = v_base + v_rows[:, :, None] + col0[None, None, :]
        v_ptrs = tl.max_contiguous(tl.multiple_of(v_ptrs, [16, 16, 16]), [1, 2, 64])
        v0 = tl.load(v_ptrs, mask=live[:, :, None], other=0)  # [4, 32, 64]
        v0_even, v0_odd = decode_fp8_pair(v0)
        acc_0_even = tl.dot(p, v0_even, acc_0_even * alpha[:, :, None])
        acc_0_odd = tl.dot(p, v0_odd, acc_0_odd * alpha[:, :, None])

    l = tl.max(l, axis=2)
    gdc_launch_dependents()  # the next kernel may start: what is left here is merging
    hear_all()  # that all have begun: their shared memory is there
    source_rows = (part * 4 + tl.arange(0, 4))[:, None] * 4 + rows[None, :]  # [4, 16]
    columns = 2 * col0
    at = box + 4 * (source_rows[:, :, None] * 16 + (columns % 16)[None, None, :])
    to = tl.zeros_like(at) + (columns // 16)[None, None, :]
    ok = (at >= 0) & row_ok[None, :, None]
    send(acc_0_even, to, at, ok)
    columns = 2 * col0 + 1
    at = box + 4 * (source_rows[:, :, None] * 16 + (columns % 16)[None, None, :])
    to = tl.zeros_like(at) + (columns // 16)[None, None, :]
    ok = (at >= 0) & row_ok[None, :, None]
    send(acc_0_odd, to, at, ok)
    to = tl.zeros([4, 16, 8], tl.int32) + tl.arange(0, 8)[None, None, :]  # all of them
    at = tl.zeros_like(to) + box + 8192 + 4 * source_rows[:, :, None]
    ok = (at >= 0) & row_ok[None, :, None]
    send(tl.broadcast_to(m[:, :, None], [4, 16, 8]), to, at, ok)
    send(tl.broadcast_to(l[:, :, None], [4, 16, 8]), to, at + 512, ok)
    say_sent()
    hear_all()

    source = tl.arange(0, 32)
    row = tl.arange(0, 4)
    column = tl.arange(0, 16)
    at = box + 4 * (source[:, None] * 4 + tl.minimum(row, 3)[None, :])  # [32, 4]
    all_m = receive(at + 8192)
    merged_m = tl.max(all_m, axis=0)
    weight = tl.exp2(all_m - merged_m[None, :])
    merged_l = tl.sum(receive(at + 8704) * weight, axis=0)
    at = source[:, None] * 4 + tl.minimum(row, 3)[None, :]
    at = box + 4 * (at[:, :, None] * 16 + tl.minimum(column, 15)[None, None, :])
    merged = tl.sum(receive(at) * weight[:, :, None], axis=0) * (v_factor / merged_l)[:, None]
    live = row < 4
    out_base = out_ptr + seq.to(tl.int64) * out_stride_seq + (heads_base + row).to(tl.int64) * out_stride_head
    ok = live[:, None]
    tl.store(out_base[:, None] + (part * 16 + column)[None, :], merged.to(tl.float16), mask=ok)
    if part == 0:
        lse_base = lse_ptr + seq.to(tl.int64) * 32 + heads_base
        tl.store(lse_base + row, (merged_m + tl.log2(merged_l)) * 0.6931471805599453, mask=live)
