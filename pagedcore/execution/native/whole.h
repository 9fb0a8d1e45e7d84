/* Rows of bytes times a panel of codes: sums of whole numbers, without an error.

       x      rows of signed bytes, four inputs in a word, `x_stride` words apart
       codes  [steps, 32]  words of 32 / b codes of b bits, unsigned. Of four bits, the lower halves
              of a word's bytes are inputs 0 4 1 5 of its eight, and the upper ones 2 6 3 7. */

#pragma once

#include "panels.h"

#include <math.h>

/* Sixteen sums. As __m512i, which is eight numbers to the compiler, it would copy each in every turn. */
typedef int32_t Sums __attribute__((vector_size(64)));

INLINE Sums sums_of(int32_t value) { return (Sums)_mm512_set1_epi32(value); }

/* With constant rows and bits, all sums stay in registers. */
INLINE void multiply_whole(const int rows, const int bits, const uint32_t *x, long x_stride,
                           const uint32_t *codes, long steps, Sums *sum) {
    const int parts = 8 / bits;
    __m512i low = _mm512_set1_epi8(15);
    for (long i = 0; i < steps; i++, codes += WIDTH, x += parts) {
        __m512i column[VECTORS * 2];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            __m512i word = _mm512_loadu_si512(codes + 16 * v);
            _mm_prefetch((const char *)(codes + AHEAD * WIDTH + 16 * v), _MM_HINT_T0);
            column[v] = bits == 4 ? _mm512_and_si512(word, low) : word;
            if (bits == 4)
                column[VECTORS + v] = _mm512_and_si512(_mm512_srli_epi16(word, 4), low);
        }
#pragma GCC unroll 2
        for (int p = 0; p < parts; p++)
#pragma GCC unroll 12
            for (int m = 0; m < rows; m++) {
                __m512i row = _mm512_set1_epi32((int)x[m * x_stride + p]);
#pragma GCC unroll 2
                for (int v = 0; v < VECTORS; v++) {
                    Sums *to = sum + m * VECTORS + v;
                    *to = (Sums)_mm512_dpbusd_epi32((__m512i)*to, column[p * VECTORS + v], row);
                }
            }
    }
}

/* Where the inputs of words of codes come from, for a vector of them. */
INLINE __m512i order_of(int bits) {
    static const int eight[16] = {0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15};
    static const int four[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return _mm512_loadu_si512(bits == 4 ? eight : four);
}

/* The largest magnitude of `size` numbers; infinity or NaN where one is. */
INLINE float largest_of(const bf16 *x, long size) {
    __m512i largest = _mm512_setzero_si512();
    for (long i = 0; i < size; i += 32) {
        __mmask32 mask = size - i >= 32 ? 0xffffffffu : (1u << (size - i)) - 1;
        __m512i magnitude =
            _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, x + i), _mm512_set1_epi16(0x7fff));
        largest = _mm512_max_epu16(largest, magnitude);
    }
    /* as bits, magnitudes have the same order, and NaN is above infinity */
    __m512i even = _mm512_slli_epi32(largest, 16);
    __m512i odd = _mm512_and_si512(largest, _mm512_set1_epi32((int)0xffff0000));
    uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(even, odd));
    float top;
    memcpy(&top, &bits, 4);
    return top;
}

/* `size` numbers as whole ones of 16 bits: bytes that count 256, and bytes that count 1. Returns
   what these count; `sum` is the sum of the whole numbers. Infinity and NaN become NaN, and numbers
   of which none is above 1e-30 become zero. */
INLINE float round_group(const bf16 *x, long size, __m512i order, int8_t *high, int8_t *low,
                         int32_t *sum) {
    float top = largest_of(x, size);
    int counts = top > 1e-30f && top < INFINITY;
    __m512 inverse = _mm512_set1_ps(counts ? 32512.0f / top : 0.0f);
    __m512i total = _mm512_setzero_si512();
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        __m512 value = counts ? load16(x + i, mask) : _mm512_setzero_ps();
        __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
        total = _mm512_add_epi32(total, number);
        number = _mm512_permutexvar_epi32(order, number);
        __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
        __m512i rest = _mm512_sub_epi32(number, _mm512_slli_epi32(upper, 8));
        _mm_mask_storeu_epi8(high + i, mask, _mm512_cvtepi32_epi8(upper));
        _mm_mask_storeu_epi8(low + i, mask, _mm512_cvtepi32_epi8(rest));
    }
    *sum = _mm512_reduce_add_epi32(total);
    if (counts) return top / 32512.0f;
    return top <= 1e-30f ? 0.0f : NAN;
}
