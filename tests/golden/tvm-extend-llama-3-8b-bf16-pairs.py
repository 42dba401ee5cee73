# extend_7daf9e64_0455a6d6: paged attention of query tiles on a CPU, each of one sequence and one KV head
# spec      extend-h128-q32-kv8-b16-bf16
# schedule  blocks8-dotbf16-k_rows8-tile64-v_rows8-vectors3
# target    x86_64-avx512bf16; pagedgen 0.1.0
#
# row       a query token and one of the 4 query heads of the KV head: token * 4 + head, from the sequence's first
# block     48 rows, next to each other in 3 vectors; a query tile has 8 of them at most
# tile      64 tokens of K and V, which are converted and laid out once for all blocks of a query tile
# panel     8 tokens of K, 8 dims of V: what one register block reads next to each other
#
# Scores are computed with rows as lanes: s = K @ Q^T [tokens, rows] and o = V^T @ p [dims, rows]. So neither the softmax
# nor the products ever sum over lanes, and elements of K and V are broadcast.
# pair      two bf16 in an int32, for vdpbf16ps: dims d and d + 1 of q and K, tokens t and t + 1 of p and V

from tvm.script import ir as I, tirx as T

LLVM = """
define float @max_lanes(<16 x float> %x) alwaysinline nounwind {
  %m = call nnan float @llvm.vector.reduce.fmax.v16f32(<16 x float> %x)
  ret float %m
}
define float @sum_lanes(<16 x float> %x) alwaysinline nounwind {
  %s = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %x)
  ret float %s
}
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
define <16 x i32> @pack(<16 x float> %even, <16 x float> %odd) alwaysinline nounwind {
  %e = fptrunc <16 x float> %even to <16 x bfloat>
  %o = fptrunc <16 x float> %odd to <16 x bfloat>
  %a = bitcast <16 x bfloat> %e to <16 x i16>
  %b = bitcast <16 x bfloat> %o to <16 x i16>
  %ab = shufflevector <16 x i16> %a, <16 x i16> %b, <32 x i32> <i32 0, i32 16, i32 1, i32 17, i32 2, i32 18, i32 3, i32 19, i32 4, i32 20, i32 5, i32 21, i32 6, i32 22, i32 7, i32 23, i32 8, i32 24, i32 9, i32 25, i32 10, i32 26, i32 11, i32 27, i32 12, i32 28, i32 13, i32 29, i32 14, i32 30, i32 15, i32 31>
  %r = bitcast <32 x i16> %ab to <16 x i32>
  ret <16 x i32> %r
}
define <16 x float> @dot16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
"""
PAIR_TOKENS = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31]

# Which elements of two rows that are so many apart a stage of turning 16 x 16 elements takes.
LOW_1 = [0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30]
HIGH_1 = [1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31]
LOW_2 = [0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29]
HIGH_2 = [2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31]
LOW_4 = [0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27]
HIGH_4 = [4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31]
LOW_8 = [0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23]
HIGH_8 = [8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31]


