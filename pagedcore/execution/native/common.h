/* What the kernels share: bfloat16 in and out of vectors, exp, and what all products are made of.

   A bfloat16 is the upper half of a float. A *pair* is two neighbours in one 32-bit word, the form
   in which the processor multiplies them: sum += a[0] * b[0] + a[1] * b[1], in float. */

#pragma once

#include "pool.h"

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum { MAX_SUMS = 24, AHEAD = 64 };
/* Vectors of sums in a product: with the operands' they fit in 32 registers. How many rows of B are
   on their way from memory: 8 KiB, since the processor's own prefetching ends with a page. */

INLINE __mmask16 lanes(long left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

INLINE __m512 widen(__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __m512 load16(const bf16 *from, __mmask16 mask) {
    return widen(_mm256_maskz_loadu_epi16(mask, from));
}

INLINE void store16(bf16 *to, __mmask16 mask, __m512 value) {
    _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(value));
}

INLINE float to_float(bf16 value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

/* e to the power of each x; 0 for -inf, NaN for NaN, for which max and min give the second. */
INLINE __m512 exp16(__m512 x) {
    __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    t = _mm512_max_ps(_mm512_set1_ps(-160.0f), t);
    t = _mm512_min_ps(_mm512_set1_ps(160.0f), t);
    __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(t, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f); /* 2 to the power of f by its Taylor series */
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, whole);
}

/* sum[m * vectors + v] += A times B: A has `rows` rows of `pairs` pairs, `a_stride` apart; B has
   `pairs` rows of 16 * `vectors` pairs, `b_stride` apart. With constant rows and vectors, whose
   product is at most MAX_SUMS, all sums stay in registers. */
INLINE void multiply(const int rows, const int vectors, const uint32_t *a, long a_stride,
                     const uint32_t *b, long b_stride, long pairs, __m512 *sum) {
    for (long i = 0; i < pairs; i++, b += b_stride) {
        __m512bh column[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) column[v] = (__m512bh)_mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            _mm_prefetch((const char *)(b + AHEAD * b_stride + 16 * v), _MM_HINT_T0);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            __m512bh row = (__m512bh)_mm512_set1_epi32((int)a[m * a_stride + i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sum[m * vectors + v] = _mm512_dpbf16_ps(sum[m * vectors + v], row, column[v]);
        }
    }
}

/* Exchange rows and columns of a square of 16 * 16 words. */
INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}
