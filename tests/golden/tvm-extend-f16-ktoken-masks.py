# extend_62f62b2a_97375a53: paged attention of query tiles on a CPU, each of one sequence and one KV head
# spec      extend-h128-q32-kv8-b16-f16-ktoken-lse-window128-sinks
# schedule  blocks8-dotf32-k_rows4-tile64-v_rows4-vectors3
# target    x86_64-avx2; pagedgen 0.1.0
#
# row       a query token and one of the 4 query heads of the KV head: token * 4 + head, from the sequence's first
# block     24 rows, next to each other in 3 vectors; a query tile has 8 of them at most
# tile      64 tokens of K and V, which are converted and laid out once for all blocks of a query tile
# panel     4 tokens of K, 4 dims of V: what one register block reads next to each other
#
# Scores are computed with rows as lanes: s = K @ Q^T [tokens, rows] and o = V^T @ p [dims, rows]. So neither the softmax
# nor the products ever sum over lanes, and elements of K and V are broadcast.

from tvm.script import ir as I, tirx as T

# Which elements of two rows that are so many apart a stage of turning 8 x 8 elements takes.
LOW_1 = [0, 8, 2, 10, 4, 12, 6, 14]
HIGH_1 = [1, 9, 3, 11, 5, 13, 7, 15]
LOW_2 = [0, 1, 8, 9, 4, 5, 12, 13]
HIGH_2 = [2, 3, 10, 11, 6, 7, 14, 15]
LOW_4 = [0, 1, 2, 3, 8, 9, 10, 11]
HIGH_4 = [4, 5, 6, 7, 12, 13, 14, 15]


