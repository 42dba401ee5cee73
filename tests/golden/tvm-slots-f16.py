# decode_6b0cddd0_ac33e3fa: paged attention decode on a CPU, for one KV head of one sequence at a time
# spec      decode-h128-q32-kv8-b1-f16
# schedule  ahead1-dotf32-intol2-k_heads4-k_vectors1-lanes16-streams8-tile128-v_heads2-v_vectors8
# target    x86_64-avx512bf16; pagedgen 0.1.0
#
# tile      128 tokens that are processed together, by all 4 query heads of the KV head
# unit      1 consecutive tokens of one block; k_units and v_units hold the offsets of the 128 of every tile
# state     a partial softmax: [4, 128] sums of p * V, [4] maximal scores (base 2), [4] sums of p
# next      what lies 128 units further on: prefetched line by line while this tile is read

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
define <16 x float> @sum_rows(<16 x float> %a0.0, <16 x float> %a0.1, <16 x float> %a0.2, <16 x float> %a0.3, <16 x float> %a0.4, <16 x float> %a0.5, <16 x float> %a0.6, <16 x float> %a0.7, <16 x float> %a0.8, <16 x float> %a0.9, <16 x float> %a0.10, <16 x float> %a0.11, <16 x float> %a0.12, <16 x float> %a0.13, <16 x float> %a0.14, <16 x float> %a0.15) alwaysinline nounwind {
  %x0.0 = shufflevector <16 x float> %a0.0, <16 x float> %a0.1, <16 x i32> <i32 0, i32 16, i32 1, i32 17, i32 4, i32 20, i32 5, i32 21, i32 8, i32 24, i32 9, i32 25, i32 12, i32 28, i32 13, i32 29>
  %y0.0 = shufflevector <16 x float> %a0.0, <16 x float> %a0.1, <16 x i32> <i32 2, i32 18, i32 3, i32 19, i32 6, i32 22, i32 7, i32 23, i32 10, i32 26, i32 11, i32 27, i32 14, i32 30, i32 15, i32 31>
  %a1.0 = fadd <16 x float> %x0.0, %y0.0
  %x0.1 = shufflevector <16 x float> %a0.2, <16 x float> %a0.3, <16 x i32> <i32 0, i32 16, i32 1, i32 17, i32 4, i32 20, i32 5, i32 21, i32 8, i32 24, i32 9, i32 25, i32 12, i32 28, i32 13, i32 29>
  %y0.1 = shufflevector <16 x float> %a0.2, <16 x float> %a0.3, <16 x i32> <i32 2, i32 18, i32 3, i32 19, i32 6, i32 22, i32 7, i32 23, i32 10, i32 26, i32 11, i32 27, i32 14, i32 30, i32 15, i32 31>
  %a1.1 = fadd <16 x float> %x0.1, %y0.1
  %x0.2 = shufflevector <16 x float> %a0.4, <16 x float> %a0.5, <16 x i32> <i32 0, i32 16, i32 1, i32 17, i32 4, i32 20, i32 5, i32 21, i32 8, i32 24, i32 9, i32 25, i32 12, i32 28, i32 13, i32 29>
  %y0.2 = shufflevector <16 x float> %a0.4, <16 x float> %a0.5, <16 x i32> <i32 2, i32 18, i32 3, i32 19, i32 6, i32 22, i32 7, i32 23, i32 10, i32 26, i32 11, i32 27, i32 14, i32 30, i32 15, i32 31>
  %a1.2 = fadd <16 x float> %x0.2, %y0.2
  %x0.3 = shufflevector <16 x float> %a0.6, <16 x float> %a0.7, <16 x i32> <i32 0, i32 16, i32 1, i32 17, i32 4, i32 20, i32 5, i32 21, i32 8, i32 24, i32 9, i32 25, i32 12, i32 28, i32 13, i32 29>
  %y0.3 = shufflevector <16 x float> %a0.6, <16 x float> %a0.7, <16 x i32> <i32 2, i32 18, i32 3, i32 19, i32 6, i32 22, i32 7, i32 23, i32 10, i32 26, i32 11, i32 27, i32 14, i32 30, i32 15, i32 31>
  %a1.3 = fadd <16 x float> %x0.3, %y0.3
  %x0.4 = shufflevector <16 x float> %a0.8, <16 x float> %a0.9, <16 x i32> <i32 0, i32 16, i32 1, i32 17, i32 4, i32 20, i32 5, i32 21, i32 8, i32 24, i32 9, i32 25, i32 12, i32 28, i32 13, i32 29>
  %y0.4 = shufflevector <16 x float> %a0.8, <16 x float> %a0.9, <16 x i32> <i32 2, i32 18, i32 3, i32 19, i32 6, i32 22, i32 7, i32 23, i32 10, i32 26, i32 11, i32 27, i32 14, i32 30, i32 15, i32 31>
  %a1.4 = fadd <16 x float> %x0.4, %y0.4
  %x0.5 = shufflevector <16 x float> %a0.10, <16 x float> %a0.11, <16 x i32> <i32 0, i32 16, i32 1, i32 17, i32 4, i32 20, i32 5, i32 21, i32 8, i32 24, i32 9, i32 25, i32 12, i32 28, i32 13, i32 29>
  %y0.5 = shufflevector <16 x float> %a0.10, <16 x float> %a0.11, <16 x i32> <i32 2, i32 18, i32 3, i32 19, i32 6, i32 22, i32 7, i32 23, i32 10, i32 26, i32 11, i32 27, i32 14, i32 30, i32 15, i32 31>
  %a1.5 = fadd <16 x float> %x0.5, %y0.5
  %x0.6 = shufflevector <16 x float> %a0.12, <16 x float> %a0.13, <16 x i32> <i32 0, i32 16, i32 1, i32 17, i32 4, i32 20, i32 5, i32 21, i32 8, i32 24, i32 9, i32 25, i32 12, i32 28, i32 13, i32 29>
  %y0.6 = shufflevector <16 x float> %a0.12, <16 x float> %a0.13, <16 x i32> <i32 2, i32 18, i32 3, i32 19, i32 6, i32 22, i32 7, i32 23, i32 10, i32 26, i32 11, i32 27, i32 14, i32 30, i32 15, i32 31>
  %a1.6 = fadd <16 x float> %x0.6, %y0.6
  %x0.7 = shufflevector <16 x float> %a0.14, <16 x float> %a0.15, <16 x i32> <i32 0, i32 16, i32 1, i32 17, i32 4, i32 20, i32 5, i32 21, i32 8, i32 24, i32 9, i32 25, i32 12, i32 28, i32 13, i32 29>
  %y0.7 = shufflevector <16 x float> %a0.14, <16 x float> %a0.15, <16 x i32> <i32 2, i32 18, i32 3, i32 19, i32 6, i32 22, i32 7, i32 23, i32 10, i32 26, i32 11, i32 27, i32 14, i32 30, i32 15, i32 31>
  %a1.7 = fadd <16 x float> %x0.7, %y0.7
  %x1.0 = shufflevector <16 x float> %a1.0, <16 x float> %a1.1, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %y1.0 = shufflevector <16 x float> %a1.0, <16 x float> %a1.1, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %a2.0 = fadd <16 x float> %x1.0, %y1.0
  %x1.1 = shufflevector <16 x float> %a1.2, <16 x float> %a1.3, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %y1.1 = shufflevector <16 x float> %a1.2, <16 x float> %a1.3, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %a2.1 = fadd <16 x float> %x1.1, %y1.1
  %x1.2 = shufflevector <16 x float> %a1.4, <16 x float> %a1.5, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %y1.2 = shufflevector <16 x float> %a1.4, <16 x float> %a1.5, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %a2.2 = fadd <16 x float> %x1.2, %y1.2
  %x1.3 = shufflevector <16 x float> %a1.6, <16 x float> %a1.7, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %y1.3 = shufflevector <16 x float> %a1.6, <16 x float> %a1.7, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %a2.3 = fadd <16 x float> %x1.3, %y1.3
  %x2.0 = shufflevector <16 x float> %a2.0, <16 x float> %a2.1, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 8, i32 9, i32 10, i32 11, i32 16, i32 17, i32 18, i32 19, i32 24, i32 25, i32 26, i32 27>
  %y2.0 = shufflevector <16 x float> %a2.0, <16 x float> %a2.1, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 12, i32 13, i32 14, i32 15, i32 20, i32 21, i32 22, i32 23, i32 28, i32 29, i32 30, i32 31>
  %a3.0 = fadd <16 x float> %x2.0, %y2.0
  %x2.1 = shufflevector <16 x float> %a2.2, <16 x float> %a2.3, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 8, i32 9, i32 10, i32 11, i32 16, i32 17, i32 18, i32 19, i32 24, i32 25, i32 26, i32 27>
  %y2.1 = shufflevector <16 x float> %a2.2, <16 x float> %a2.3, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 12, i32 13, i32 14, i32 15, i32 20, i32 21, i32 22, i32 23, i32 28, i32 29, i32 30, i32 31>
  %a3.1 = fadd <16 x float> %x2.1, %y2.1
  %x3.0 = shufflevector <16 x float> %a3.0, <16 x float> %a3.1, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 8, i32 9, i32 10, i32 11, i32 16, i32 17, i32 18, i32 19, i32 24, i32 25, i32 26, i32 27>
  %y3.0 = shufflevector <16 x float> %a3.0, <16 x float> %a3.1, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 12, i32 13, i32 14, i32 15, i32 20, i32 21, i32 22, i32 23, i32 28, i32 29, i32 30, i32 31>
  %a4.0 = fadd <16 x float> %x3.0, %y3.0
  ret <16 x float> %a4.0
}
"""


@I.ir_module
class Decode:
    @T.prim_func(s_tir=True)
    def tiles(
        q: T.handle("float16"),
        k: T.handle("float16"),
        v: T.handle("float16"),
        k_units: T.handle("int64"),
        v_units: T.handle("int64"),
        state: T.handle("float32"),
        num_tiles: T.int32,
        num_tokens: T.int32,  # in these tiles; only the last may have fewer than 128
        zeros: T.int64,  # offset from v of a row of zeros, which stands in for tokens past the end
        q_stride: T.int64,  # of heads
        k_stride: T.int64,  # of tokens
        v_stride: T.int64,  # of tokens
        scale: T.float32,  # of scores, to base 2
    ):
        T.func_attr({"global_symbol": "decode_6b0cddd0_ac33e3fa_tiles", "calling_conv": 3, "tirx.noalias": True})
        T.attr(T.int32(0), "pragma_import_llvm", LLVM)
        Q = T.decl_buffer((1,), "float16", data=q)
        K = T.decl_buffer((1,), "float16", data=k)
        V = T.decl_buffer((1,), "float16", data=v)
        KU = T.decl_buffer((1,), "int64", data=k_units)
        VU = T.decl_buffer((1,), "int64", data=v_units)
        STATE = T.decl_buffer((520,), "float32", data=state)
        s = T.alloc_local((512,), "float32")  # [4, 128] scores, then p
        alpha = T.alloc_local((4,), "float32")  # [4] what the sums so far are scaled by
        k_row = T.alloc_local((128,), "int64")  # [128] offsets of the tokens of a tile
        k_next = T.alloc_local((128,), "int64")
        v_row = T.alloc_local((128,), "int64")  # [128] offsets of the tokens of a tile
        v_next = T.alloc_local((128,), "int64")
        qs = T.alloc_local((512,), "float32")  # [4, 128]
        for h in T.serial(4):
            for c in T.serial(8):
                for i in T.vectorized(16):
                    qs[h * 128 + c * 16 + i] = T.cast(Q[h * q_stride + c * 16 + i], "float32")

        for tile in T.serial(num_tiles):
            for n in T.serial(128):
                for c in T.serial(1):
                    for i in T.unroll(1):
                        k_row[n * 1 + c * 1 + i] = KU[tile * 128 + n] + (c * 1 + i) * k_stride
                        k_next[n * 1 + c * 1 + i] = KU[tile * 128 + n + 128] + (c * 1 + i) * k_stride
                        v_row[n * 1 + c * 1 + i] = T.Select(tile * 128 + n * 1 + c * 1 + i < num_tokens, VU[tile * 128 + n] + (c * 1 + i) * v_stride, zeros)
                        v_next[n * 1 + c * 1 + i] = VU[tile * 128 + n + 128] + (c * 1 + i) * v_stride

            # s = q @ K^T
            for hb in T.serial(1):
                h0 = T.min(hb * 4, 0)
                for tb in T.serial(32):
                    acc = T.alloc_local((256,), "float32")  # [4, 4, 16]
                    for j in T.unroll(16):
                        for i in T.vectorized(16):
                            acc[j * 16 + i] = T.float32(0)
                    for t in T.unroll(4):
                        for l in T.unroll(4):
                            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(K[k_next[tb * 4 + t] + l * 32]), 0, 2, 1))
                    for c in T.serial(8):
                        x = T.alloc_local((64,), "float32")
                        for t in T.unroll(4):
                            for i in T.vectorized(16):
                                x[t * 16 + i] = T.cast(K[k_row[tb * 4 + t] + c * 16 + i], "float32")
                        for h in T.unroll(4):
                            for t in T.unroll(4):
                                for i in T.vectorized(16):
                                    acc[(h * 4 + t) * 16 + i] += qs[(h0 + h) * 128 + c * 16 + i] * x[t * 16 + i]
                    sums = T.alloc_local((16,), "float32")  # [4, 4]
                    sums[T.Ramp(0, 1, 16)] = T.call_pure_extern(
                        "float32x16",
                        "sum_rows",
                        acc[T.Ramp(0, 1, 16)],
                        acc[T.Ramp(16, 1, 16)],
                        acc[T.Ramp(32, 1, 16)],
                        acc[T.Ramp(48, 1, 16)],
                        acc[T.Ramp(64, 1, 16)],
                        acc[T.Ramp(80, 1, 16)],
                        acc[T.Ramp(96, 1, 16)],
                        acc[T.Ramp(112, 1, 16)],
                        acc[T.Ramp(128, 1, 16)],
                        acc[T.Ramp(144, 1, 16)],
                        acc[T.Ramp(160, 1, 16)],
                        acc[T.Ramp(176, 1, 16)],
                        acc[T.Ramp(192, 1, 16)],
                        acc[T.Ramp(208, 1, 16)],
                        acc[T.Ramp(224, 1, 16)],
                        acc[T.Ramp(240, 1, 16)],
                    )
                    for h in T.unroll(4):
                        for i in T.vectorized(4):
                            s[(h0 + h) * 128 + tb * 4 + i] = sums[h * 4 + i]

            # p = softmax(s), online: the sums so far shrink by alpha when the maximum grows
            for h in T.serial(4):
                for l in T.unroll(16):
                    line = T.min(h * 16 + l, 63)
                    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(V[v_next[line % 8 * 16 + line // 32] + line // 8 % 4 * 32]), 0, 2, 1))
                x = T.alloc_local((16,), "float32")
                n = T.alloc_local((16,), "float32")
                total = T.alloc_local((16,), "float32")
                for i in T.vectorized(16):
                    x[i] = T.float32(-1e30)
                    total[i] = T.float32(0)
                for j in T.unroll(8):
                    for i in T.vectorized(16):
                        s[h * 128 + j * 16 + i] = T.Select(
                            tile * 128 + j * 16 + i < num_tokens, s[h * 128 + j * 16 + i] * scale, T.float32(-1e30)
                        )
                    for i in T.vectorized(16):
                        x[i] = T.max(x[i], s[h * 128 + j * 16 + i])
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
                for j in T.unroll(8):
                    for i in T.vectorized(16):  # far past the end: 2^-126, times a row of zeros
                        x[i] = T.max(s[h * 128 + j * 16 + i] - new, T.float32(-126))
                    for i in T.vectorized(16):  # 2^x: n is x rounded to an integer,
                        n[i] = x[i] + T.float32(12582912)
                    for i in T.vectorized(16):
                        x[i] = x[i] - (n[i] - T.float32(12582912))
                    for i in T.vectorized(16):  # 2^(x - n) a polynomial, n goes to the exponent
                        x[i] = T.reinterpret("float32", T.reinterpret("int32", (((((T.float32(0.00134404927) * x[i] + T.float32(0.00967211641)) * x[i] + T.float32(0.0555017106)) * x[i] + T.float32(0.240222294)) * x[i] + T.float32(0.693147348)) * x[i] + T.float32(1.0))) + T.shift_left(T.reinterpret("int32", n[i]), 23))
                    for i in T.vectorized(16):
                        s[h * 128 + j * 16 + i] = x[i]
                    for i in T.vectorized(16):
                        total[i] = total[i] + x[i]
                STATE[516 + h] = STATE[516 + h] * alpha[h] + T.call_pure_extern("float32", "sum_lanes", total[T.Ramp(0, 1, 16)])

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
                        step = (hb * 1 + cb) * 16 + r  # of 32, over which 448 prefetches are spread
                        for l in T.unroll(14):
                            line = step * 14 + l + 64
                            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(V[v_next[line % 8 * 16 + line // 32] + line // 8 % 4 * 32]), 0, 2, 1))
                        for n in T.unroll(8):
                            t = n * 16 + r
                            x = T.alloc_local((128,), "float32")
                            for j in T.unroll(8):
                                for i in T.vectorized(16):
                                    x[j * 16 + i] = T.cast(V[v_row[t] + (cb * 8 + j) * 16 + i], "float32")
                            for h in T.unroll(2):
                                for j in T.unroll(8):
                                    for i in T.vectorized(16):
                                        acc[(h * 8 + j) * 16 + i] += s[(hb * 2 + h) * 128 + t] * x[j * 16 + i]
                    for h in T.unroll(2):
                        for j in T.unroll(8):
                            for i in T.vectorized(16):
                                STATE[(hb * 2 + h) * 128 + (cb * 8 + j) * 16 + i] = acc[(h * 8 + j) * 16 + i]

    @T.prim_func(s_tir=True)
    def merge(
        states: T.handle("float32"),
        offsets: T.handle("int64"),  # [num_states], of each state
        out: T.handle("float16"),
        lse: T.handle("float32"),  # none
        num_states: T.int32,
        out_stride: T.int64,  # of heads
        scale: T.float32,  # of V
    ):
        T.func_attr({"global_symbol": "decode_6b0cddd0_ac33e3fa_merge", "calling_conv": 3, "tirx.noalias": True})
        S = T.decl_buffer((1,), "float32", data=states)
        AT = T.decl_buffer((1,), "int64", data=offsets)
        O = T.decl_buffer((1,), "float16", data=out)
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
                    O[h * out_stride + c * 16 + i] = T.cast(acc[c * 16 + i], "float16")
