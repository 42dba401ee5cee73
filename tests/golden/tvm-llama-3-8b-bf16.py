# decode_550d0140_5a9552f2: paged attention decode on a CPU, for one KV head of one sequence at a time
# spec      decode-h128-q32-kv8-b16-bf16-ktoken
# schedule  ahead1-dotbf16-intol2-k_heads4-k_vectors4-lanes16-streams4-tile64-v_heads2-v_vectors8
# target    x86_64-avx512bf16; pagedgen 0.1.0
#
# tile      64 tokens that are processed together, by all 4 query heads of the KV head
# unit      16 consecutive tokens of one block; k_units and v_units hold the offsets of the 4 of every tile
# state     a partial softmax: [4, 128] sums of p * V, [4] maximal scores (base 2), [4] sums of p
# next      what lies 4 units further on: prefetched line by line while this tile is read
# pair      two bf16 in an int32, for vdpbf16ps: dims d and d + 1 of q and K, tokens t and t + 32 of p and V

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
# Which elements of its rows a shuffle takes.
PAIR_DIMS = [0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31]
PAIR_TOKENS0 = [0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47]
PAIR_TOKENS1 = [16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63]


@I.ir_module
class Decode:
    @T.prim_func(s_tir=True)
    def tiles(
        q: T.handle("uint16"),
        k: T.handle("uint16"),
        v: T.handle("uint16"),
        k_units: T.handle("int64"),
        v_units: T.handle("int64"),
        state: T.handle("float32"),
        num_tiles: T.int32,
        num_tokens: T.int32,  # in these tiles; only the last may have fewer than 64
        zeros: T.int64,  # offset from v of a row of zeros, which stands in for tokens past the end
        q_stride: T.int64,  # of heads
        k_stride: T.int64,  # of head_dim
        v_stride: T.int64,  # of tokens
        scale: T.float32,  # of scores, to base 2
    ):
        T.func_attr({"global_symbol": "decode_550d0140_5a9552f2_tiles", "calling_conv": 3, "tirx.noalias": True})
        T.attr(T.int32(0), "pragma_import_llvm", LLVM)
        Q = T.decl_buffer((1,), "uint16", data=q)
        K = T.decl_buffer((1,), "uint16", data=k)
        V = T.decl_buffer((1,), "uint16", data=v)
        KU = T.decl_buffer((1,), "int64", data=k_units)
        VU = T.decl_buffer((1,), "int64", data=v_units)
        STATE = T.decl_buffer((520,), "float32", data=state)
        s = T.alloc_local((256,), "float32")  # [4, 64] scores, then p
        alpha = T.alloc_local((4,), "float32")  # [4] what the sums so far are scaled by
        p = T.alloc_local((128,), "int32")  # [4, 32] pairs
        v_row = T.alloc_local((64,), "int64")  # [64] offsets of the tokens of a tile
        v_next = T.alloc_local((64,), "int64")
        qs = T.alloc_local((256,), "int32")  # [4, 64] pairs
        for h in T.serial(4):
            for d in T.serial(64):
                qs[h * 64 + d] = T.bitwise_or(
                    T.cast(Q[h * q_stride + d * 2], "int32"),
                    T.shift_left(T.cast(Q[h * q_stride + d * 2 + 1], "int32"), 16),
                )

        for tile in T.serial(num_tiles):
            for n in T.serial(4):
                for c in T.serial(2):
                    for i in T.vectorized(8):
                        v_row[n * 16 + c * 8 + i] = T.Select(tile * 64 + n * 16 + c * 8 + i < num_tokens, VU[tile * 4 + n] + (c * 8 + i) * v_stride, zeros)
                        v_next[n * 16 + c * 8 + i] = VU[tile * 4 + n + 4] + (c * 8 + i) * v_stride

            # s = q @ K^T
            for hb in T.serial(1):
                for tb in T.unroll(1):
                    acc = T.alloc_local((256,), "float32")  # [4, 64]
                    for j in T.unroll(16):
                        for i in T.vectorized(16):
                            acc[j * 16 + i] = T.float32(0)
                    for db in T.serial(64):
                        step = (hb * 1 + tb) * 64 + db  # of 64, over which 256 prefetches are spread
                        for l in T.unroll(4):
                            line = step * 4 + l
                            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(K[KU[tile * 4 + 4 + line // 256 * 4 + line % 4] + line // 4 % 64 * 2 * k_stride]), 0, 2, 1))
                        for db_row in T.unroll(1):
                            raw = T.alloc_local((128,), "uint16")  # [2, 64]
                            for r in T.unroll(2):
                                for c in T.unroll(4):
                                    for i in T.vectorized(16):
                                        raw[r * 64 + c * 16 + i] = K[
                                            KU[tile * 4 + (tb * 64 + c * 16) // 16]
                                            + (tb * 64 + c * 16) % 16
                                            + (db * 2 + db_row * 2 + r) * k_stride
                                            + i
                                        ]
                            for j in T.unroll(4):
                                mixed = T.Shuffle(
                                    [raw[T.Ramp(j * 16, 1, 16)], raw[T.Ramp(64 + j * 16, 1, 16)]],
                                    PAIR_DIMS,
                                )
                                pairs = T.reinterpret("int32x16", mixed)
                                for h in T.unroll(4):
                                    acc[T.Ramp((h * 4 + j) * 16, 1, 16)] = T.call_pure_extern(
                                        "float32x16",
                                        "dot16",
                                        acc[T.Ramp((h * 4 + j) * 16, 1, 16)],
                                        pairs,
                                        T.Broadcast(qs[(hb * 4 + h) * 64 + db * 1 + db_row * 1], 16),
                                    )
                    for h in T.unroll(4):
                        for j in T.unroll(4):
                            for i in T.vectorized(16):
                                s[(hb * 4 + h) * 64 + tb * 64 + j * 16 + i] = acc[(h * 4 + j) * 16 + i]

            # p = softmax(s), online: the sums so far shrink by alpha when the maximum grows
            for h in T.serial(4):
                for l in T.unroll(8):
                    line = T.min(h * 8 + l, 31)
                    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(V[v_next[line % 4 * 16 + line // 16] + line // 4 % 4 * 32]), 0, 2, 1))
                x = T.alloc_local((16,), "float32")
                n = T.alloc_local((16,), "float32")
                total = T.alloc_local((16,), "float32")
                for i in T.vectorized(16):
                    x[i] = T.float32(-1e30)
                    total[i] = T.float32(0)
                for j in T.unroll(4):
                    for i in T.vectorized(16):
                        s[h * 64 + j * 16 + i] = T.Select(
                            tile * 64 + j * 16 + i < num_tokens, s[h * 64 + j * 16 + i] * scale, T.float32(-1e30)
                        )
                    for i in T.vectorized(16):
                        x[i] = T.max(x[i], s[h * 64 + j * 16 + i])
                old = STATE[512 + h]
                new = T.max(old, T.call_pure_extern("float32", "max_lanes", x[T.Ramp(0, 1, 16)]))
                STATE[512 + h] = new
                for i in T.vectorized(16):
                    x[i] = T.max(old - new, T.float32(-126))
                for i in T.vectorized(16):  # 2^x: n is x rounded to an integer,
                    n[i] = x[i] + T.float32(12582912)
                for i in T.vectorized(16):
                    x[i] = x[i] - (n[i] - T.float32(12582912))
                for i in T.vectorized(16):  # 2^(x - n) a polynomial, n goes to the exponent
                    x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                alpha[h] = x[0]
                for j in T.unroll(4):
                    for i in T.vectorized(16):  # far past the end: 2^-126, times a row of zeros
                        x[i] = T.max(s[h * 64 + j * 16 + i] - new, T.float32(-126))
                    for i in T.vectorized(16):  # 2^x: n is x rounded to an integer,
                        n[i] = x[i] + T.float32(12582912)
                    for i in T.vectorized(16):
                        x[i] = x[i] - (n[i] - T.float32(12582912))
                    for i in T.vectorized(16):  # 2^(x - n) a polynomial, n goes to the exponent
                        x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                    for i in T.vectorized(16):
                        s[h * 64 + j * 16 + i] = x[i]
                    for i in T.vectorized(16):
                        total[i] = total[i] + x[i]
                STATE[516 + h] = STATE[516 + h] * alpha[h] + T.call_pure_extern("float32", "sum_lanes", total[T.Ramp(0, 1, 16)])
                for j in T.unroll(2):
                    p[T.Ramp(h * 32 + j * 16, 1, 16)] = T.call_pure_extern(
                        "int32x16",
                        "pack",
                        s[T.Ramp(h * 64 + j * 16, 1, 16)],
                        s[T.Ramp(h * 64 + 32 + j * 16, 1, 16)],
                    )

            # state = state * alpha + p @ V
            for hb in T.serial(2):
                for cb in T.serial(1):
                    acc = T.alloc_local((256,), "float32")  # [2, 128]
                    for h in T.unroll(2):
                        for j in T.unroll(8):
                            for i in T.vectorized(16):
                                acc[(h * 8 + j) * 16 + i] = (
                                    STATE[(hb * 2 + h) * 128 + (cb * 8 + j) * 16 + i] * alpha[hb * 2 + h]
                                )
                    for r in T.serial(16):
                        step = (hb * 1 + cb) * 16 + r  # of 32, over which 224 prefetches are spread
                        for l in T.unroll(7):
                            line = step * 7 + l + 32
                            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(V[v_next[line % 4 * 16 + line // 16] + line // 4 % 4 * 32]), 0, 2, 1))
                        for n in T.unroll(2):
                            t = n * 16 + r
                            for j in T.unroll(4):
                                row0 = V[T.Ramp(v_row[t] + (cb * 8 + j * 2) * 16, T.int64(1), 32)]
                                row1 = V[T.Ramp(v_row[t + 32] + (cb * 8 + j * 2) * 16, T.int64(1), 32)]
                                pair0 = T.reinterpret("int32x16", T.Shuffle([row0, row1], PAIR_TOKENS0))
                                pair1 = T.reinterpret("int32x16", T.Shuffle([row0, row1], PAIR_TOKENS1))
                                for h in T.unroll(2):
                                    acc[T.Ramp((h * 8 + j * 2) * 16, 1, 16)] = T.call_pure_extern(
                                        "float32x16",
                                        "dot16",
                                        acc[T.Ramp((h * 8 + j * 2) * 16, 1, 16)],
                                        pair0,
                                        T.Broadcast(p[(hb * 2 + h) * 32 + t], 16),
                                    )
                                    acc[T.Ramp((h * 8 + j * 2 + 1) * 16, 1, 16)] = T.call_pure_extern(
                                        "float32x16",
                                        "dot16",
                                        acc[T.Ramp((h * 8 + j * 2 + 1) * 16, 1, 16)],
                                        pair1,
                                        T.Broadcast(p[(hb * 2 + h) * 32 + t], 16),
                                    )
                    for h in T.unroll(2):
                        for j in T.unroll(8):
                            for i in T.vectorized(16):
                                STATE[(hb * 2 + h) * 128 + (cb * 8 + j) * 16 + i] = acc[(h * 8 + j) * 16 + i]

    @T.prim_func(s_tir=True)
    def merge(
        states: T.handle("float32"),
        offsets: T.handle("int64"),  # [num_states], of each state
        out: T.handle("uint16"),
        lse: T.handle("float32"),  # none
        num_states: T.int32,
        out_stride: T.int64,  # of heads
        scale: T.float32,  # of V
    ):
        T.func_attr({"global_symbol": "decode_550d0140_5a9552f2_merge", "calling_conv": 3, "tirx.noalias": True})
        S = T.decl_buffer((1,), "float32", data=states)
        AT = T.decl_buffer((1,), "int64", data=offsets)
        O = T.decl_buffer((1,), "uint16", data=out)
        for h in T.serial(4):
            top = T.alloc_local((1,), "float32")
            total = T.alloc_local((1,), "float32")
            acc = T.alloc_local((128,), "float32")
            top[0] = T.float32(-1e30)
            total[0] = T.float32(0)
            for c in T.unroll(8):
                for i in T.vectorized(16):
                    acc[c * 16 + i] = T.float32(0)
            for n in T.serial(num_states):
                top[0] = T.max(top[0], S[AT[n] + 512 + h])
            for n in T.serial(num_states):
                w = T.call_pure_extern("float32", "exp2f", S[AT[n] + 512 + h] - top[0])
                total[0] = total[0] + w * S[AT[n] + 516 + h]
                for c in T.unroll(8):
                    for i in T.vectorized(16):
                        acc[c * 16 + i] += w * S[AT[n] + h * 128 + c * 16 + i]
            norm = scale / total[0]
            for c in T.unroll(8):
                for i in T.vectorized(16):
                    acc[c * 16 + i] = acc[c * 16 + i] * norm
                for i in T.vectorized(16):
                    O[h * out_stride + c * 16 + i] = T.cast(T.shift_right(T.reinterpret("uint32", acc[c * 16 + i]) + T.uint32(32767) + T.bitwise_and(T.shift_right(T.reinterpret("uint32", acc[c * 16 + i]), T.uint32(16)), T.uint32(1)), T.uint32(16)), "uint16")