@I.ir_module
class Extend:
    @T.prim_func(s_tir=True)
    def query_tile(
        q: T.handle("float16"),  # of the sequence's first query and the KV head's first query head; so are out and lse
        k: T.handle("float16"),  # of the KV head; so is v
        v: T.handle("float16"),
        out: T.handle("float16"),
        lse: T.handle("float32"),
        sinks: T.handle("float32"),
        block_table: T.handle("int32"),  # of the sequence
        q_packed: T.handle("float32"),  # scratch: Q^T of every block, [8, 128, 24]
        k_packed: T.handle("float32"),  # scratch: a tile of K, [16, 128, 4]
        v_packed: T.handle("float32"),  # scratch: a tile of V, [32, 64, 4]
        sums_of_v: T.handle("float32"),  # scratch: sums of p * V of every block, [8, 128, 24]
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
        T.func_attr({"global_symbol": "extend_62f62b2a_97375a53_query_tile", "calling_conv": 3, "tirx.noalias": True})
        Q = T.decl_buffer((1,), "float16", data=q)
        K = T.decl_buffer((1,), "float16", data=k)
        V = T.decl_buffer((1,), "float16", data=v)
        OUT = T.decl_buffer((1,), "float16", data=out)
        TABLE = T.decl_buffer((1,), "int32", data=block_table)
        QS = T.decl_buffer((24576,), "float32", data=q_packed)
        KS = T.decl_buffer((8192,), "float32", data=k_packed)
        VS = T.decl_buffer((8192,), "float32", data=v_packed)
        O = T.decl_buffer((24576,), "float32", data=sums_of_v)
        LSE = T.decl_buffer((1,), "float32", data=lse)
        SINKS = T.decl_buffer((1,), "float32", data=sinks)
        at = T.alloc_local((192,), "int32")  # [192] positions of the rows
        q_row = T.alloc_local((192,), "int64")  # [192] offsets of the rows of q
        top = T.alloc_local((192,), "float32")  # [192] maximal scores
        sums = T.alloc_local((192,), "float32")  # [192] sums of p
        alpha = T.alloc_local((24,), "float32")  # [24] what a block's sums so far are scaled by
        s = T.alloc_local((1536,), "float32")  # [64, 24] scores of a block, then p
        v_row = T.alloc_local((64,), "int64")  # [64] offsets of the tokens of a tile
        gain = scale
        last_row = first_row + num_rows - 1
        num_blocks = (num_rows + 23) // 24
        seen_end = first_position + last_row // 4 + 1  # tokens that some row sees: up to here,
        seen_begin = T.max(first_position + first_row // 4 - 127, 0)  # from here on

        for block in T.serial(num_blocks):
            for c in T.serial(24):
                row = first_row + T.min(block * 24 + c, num_rows - 1)  # rows past the last are copies of it
                at[block * 24 + c] = first_position + row // 4
                # a sink is a score that was seen before all others, and once
                top[block * 24 + c] = T.max(SINKS[row % 4] * T.float32(1.4426950408889634), T.float32(-1e30))
                sums[block * 24 + c] = T.Select(SINKS[row % 4] > T.float32(-6e29), T.float32(1), T.float32(0))
                q_row[block * 24 + c] = row // 4 * q_stride_token + row % 4 * q_stride_head
            for d in T.serial(384):
                for i in T.vectorized(8):
                    O[(block * 384 + d) * 8 + i] = T.float32(0)
        for vector in T.serial(num_blocks * 3):  # the rows of the next one are prefetched
            next_row = T.min(vector + 1, num_blocks * 3 - 1) * 8
            for b in T.serial(16):
                d = b * 8
                x = T.alloc_local((64,), "float32")
                y = T.alloc_local((64,), "float32")
                for r in T.unroll(8):
                    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(Q[q_row[next_row + r] + d]), 0, 3, 1))
                    for i in T.vectorized(8):
                        x[r * 8 + i] = T.cast(Q[q_row[vector * 8 + r] + d + i], "float32")

                for r in T.unroll(4):
                    y[T.Ramp((2 * r) * 8, 1, 8)] = T.Shuffle(
                        [x[T.Ramp((2 * r) * 8, 1, 8)], x[T.Ramp((2 * r + 1) * 8, 1, 8)]],
                        LOW_1,
                    )
                    y[T.Ramp((2 * r + 1) * 8, 1, 8)] = T.Shuffle(
                        [x[T.Ramp((2 * r) * 8, 1, 8)], x[T.Ramp((2 * r + 1) * 8, 1, 8)]],
                        HIGH_1,
                    )
                for r in T.unroll(4):
                    x[T.Ramp((r // 2 * 4 + r % 2) * 8, 1, 8)] = T.Shuffle(
                        [y[T.Ramp((r // 2 * 4 + r % 2) * 8, 1, 8)], y[T.Ramp((r // 2 * 4 + r % 2 + 2) * 8, 1, 8)]],
                        LOW_2,
                    )
                    x[T.Ramp((r // 2 * 4 + r % 2 + 2) * 8, 1, 8)] = T.Shuffle(
                        [y[T.Ramp((r // 2 * 4 + r % 2) * 8, 1, 8)], y[T.Ramp((r // 2 * 4 + r % 2 + 2) * 8, 1, 8)]],
                        HIGH_2,
                    )
                for r in T.unroll(4):
                    y[T.Ramp((r // 4 * 8 + r % 4) * 8, 1, 8)] = T.Shuffle(
                        [x[T.Ramp((r // 4 * 8 + r % 4) * 8, 1, 8)], x[T.Ramp((r // 4 * 8 + r % 4 + 4) * 8, 1, 8)]],
                        LOW_4,
                    )
                    y[T.Ramp((r // 4 * 8 + r % 4 + 4) * 8, 1, 8)] = T.Shuffle(
                        [x[T.Ramp((r // 4 * 8 + r % 4) * 8, 1, 8)], x[T.Ramp((r // 4 * 8 + r % 4 + 4) * 8, 1, 8)]],
                        HIGH_4,
                    )
                for r in T.unroll(8):
                    for i in T.vectorized(8):
                        QS[(vector // 3 * 128 + d + r) * 24 + vector % 3 * 8 + i] = y[r * 8 + i]

        for step in T.serial((seen_end + 63) // 64 - seen_begin // 64):
            tile = seen_begin // 64 + step
            # the part of the tile that is needed, by whole register blocks
            from_token = T.max(seen_begin - tile * 64, 0) // 8 * 8
            to_token = (T.min(seen_end - tile * 64, 64) + 7) // 8 * 8
            for n in T.serial(4):  # 16 tokens of one block
                first = tile * 64 + n * 16
                page = T.cast(TABLE[T.min(T.max(first, seen_begin), seen_end - 1) // 16], "int64")
                for i in T.vectorized(16):
                    v_row[n * 16 + i] = T.Select(
                        first + i >= seen_begin and first + i < seen_end,
                        page * v_stride_block + T.cast(first % 16 + i, "int64") * v_stride_token,
                        zeros_v,
                    )
            for n in T.serial(8):  # 8 tokens, next to each other
                if n * 8 + 8 > from_token and n * 8 < to_token:
                    first = tile * 64 + n * 8
                    page = T.cast(TABLE[T.min(T.max(first, seen_begin), seen_end - 1) // 16], "int64")
                    source = page * k_stride_block + first % 16
                    for d in T.serial(128):
                        row = T.alloc_local((8,), "float32")
                        for i in T.vectorized(8):
                            row[i] = T.Select(
                                first + i >= seen_begin and first + i < seen_end,
                                T.cast(K[source + d * k_stride_dim + i], "float32"),
                                T.float32(0),
                            )
                        for u in T.unroll(2):
                            for i in T.vectorized(4):
                                KS[((n * 8 + u * 4) // 4 * 128 + d) * 4 + (n * 8 + u * 4) % 4 + i] = row[u * 4 + i]
            for nb in T.serial((to_token - from_token) // 4):
                for c in T.serial(16):
                    for m in T.unroll(4):
                        n = nb * 4 + m
                        row = T.alloc_local((8,), "float32")
                        for i in T.vectorized(8):
                            row[i] = T.cast(V[v_row[from_token + n] + c * 8 + i], "float32")
                        for u in T.unroll(2):
                            for i in T.vectorized(4):
                                VS[((c * 8 + u * 4) // 4 * 64 + from_token + n) * 4 + (c * 8 + u * 4) % 4 + i] = row[u * 4 + i]

            for block in T.serial(num_blocks):
                grain = T.Select(num_rows - block * 24 > 8, 4, 8)  # tokens of a register block
                position = at[block * 24]
                last_position = at[block * 24 + 23]
                begin = T.max(position - 127 - tile * 64, 0) // 8 * 8
                end = (T.min(last_position + 1 - tile * 64, 64) + grain - 1) // grain * grain
                if begin < end:
                    if num_rows - block * 24 > 8:
                        # s = K @ Q^T
                        for nb in T.serial((end - begin) // 4):
                            n0 = begin + nb * 4
                            acc = T.alloc_local((96,), "float32")  # [4, 24]
                            for j in T.unroll(12):
                                for i in T.vectorized(8):
                                    acc[j * 8 + i] = T.float32(0)
                            for xs in T.serial(32):
                                for xu in T.unroll(4):
                                    for r in T.unroll(4):
                                        for j in T.unroll(3):
                                            for i in T.vectorized(8):
                                                acc[(r * 3 + j) * 8 + i] += KS[((n0 // 4 + r // 4) * 128 + xs * 4 + xu) * 4 + r % 4] * QS[(block * 128 + xs * 4 + xu) * 24 + j * 8 + i]
                            for r in T.unroll(4):
                                for j in T.unroll(3):
                                    for i in T.vectorized(8):
                                        s[(n0 + r) * 24 + j * 8 + i] = acc[(r * 3 + j) * 8 + i]
                        if tile * 64 + end > position + 1 or tile * 64 + begin <= last_position - 128:  # not all rows see all of it
                            for t in T.serial(end - begin):
                                for j in T.unroll(3):
                                    for i in T.vectorized(8):
                                        s[(begin + t) * 24 + j * 8 + i] = T.Select(
                                            tile * 64 + begin + t <= at[block * 24 + j * 8 + i] and tile * 64 + begin + t > at[block * 24 + j * 8 + i] - 128,
                                            s[(begin + t) * 24 + j * 8 + i],
                                            T.float32(-1e30),
                                        )

                        # p = softmax(s), online: the sums so far shrink by alpha when the maximum grows
                        for j in T.unroll(3):
                            new = T.alloc_local((8,), "float32")
                            x = T.alloc_local((8,), "float32")
                            n = T.alloc_local((8,), "float32")
                            total = T.alloc_local((8,), "float32")
                            for i in T.vectorized(8):  # above a masked score by more than its product with a scale is rounded by
                                new[i] = T.float32(-1e20)
                            for nb in T.serial((end - begin) // 4):
                                for r in T.unroll(4):
                                    for i in T.vectorized(8):
                                        new[i] = T.max(new[i], s[(begin + nb * 4 + r) * 24 + j * 8 + i])
                            for i in T.vectorized(8):
                                new[i] = T.max(T.max(new[i] * gain, T.float32(-1e30)), top[block * 24 + j * 8 + i])
                            for i in T.vectorized(8):
                                x[i] = T.max(top[block * 24 + j * 8 + i] - new[i], T.float32(-126))
                            for i in T.vectorized(8):  # 2^x: n is x rounded to an integer,
                                n[i] = x[i] + T.float32(12582912)
                            for i in T.vectorized(8):
                                x[i] = x[i] - (n[i] - T.float32(12582912))
                            for i in T.vectorized(8):  # 2^(x - n) a polynomial, n goes to the exponent
                                x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                            for i in T.vectorized(8):
                                alpha[j * 8 + i] = x[i]
                            for i in T.vectorized(8):
                                top[block * 24 + j * 8 + i] = new[i]
                            for i in T.vectorized(8):
                                total[i] = sums[block * 24 + j * 8 + i] * alpha[j * 8 + i]
                            for nb in T.serial((end - begin) // 4):
                                for r in T.unroll(4):
                                    for i in T.vectorized(8):  # what a row does not see: 2^-126
                                        x[i] = T.max(s[(begin + nb * 4 + r) * 24 + j * 8 + i] * gain - new[i], T.float32(-126))
                                    for i in T.vectorized(8):  # 2^x: n is x rounded to an integer,
                                        n[i] = x[i] + T.float32(12582912)
                                    for i in T.vectorized(8):
                                        x[i] = x[i] - (n[i] - T.float32(12582912))
                                    for i in T.vectorized(8):  # 2^(x - n) a polynomial, n goes to the exponent
                                        x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                                    for i in T.vectorized(8):
                                        s[(begin + nb * 4 + r) * 24 + j * 8 + i] = x[i]
                                    for i in T.vectorized(8):
                                        total[i] = total[i] + x[i]
                            for i in T.vectorized(8):
                                sums[block * 24 + j * 8 + i] = total[i]

                        # o = o * alpha + V^T @ p
                        for db in T.serial(32):
                            acc = T.alloc_local((96,), "float32")  # [4, 24]
                            for r in T.unroll(4):
                                for j in T.unroll(3):
                                    for i in T.vectorized(8):
                                        acc[(r * 3 + j) * 8 + i] = (
                                            O[(block * 128 + db * 4 + r) * 24 + j * 8 + i] * alpha[j * 8 + i]
                                        )
                            for xs in T.serial((end - begin) // 4):
                                for xu in T.unroll(4):
                                    for r in T.unroll(4):
                                        for j in T.unroll(3):
                                            for i in T.vectorized(8):
                                                acc[(r * 3 + j) * 8 + i] += VS[((db * 1 + r // 4) * 64 + begin + xs * 4 + xu) * 4 + r % 4] * s[(begin + xs * 4 + xu) * 24 + j * 8 + i]
                            for r in T.unroll(4):
                                for j in T.unroll(3):
                                    for i in T.vectorized(8):
                                        O[(block * 128 + db * 4 + r) * 24 + j * 8 + i] = acc[(r * 3 + j) * 8 + i]
                    else:  # few rows: one vector of them, more panels at once
                        # s = K @ Q^T
                        for nb in T.serial((end - begin) // 8):
                            n0 = begin + nb * 8
                            acc = T.alloc_local((64,), "float32")  # [8, 8]
                            for j in T.unroll(8):
                                for i in T.vectorized(8):
                                    acc[j * 8 + i] = T.float32(0)
                            for xs in T.serial(32):
                                for xu in T.unroll(4):
                                    for r in T.unroll(8):
                                        for j in T.unroll(1):
                                            for i in T.vectorized(8):
                                                acc[(r * 1 + j) * 8 + i] += KS[((n0 // 4 + r // 4) * 128 + xs * 4 + xu) * 4 + r % 4] * QS[(block * 128 + xs * 4 + xu) * 24 + j * 8 + i]
                            for r in T.unroll(8):
                                for j in T.unroll(1):
                                    for i in T.vectorized(8):
                                        s[(n0 + r) * 24 + j * 8 + i] = acc[(r * 1 + j) * 8 + i]
                        if tile * 64 + end > position + 1 or tile * 64 + begin <= last_position - 128:  # not all rows see all of it
                            for t in T.serial(end - begin):
                                for j in T.unroll(1):
                                    for i in T.vectorized(8):
                                        s[(begin + t) * 24 + j * 8 + i] = T.Select(
                                            tile * 64 + begin + t <= at[block * 24 + j * 8 + i] and tile * 64 + begin + t > at[block * 24 + j * 8 + i] - 128,
                                            s[(begin + t) * 24 + j * 8 + i],
                                            T.float32(-1e30),
                                        )

                        # p = softmax(s), online: the sums so far shrink by alpha when the maximum grows
                        for j in T.unroll(1):
                            new = T.alloc_local((8,), "float32")
                            x = T.alloc_local((8,), "float32")
                            n = T.alloc_local((8,), "float32")
                            total = T.alloc_local((8,), "float32")
                            for i in T.vectorized(8):  # above a masked score by more than its product with a scale is rounded by
                                new[i] = T.float32(-1e20)
                            for nb in T.serial((end - begin) // 4):
                                for r in T.unroll(4):
                                    for i in T.vectorized(8):
                                        new[i] = T.max(new[i], s[(begin + nb * 4 + r) * 24 + j * 8 + i])
                            for i in T.vectorized(8):
                                new[i] = T.max(T.max(new[i] * gain, T.float32(-1e30)), top[block * 24 + j * 8 + i])
                            for i in T.vectorized(8):
                                x[i] = T.max(top[block * 24 + j * 8 + i] - new[i], T.float32(-126))
                            for i in T.vectorized(8):  # 2^x: n is x rounded to an integer,
                                n[i] = x[i] + T.float32(12582912)
                            for i in T.vectorized(8):
                                x[i] = x[i] - (n[i] - T.float32(12582912))
                            for i in T.vectorized(8):  # 2^(x - n) a polynomial, n goes to the exponent
                                x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                            for i in T.vectorized(8):
                                alpha[j * 8 + i] = x[i]
                            for i in T.vectorized(8):
                                top[block * 24 + j * 8 + i] = new[i]
                            for i in T.vectorized(8):
                                total[i] = sums[block * 24 + j * 8 + i] * alpha[j * 8 + i]
                            for nb in T.serial((end - begin) // 4):
                                for r in T.unroll(4):
                                    for i in T.vectorized(8):  # what a row does not see: 2^-126
                                        x[i] = T.max(s[(begin + nb * 4 + r) * 24 + j * 8 + i] * gain - new[i], T.float32(-126))
                                    for i in T.vectorized(8):  # 2^x: n is x rounded to an integer,
                                        n[i] = x[i] + T.float32(12582912)
                                    for i in T.vectorized(8):
                                        x[i] = x[i] - (n[i] - T.float32(12582912))
                                    for i in T.vectorized(8):  # 2^(x - n) a polynomial, n goes to the exponent
                                        x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                                    for i in T.vectorized(8):
                                        s[(begin + nb * 4 + r) * 24 + j * 8 + i] = x[i]
                                    for i in T.vectorized(8):
                                        total[i] = total[i] + x[i]
                            for i in T.vectorized(8):
                                sums[block * 24 + j * 8 + i] = total[i]

                        # o = o * alpha + V^T @ p
                        for db in T.serial(16):
                            acc = T.alloc_local((64,), "float32")  # [8, 8]
                            for r in T.unroll(8):
                                for j in T.unroll(1):
                                    for i in T.vectorized(8):
                                        acc[(r * 1 + j) * 8 + i] = (
                                            O[(block * 128 + db * 8 + r) * 24 + j * 8 + i] * alpha[j * 8 + i]
                                        )
                            for xs in T.serial((end - begin) // 4):
                                for xu in T.unroll(4):
                                    for r in T.unroll(8):
                                        for j in T.unroll(1):
                                            for i in T.vectorized(8):
                                                acc[(r * 1 + j) * 8 + i] += VS[((db * 2 + r // 4) * 64 + begin + xs * 4 + xu) * 4 + r % 4] * s[(begin + xs * 4 + xu) * 24 + j * 8 + i]
                            for r in T.unroll(8):
                                for j in T.unroll(1):
                                    for i in T.vectorized(8):
                                        O[(block * 128 + db * 8 + r) * 24 + j * 8 + i] = acc[(r * 1 + j) * 8 + i]

        for block in T.serial(num_blocks):
            for j in T.serial(T.min((num_rows - block * 24 + 7) // 8, 3)):
                norm = T.alloc_local((8,), "float32")
                for i in T.vectorized(8):
                    norm[i] = v_scale / sums[block * 24 + j * 8 + i]
                for b in T.serial(16):
                    d = b * 8
                    rows = T.alloc_local((64,), "float32")
                    x = T.alloc_local((64,), "float32")
                    y = T.alloc_local((64,), "float32")
                    for r in T.unroll(8):
                        for i in T.vectorized(8):
                            x[r * 8 + i] = O[(block * 128 + d + r) * 24 + j * 8 + i] * norm[i]

                    for r in T.unroll(4):
                        y[T.Ramp((2 * r) * 8, 1, 8)] = T.Shuffle(
                            [x[T.Ramp((2 * r) * 8, 1, 8)], x[T.Ramp((2 * r + 1) * 8, 1, 8)]],
                            LOW_1,
                        )
                        y[T.Ramp((2 * r + 1) * 8, 1, 8)] = T.Shuffle(
                            [x[T.Ramp((2 * r) * 8, 1, 8)], x[T.Ramp((2 * r + 1) * 8, 1, 8)]],
                            HIGH_1,
                        )
                    for r in T.unroll(4):
                        x[T.Ramp((r // 2 * 4 + r % 2) * 8, 1, 8)] = T.Shuffle(
                            [y[T.Ramp((r // 2 * 4 + r % 2) * 8, 1, 8)], y[T.Ramp((r // 2 * 4 + r % 2 + 2) * 8, 1, 8)]],
                            LOW_2,
                        )
                        x[T.Ramp((r // 2 * 4 + r % 2 + 2) * 8, 1, 8)] = T.Shuffle(
                            [y[T.Ramp((r // 2 * 4 + r % 2) * 8, 1, 8)], y[T.Ramp((r // 2 * 4 + r % 2 + 2) * 8, 1, 8)]],
                            HIGH_2,
                        )
                    for r in T.unroll(4):
                        y[T.Ramp((r // 4 * 8 + r % 4) * 8, 1, 8)] = T.Shuffle(
                            [x[T.Ramp((r // 4 * 8 + r % 4) * 8, 1, 8)], x[T.Ramp((r // 4 * 8 + r % 4 + 4) * 8, 1, 8)]],
                            LOW_4,
                        )
                        y[T.Ramp((r // 4 * 8 + r % 4 + 4) * 8, 1, 8)] = T.Shuffle(
                            [x[T.Ramp((r // 4 * 8 + r % 4) * 8, 1, 8)], x[T.Ramp((r // 4 * 8 + r % 4 + 4) * 8, 1, 8)]],
                            HIGH_4,
                        )
                    for r in T.unroll(8):
                        for i in T.vectorized(8):
                            rows[r * 8 + i] = y[r * 8 + i]
                    for c in T.serial(T.min(num_rows - block * 24 - j * 8, 8)):
                        row = first_row + block * 24 + j * 8 + c
                        to = row // 4 * out_stride_token + row % 4 * out_stride_head + d
                        later = T.min(row + 8, first_row + num_rows - 1)  # prefetched: one of the next vector
                        T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(OUT[later // 4 * out_stride_token + later % 4 * out_stride_head + d]), 0, 3, 1))
                        for i in T.vectorized(8):
                            OUT[to + i] = T.cast(rows[c * 8 + i], "float16")
            for c in T.serial(T.min(num_rows - block * 24, 24)):
                row = first_row + block * 24 + c
                LSE[row // 4 * 32 + row % 4] = T.float32(0.6931471805599453) * (
                    top[block * 24 + c] + T.call_pure_extern("float32", "log2f", sums[block * 24 + c])
                )