@I.ir_module
class Extend:
    @T.prim_func(s_tir=True)
    def query_tile(
        q: T.handle("uint16"),  # of the sequence's first query and the KV head's first query head; so are out and lse
        k: T.handle("uint16"),  # of the KV head; so is v
        v: T.handle("uint16"),
        out: T.handle("uint16"),
        lse: T.handle("float32"),  # none
        sinks: T.handle("float32"),  # none
        block_table: T.handle("int32"),  # of the sequence
        q_packed: T.handle("int32"),  # scratch: Q^T of every block, [8, 64, 48]
        k_packed: T.handle("int32"),  # scratch: a tile of K, [64, 64]
        v_packed: T.handle("int32"),  # scratch: a tile of V, [16, 32, 8]
        sums_of_v: T.handle("float32"),  # scratch: sums of p * V of every block, [8, 128, 48]
        first_row: T.int32,
        num_rows: T.int32,  # at least 1
        first_position: T.int32,  # of the sequence's first query
        zeros_k: T.int64,  # offset from k, and from v, of a row of zeros: tokens that no row sees
        zeros_v: T.int64,
        q_stride_token: T.int64,
        q_stride_head: T.int64,
        out_stride_token: T.int64,
        out_stride_head: T.int64,
        k_stride_block: T.int64,
        k_stride_token: T.int64,
        k_stride_dim: T.int64,
        v_stride_block: T.int64,
        v_stride_token: T.int64,
        scale: T.float32,  # of scores, to base 2
        v_scale: T.float32,
    ):
        T.func_attr({"global_symbol": "extend_7daf9e64_0455a6d6_query_tile", "calling_conv": 3, "tirx.noalias": True})
        T.attr(T.int32(0), "pragma_import_llvm", LLVM)
        Q = T.decl_buffer((1,), "uint16", data=q)
        K = T.decl_buffer((1,), "uint16", data=k)
        V = T.decl_buffer((1,), "uint16", data=v)
        OUT = T.decl_buffer((1,), "uint16", data=out)
        TABLE = T.decl_buffer((1,), "int32", data=block_table)
        QS = T.decl_buffer((24576,), "int32", data=q_packed)
        KS = T.decl_buffer((4096,), "int32", data=k_packed)
        VS = T.decl_buffer((4096,), "int32", data=v_packed)
        O = T.decl_buffer((49152,), "float32", data=sums_of_v)
        at = T.alloc_local((384,), "int32")  # [384] positions of the rows
        q_row = T.alloc_local((384,), "int64")  # [384] offsets of the rows of q
        top = T.alloc_local((384,), "float32")  # [384] maximal scores
        sums = T.alloc_local((384,), "float32")  # [384] sums of p
        alpha = T.alloc_local((48,), "float32")  # [48] what a block's sums so far are scaled by
        s = T.alloc_local((3072,), "float32")  # [64, 48] scores of a block, then p
        p = T.alloc_local((1536,), "int32")  # [32, 48] pairs
        k_row = T.alloc_local((64,), "int64")  # [64] offsets of the tokens of a tile
        v_row = T.alloc_local((64,), "int64")  # [64] offsets of the tokens of a tile
        gain = scale
        last_row = first_row + num_rows - 1
        num_blocks = (num_rows + 47) // 48
        seen_end = first_position + last_row // 4 + 1  # tokens that some row sees: up to here,
        seen_begin = T.int32(0)  # from here on

        for block in T.serial(num_blocks):
            for c in T.serial(48):
                row = first_row + T.min(block * 48 + c, num_rows - 1)  # rows past the last are copies of it
                at[block * 48 + c] = first_position + row // 4
                top[block * 48 + c] = T.float32(-1e30)
                sums[block * 48 + c] = T.float32(0)
                q_row[block * 48 + c] = row // 4 * q_stride_token + row % 4 * q_stride_head
            for d in T.serial(384):
                for i in T.vectorized(16):
                    O[(block * 384 + d) * 16 + i] = T.float32(0)
        for vector in T.serial(num_blocks * 3):  # the rows of the next one are prefetched
            next_row = T.min(vector + 1, num_blocks * 3 - 1) * 16
            for b in T.serial(4):
                d = b * 16
                x = T.alloc_local((256,), "int32")
                y = T.alloc_local((256,), "int32")
                for r in T.unroll(16):
                    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(Q[q_row[next_row + r] + 2 * d]), 0, 3, 1))
                    x[T.Ramp(r * 16, 1, 16)] = T.reinterpret("int32x16", Q[T.Ramp(q_row[vector * 16 + r] + 2 * d, 1, 32)])

                for r in T.unroll(8):
                    y[T.Ramp((2 * r) * 16, 1, 16)] = T.Shuffle(
                        [x[T.Ramp((2 * r) * 16, 1, 16)], x[T.Ramp((2 * r + 1) * 16, 1, 16)]],
                        LOW_1,
                    )
                    y[T.Ramp((2 * r + 1) * 16, 1, 16)] = T.Shuffle(
                        [x[T.Ramp((2 * r) * 16, 1, 16)], x[T.Ramp((2 * r + 1) * 16, 1, 16)]],
                        HIGH_1,
                    )
                for r in T.unroll(8):
                    x[T.Ramp((r // 2 * 4 + r % 2) * 16, 1, 16)] = T.Shuffle(
                        [y[T.Ramp((r // 2 * 4 + r % 2) * 16, 1, 16)], y[T.Ramp((r // 2 * 4 + r % 2 + 2) * 16, 1, 16)]],
                        LOW_2,
                    )
                    x[T.Ramp((r // 2 * 4 + r % 2 + 2) * 16, 1, 16)] = T.Shuffle(
                        [y[T.Ramp((r // 2 * 4 + r % 2) * 16, 1, 16)], y[T.Ramp((r // 2 * 4 + r % 2 + 2) * 16, 1, 16)]],
                        HIGH_2,
                    )
                for r in T.unroll(8):
                    y[T.Ramp((r // 4 * 8 + r % 4) * 16, 1, 16)] = T.Shuffle(
                        [x[T.Ramp((r // 4 * 8 + r % 4) * 16, 1, 16)], x[T.Ramp((r // 4 * 8 + r % 4 + 4) * 16, 1, 16)]],
                        LOW_4,
                    )
                    y[T.Ramp((r // 4 * 8 + r % 4 + 4) * 16, 1, 16)] = T.Shuffle(
                        [x[T.Ramp((r // 4 * 8 + r % 4) * 16, 1, 16)], x[T.Ramp((r // 4 * 8 + r % 4 + 4) * 16, 1, 16)]],
                        HIGH_4,
                    )
                for r in T.unroll(8):
                    x[T.Ramp((r // 8 * 16 + r % 8) * 16, 1, 16)] = T.Shuffle(
                        [y[T.Ramp((r // 8 * 16 + r % 8) * 16, 1, 16)], y[T.Ramp((r // 8 * 16 + r % 8 + 8) * 16, 1, 16)]],
                        LOW_8,
                    )
                    x[T.Ramp((r // 8 * 16 + r % 8 + 8) * 16, 1, 16)] = T.Shuffle(
                        [y[T.Ramp((r // 8 * 16 + r % 8) * 16, 1, 16)], y[T.Ramp((r // 8 * 16 + r % 8 + 8) * 16, 1, 16)]],
                        HIGH_8,
                    )
                for r in T.unroll(16):
                    for i in T.vectorized(16):
                        QS[(vector // 3 * 64 + d + r) * 48 + vector % 3 * 16 + i] = x[r * 16 + i]

        for step in T.serial((seen_end + 63) // 64 - seen_begin // 64):
            tile = seen_begin // 64 + step
            # the part of the tile that is needed, by whole register blocks
            from_token = T.max(seen_begin - tile * 64, 0) // 16 * 16
            to_token = (T.min(seen_end - tile * 64, 64) + 15) // 16 * 16
            for n in T.serial(4):  # 16 tokens of one block
                first = tile * 64 + n * 16
                page = T.cast(TABLE[T.min(T.max(first, seen_begin), seen_end - 1) // 16], "int64")
                for i in T.vectorized(16):
                    k_row[n * 16 + i] = T.Select(
                        first + i >= seen_begin and first + i < seen_end,
                        page * k_stride_block + T.cast(first % 16 + i, "int64") * k_stride_token,
                        zeros_k,
                    )
                    v_row[n * 16 + i] = T.Select(
                        first + i >= seen_begin and first + i < seen_end,
                        page * v_stride_block + T.cast(first % 16 + i, "int64") * v_stride_token,
                        zeros_v,
                    )
            for n in T.serial(to_token - from_token):
                for c in T.serial(4):
                    row = T.alloc_local((32,), "uint16")
                    for i in T.vectorized(32):
                        row[i] = K[k_row[from_token + n] + c * 32 + i]
                    KS[T.Ramp((from_token + n) * 64 + c * 16, 1, 16)] = T.reinterpret("int32x16", row[T.Ramp(0, 1, 32)])
            for nb in T.serial((to_token - from_token) // 16):
                for c in T.serial(8):
                    for m in T.unroll(8):
                        n = nb * 8 + m
                        row = T.alloc_local((16,), "int32")
                        even = T.alloc_local((16,), "uint16")
                        odd = T.alloc_local((16,), "uint16")
                        for i in T.vectorized(16):
                            even[i] = V[v_row[from_token + 2 * n + 0] + c * 16 + i]
                        for i in T.vectorized(16):
                            odd[i] = V[v_row[from_token + 2 * n + 1] + c * 16 + i]
                        row[T.Ramp(0, 1, 16)] = T.reinterpret(
                            "int32x16", T.Shuffle([even[T.Ramp(0, 1, 16)], odd[T.Ramp(0, 1, 16)]], PAIR_TOKENS)
                        )
                        for u in T.unroll(2):
                            for i in T.vectorized(8):
                                VS[((c * 16 + u * 8) // 8 * 32 + from_token // 2 + n) * 8 + (c * 16 + u * 8) % 8 + i] = row[u * 8 + i]

            for block in T.serial(num_blocks):
                grain = T.Select(num_rows - block * 48 > 16, 8, 16)  # tokens of a register block
                position = at[block * 48]
                last_position = at[block * 48 + 47]
                begin = T.int32(0)
                end = (T.min(last_position + 1 - tile * 64, 64) + grain - 1) // grain * grain
                if begin < end:
                    if num_rows - block * 48 > 16:
                        # s = K @ Q^T
                        for nb in T.serial((end - begin) // 8):
                            n0 = begin + nb * 8
                            acc = T.alloc_local((384,), "float32")  # [8, 48]
                            for j in T.unroll(24):
                                for i in T.vectorized(16):
                                    acc[j * 16 + i] = T.float32(0)
                            for xs in T.serial(16):
                                for xu in T.unroll(4):
                                    for r in T.unroll(8):
                                        for j in T.unroll(3):
                                            acc[T.Ramp((r * 3 + j) * 16, 1, 16)] = T.call_pure_extern(
                                                "float32x16",
                                                "dot16",
                                                acc[T.Ramp((r * 3 + j) * 16, 1, 16)],
                                                QS[T.Ramp((block * 64 + xs * 4 + xu) * 48 + j * 16, 1, 16)],
                                                T.Broadcast(KS[(n0 + r) * 64 + xs * 4 + xu], 16),
                                            )
                            for r in T.unroll(8):
                                for j in T.unroll(3):
                                    for i in T.vectorized(16):
                                        s[(n0 + r) * 48 + j * 16 + i] = acc[(r * 3 + j) * 16 + i]
                        if tile * 64 + end > position + 1:  # not all rows see all of it
                            for t in T.serial(end - begin):
                                for j in T.unroll(3):
                                    for i in T.vectorized(16):
                                        s[(begin + t) * 48 + j * 16 + i] = T.Select(
                                            tile * 64 + begin + t <= at[block * 48 + j * 16 + i],
                                            s[(begin + t) * 48 + j * 16 + i],
                                            T.float32(-1e30),
                                        )

                        # p = softmax(s), online: the sums so far shrink by alpha when the maximum grows
                        for j in T.unroll(3):
                            new = T.alloc_local((16,), "float32")
                            x = T.alloc_local((16,), "float32")
                            n = T.alloc_local((16,), "float32")
                            total = T.alloc_local((16,), "float32")
                            for i in T.vectorized(16):  # above a masked score by more than its product with a scale is rounded by
                                new[i] = T.float32(-1e20)
                            for nb in T.serial((end - begin) // 8):
                                for r in T.unroll(8):
                                    for i in T.vectorized(16):
                                        new[i] = T.max(new[i], s[(begin + nb * 8 + r) * 48 + j * 16 + i])
                            for i in T.vectorized(16):
                                new[i] = T.max(T.max(new[i] * gain, T.float32(-1e30)), top[block * 48 + j * 16 + i])
                            for i in T.vectorized(16):
                                x[i] = T.max(top[block * 48 + j * 16 + i] - new[i], T.float32(-126))
                            for i in T.vectorized(16):  # 2^x: n is x rounded to an integer,
                                n[i] = x[i] + T.float32(12582912)
                            for i in T.vectorized(16):
                                x[i] = x[i] - (n[i] - T.float32(12582912))
                            for i in T.vectorized(16):  # 2^(x - n) a polynomial, n goes to the exponent
                                x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                            for i in T.vectorized(16):
                                alpha[j * 16 + i] = x[i]
                            for i in T.vectorized(16):
                                top[block * 48 + j * 16 + i] = new[i]
                            for i in T.vectorized(16):
                                total[i] = sums[block * 48 + j * 16 + i] * alpha[j * 16 + i]
                            for nb in T.serial((end - begin) // 8):
                                for r in T.unroll(8):
                                    for i in T.vectorized(16):  # what a row does not see: 2^-126
                                        x[i] = T.max(s[(begin + nb * 8 + r) * 48 + j * 16 + i] * gain - new[i], T.float32(-126))
                                    for i in T.vectorized(16):  # 2^x: n is x rounded to an integer,
                                        n[i] = x[i] + T.float32(12582912)
                                    for i in T.vectorized(16):
                                        x[i] = x[i] - (n[i] - T.float32(12582912))
                                    for i in T.vectorized(16):  # 2^(x - n) a polynomial, n goes to the exponent
                                        x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                                    for i in T.vectorized(16):
                                        s[(begin + nb * 8 + r) * 48 + j * 16 + i] = x[i]
                                    for i in T.vectorized(16):
                                        total[i] = total[i] + x[i]
                            for i in T.vectorized(16):
                                sums[block * 48 + j * 16 + i] = total[i]
                            for t in T.serial((end - begin) // 2):
                                p[T.Ramp((begin // 2 + t) * 48 + j * 16, 1, 16)] = T.call_pure_extern(
                                    "int32x16",
                                    "pack",
                                    s[T.Ramp((begin + 2 * t) * 48 + j * 16, 1, 16)],
                                    s[T.Ramp((begin + 2 * t + 1) * 48 + j * 16, 1, 16)],
                                )

                        # o = o * alpha + V^T @ p
                        for db in T.serial(16):
                            acc = T.alloc_local((384,), "float32")  # [8, 48]
                            for r in T.unroll(8):
                                for j in T.unroll(3):
                                    for i in T.vectorized(16):
                                        acc[(r * 3 + j) * 16 + i] = (
                                            O[(block * 128 + db * 8 + r) * 48 + j * 16 + i] * alpha[j * 16 + i]
                                        )
                            for xs in T.serial((end - begin) // 8):
                                for xu in T.unroll(4):
                                    for r in T.unroll(8):
                                        for j in T.unroll(3):
                                            acc[T.Ramp((r * 3 + j) * 16, 1, 16)] = T.call_pure_extern(
                                                "float32x16",
                                                "dot16",
                                                acc[T.Ramp((r * 3 + j) * 16, 1, 16)],
                                                p[T.Ramp((begin // 2 + xs * 4 + xu) * 48 + j * 16, 1, 16)],
                                                T.Broadcast(VS[((db * 1 + r // 8) * 32 + begin // 2 + xs * 4 + xu) * 8 + r % 8], 16),
                                            )
                            for r in T.unroll(8):
                                for j in T.unroll(3):
                                    for i in T.vectorized(16):
                                        O[(block * 128 + db * 8 + r) * 48 + j * 16 + i] = acc[(r * 3 + j) * 16 + i]
                    else:  # few rows: one vector of them, more panels at once
                        # s = K @ Q^T
                        for nb in T.serial((end - begin) // 16):
                            n0 = begin + nb * 16
                            acc = T.alloc_local((256,), "float32")  # [16, 16]
                            for j in T.unroll(16):
                                for i in T.vectorized(16):
                                    acc[j * 16 + i] = T.float32(0)
                            for xs in T.serial(16):
                                for xu in T.unroll(4):
                                    for r in T.unroll(16):
                                        for j in T.unroll(1):
                                            acc[T.Ramp((r * 1 + j) * 16, 1, 16)] = T.call_pure_extern(
                                                "float32x16",
                                                "dot16",
                                                acc[T.Ramp((r * 1 + j) * 16, 1, 16)],
                                                QS[T.Ramp((block * 64 + xs * 4 + xu) * 48 + j * 16, 1, 16)],
                                                T.Broadcast(KS[(n0 + r) * 64 + xs * 4 + xu], 16),
                                            )
                            for r in T.unroll(16):
                                for j in T.unroll(1):
                                    for i in T.vectorized(16):
                                        s[(n0 + r) * 48 + j * 16 + i] = acc[(r * 1 + j) * 16 + i]
                        if tile * 64 + end > position + 1:  # not all rows see all of it
                            for t in T.serial(end - begin):
                                for j in T.unroll(1):
                                    for i in T.vectorized(16):
                                        s[(begin + t) * 48 + j * 16 + i] = T.Select(
                                            tile * 64 + begin + t <= at[block * 48 + j * 16 + i],
                                            s[(begin + t) * 48 + j * 16 + i],
                                            T.float32(-1e30),
                                        )

                        # p = softmax(s), online: the sums so far shrink by alpha when the maximum grows
                        for j in T.unroll(1):
                            new = T.alloc_local((16,), "float32")
                            x = T.alloc_local((16,), "float32")
                            n = T.alloc_local((16,), "float32")
                            total = T.alloc_local((16,), "float32")
                            for i in T.vectorized(16):  # above a masked score by more than its product with a scale is rounded by
                                new[i] = T.float32(-1e20)
                            for nb in T.serial((end - begin) // 8):
                                for r in T.unroll(8):
                                    for i in T.vectorized(16):
                                        new[i] = T.max(new[i], s[(begin + nb * 8 + r) * 48 + j * 16 + i])
                            for i in T.vectorized(16):
                                new[i] = T.max(T.max(new[i] * gain, T.float32(-1e30)), top[block * 48 + j * 16 + i])
                            for i in T.vectorized(16):
                                x[i] = T.max(top[block * 48 + j * 16 + i] - new[i], T.float32(-126))
                            for i in T.vectorized(16):  # 2^x: n is x rounded to an integer,
                                n[i] = x[i] + T.float32(12582912)
                            for i in T.vectorized(16):
                                x[i] = x[i] - (n[i] - T.float32(12582912))
                            for i in T.vectorized(16):  # 2^(x - n) a polynomial, n goes to the exponent
                                x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                            for i in T.vectorized(16):
                                alpha[j * 16 + i] = x[i]
                            for i in T.vectorized(16):
                                top[block * 48 + j * 16 + i] = new[i]
                            for i in T.vectorized(16):
                                total[i] = sums[block * 48 + j * 16 + i] * alpha[j * 16 + i]
                            for nb in T.serial((end - begin) // 8):
                                for r in T.unroll(8):
                                    for i in T.vectorized(16):  # what a row does not see: 2^-126
                                        x[i] = T.max(s[(begin + nb * 8 + r) * 48 + j * 16 + i] * gain - new[i], T.float32(-126))
                                    for i in T.vectorized(16):  # 2^x: n is x rounded to an integer,
                                        n[i] = x[i] + T.float32(12582912)
                                    for i in T.vectorized(16):
                                        x[i] = x[i] - (n[i] - T.float32(12582912))
                                    for i in T.vectorized(16):  # 2^(x - n) a polynomial, n goes to the exponent
                                        x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                                    for i in T.vectorized(16):
                                        s[(begin + nb * 8 + r) * 48 + j * 16 + i] = x[i]
                                    for i in T.vectorized(16):
                                        total[i] = total[i] + x[i]
                            for i in T.vectorized(16):
                                sums[block * 48 + j * 16 + i] = total[i]
                            for t in T.serial((end - begin) // 2):
                                p[T.Ramp((begin // 2 + t) * 48 + j * 16, 1, 16)] = T.call_pure_extern(
                                    "int32x16",
                                    "pack",
                                    s[T.Ramp((begin + 2 * t) * 48 + j * 16, 1, 16)],
                                    s[T.Ramp((begin + 2 * t + 1) * 48 + j * 16, 1, 16)],
                                )

                        # o = o * alpha + V^T @ p
                        for db in T.serial(8):
                            acc = T.alloc_local((256,), "float32")  # [16, 16]
                            for r in T.unroll(16):
                                for j in T.unroll(1):
                                    for i in T.vectorized(16):
                                        acc[(r * 1 + j) * 16 + i] = (
                                            O[(block * 128 + db * 16 + r) * 48 + j * 16 + i] * alpha[j * 16 + i]
                                        )
                            for xs in T.serial((end - begin) // 8):
                                for xu in T.unroll(4):
                                    for r in T.unroll(16):
                                        for j in T.unroll(1):
                                            acc[T.Ramp((r * 1 + j) * 16, 1, 16)] = T.call_pure_extern(
                                                "float32x16",
                                                "dot16",
                                                acc[T.Ramp((r * 1 + j) * 16, 1, 16)],
                                                p[T.Ramp((begin // 2 + xs * 4 + xu) * 48 + j * 16, 1, 16)],
                                                T.Broadcast(VS[((db * 2 + r // 8) * 32 + begin // 2 + xs * 4 + xu) * 8 + r % 8], 16),
                                            )
                            for r in T.unroll(16):
                                for j in T.unroll(1):
                                    for i in T.vectorized(16):
                                        O[(block * 128 + db * 16 + r) * 48 + j * 16 + i] = acc[(r * 1 + j) * 16 + i]

        for block in T.serial(num_blocks):
            for j in T.serial(T.min((num_rows - block * 48 + 15) // 16, 3)):
                norm = T.alloc_local((16,), "float32")
                for i in T.vectorized(16):
                    norm[i] = v_scale / sums[block * 48 + j * 16 + i]
                for b in T.serial(8):
                    d = b * 16
                    rows = T.alloc_local((256,), "float32")
                    x = T.alloc_local((256,), "float32")
                    y = T.alloc_local((256,), "float32")
                    for r in T.unroll(16):
                        for i in T.vectorized(16):
                            x[r * 16 + i] = O[(block * 128 + d + r) * 48 + j * 16 + i] * norm[i]

                    for r in T.unroll(8):
                        y[T.Ramp((2 * r) * 16, 1, 16)] = T.Shuffle(
                            [x[T.Ramp((2 * r) * 16, 1, 16)], x[T.Ramp((2 * r + 1) * 16, 1, 16)]],
                            LOW_1,
                        )
                        y[T.Ramp((2 * r + 1) * 16, 1, 16)] = T.Shuffle(
                            [x[T.Ramp((2 * r) * 16, 1, 16)], x[T.Ramp((2 * r + 1) * 16, 1, 16)]],
                            HIGH_1,
                        )
                    for r in T.unroll(8):
                        x[T.Ramp((r // 2 * 4 + r % 2) * 16, 1, 16)] = T.Shuffle(
                            [y[T.Ramp((r // 2 * 4 + r % 2) * 16, 1, 16)], y[T.Ramp((r // 2 * 4 + r % 2 + 2) * 16, 1, 16)]],
                            LOW_2,
                        )
                        x[T.Ramp((r // 2 * 4 + r % 2 + 2) * 16, 1, 16)] = T.Shuffle(
                            [y[T.Ramp((r // 2 * 4 + r % 2) * 16, 1, 16)], y[T.Ramp((r // 2 * 4 + r % 2 + 2) * 16, 1, 16)]],
                            HIGH_2,
                        )
                    for r in T.unroll(8):
                        y[T.Ramp((r // 4 * 8 + r % 4) * 16, 1, 16)] = T.Shuffle(
                            [x[T.Ramp((r // 4 * 8 + r % 4) * 16, 1, 16)], x[T.Ramp((r // 4 * 8 + r % 4 + 4) * 16, 1, 16)]],
                            LOW_4,
                        )
                        y[T.Ramp((r // 4 * 8 + r % 4 + 4) * 16, 1, 16)] = T.Shuffle(
                            [x[T.Ramp((r // 4 * 8 + r % 4) * 16, 1, 16)], x[T.Ramp((r // 4 * 8 + r % 4 + 4) * 16, 1, 16)]],
                            HIGH_4,
                        )
                    for r in T.unroll(8):
                        x[T.Ramp((r // 8 * 16 + r % 8) * 16, 1, 16)] = T.Shuffle(
                            [y[T.Ramp((r // 8 * 16 + r % 8) * 16, 1, 16)], y[T.Ramp((r // 8 * 16 + r % 8 + 8) * 16, 1, 16)]],
                            LOW_8,
                        )
                        x[T.Ramp((r // 8 * 16 + r % 8 + 8) * 16, 1, 16)] = T.Shuffle(
                            [y[T.Ramp((r // 8 * 16 + r % 8) * 16, 1, 16)], y[T.Ramp((r // 8 * 16 + r % 8 + 8) * 16, 1, 16)]],
                            HIGH_8,
                        )
                    for r in T.unroll(16):
                        for i in T.vectorized(16):
                            rows[r * 16 + i] = x[r * 16 + i]
                    for c in T.serial(T.min(num_rows - block * 48 - j * 16, 16)):
                        row = first_row + block * 48 + j * 16 + c
                        to = row // 4 * out_stride_token + row % 4 * out_stride_head + d
                        later = T.min(row + 16, first_row + num_rows - 1)  # prefetched: one of the next vector
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(OUT[later // 4 * out_stride_token + later % 4 * out_stride_head + d]), 0, 3, 1))
                        for i in T.vectorized(16):
                            OUT[to + i] = T.cast(T.shift_right(T.reinterpret("uint32", rows[c * 16 + i]) + T.uint32(32767) + T.bitwise_and(T.shift_right(T.reinterpret("uint32", rows[c * 16 + i]), T.uint32(16)), T.uint32(1)), T.uint32(16)), "uint16")
