/* Rows times a panel: 32 outputs of a weight, whose pairs of inputs lie below each other.

       x      rows of `pairs` pairs, `x_stride` pairs apart
       panel  [pairs, 32]  inputs 2i and 2i + 1 of output n
       out    rows of 32 numbers or fewer (`left`), `stride` numbers apart: bfloat16 or float */

#pragma once

#include "common.h"

enum { WIDTH = 32, VECTORS = WIDTH / 16, ROWS = MAX_SUMS / VECTORS, CHUNK = 96, LEAST = 1 << 15 };
/* CHUNK: rows that panels pass by together. LEAST: what a task should have, ten microseconds. */

INLINE void finish(const int rows, __m512 *sum, const bf16 *bias, void *out,
                   int is_float, long stride, long left) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
        __mmask16 mask = left <= 16 * v ? 0 : lanes(left - 16 * v);
        __m512 added = bias ? load16(bias + 16 * v, mask) : _mm512_setzero_ps();
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            __m512 value = bias ? _mm512_add_ps(sum[m * VECTORS + v], added) : sum[m * VECTORS + v];
            if (is_float)
                _mm512_mask_storeu_ps((float *)out + m * stride + 16 * v, mask, value);
            else
                store16((bf16 *)out + m * stride + 16 * v, mask, value);
        }
    }
}

INLINE void block(const int rows, const uint32_t *x, long x_stride, const uint32_t *panel,
                  long pairs, const bf16 *bias, void *out, int is_float, long stride, long left) {
    __m512 sum[ROWS * VECTORS];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[m * VECTORS + v] = _mm512_setzero_ps();
    multiply(rows, VECTORS, x, x_stride, panel, WIDTH, pairs, sum);
    finish(rows, sum, bias, out, is_float, stride, left);
}

/* CASE(R) for as many rows as a block may have: their number is known to the compiler */
#define EACH_NUMBER_OF_ROWS \
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)

static inline void rows_times_panel(long rows, const uint32_t *x, long x_stride, const uint32_t *panel,
                             long pairs, const bf16 *bias, char *out, int is_float, long stride,
                             long left) {
    long size = is_float ? 4 : 2;
    while (rows > 0) {
        /* equal blocks: 14 rows are 7 + 7, which reads a panel as often as 12 + 2 and idles less */
        long blocks = (rows + ROWS - 1) / ROWS, count = (rows + blocks - 1) / blocks;
        switch (count) {
#define CASE(R)                                                                              \
    case R:                                                                                  \
        block(R, x, x_stride, panel, pairs, bias, out, is_float, stride, left);              \
        break;
            EACH_NUMBER_OF_ROWS
#undef CASE
        }
        rows -= count;
        x += count * x_stride;
        out += count * stride * size;
    }
}
