/* Linear layers in 8 bits: rows that are rounded on their way times a weight of bytes.

       T rows   N outputs   P = ceil(N / 32) panels   I inputs, a multiple of 4

       x        [T, I]          bfloat16
       codes    [P, I / 4, 32]  words: four inputs of output 32 p + n, 128 above what they stand for
       scales   [N]             float: what an output's numbers count
       room     [T, I] bytes, then [T] floats and [T] words, for the rounded rows
       out      [T, N]          bfloat16

   Each row becomes whole numbers up to 127 of its largest magnitude. Their products are summed
   without an error, and rows pass by the panels as in `linear.c`. */

#include "whole.h"

#include <float.h>

typedef struct {
    const bf16 *x;
    long rows, inputs, num_tasks;
    int8_t *bytes;
    float *counts;
    int32_t *starts;
} Rounding;

static void round_some(void *context, long task) {
    const Rounding *c = context;
    long end = c->rows * (task + 1) / c->num_tasks;
    for (long t = c->rows * task / c->num_tasks; t < end; t++) {
        const bf16 *x = c->x + t * c->inputs;
        float top = largest_of(x, c->inputs), count = top < INFINITY ? top / 127.0f : NAN;
        if (count < FLT_MIN) count = FLT_MIN;
        __m512 divisor = _mm512_set1_ps(count);
        __m512i total = _mm512_setzero_si512();
        for (long i = 0; i < c->inputs; i += 16) {
            __mmask16 mask = lanes(c->inputs - i);
            __m512i number = _mm512_cvtps_epi32(_mm512_div_ps(load16(x + i, mask), divisor));
            total = _mm512_add_epi32(total, number);
            _mm_mask_storeu_epi8(c->bytes + t * c->inputs + i, mask,
                                 _mm512_cvtepi32_epi8(number));
        }
        c->counts[t] = count;
        c->starts[t] = (int32_t)(-128u * (uint32_t)_mm512_reduce_add_epi32(total));
    }
}

typedef struct {
    const Rounding *rounded;
    const uint32_t *codes;
    const float *scales;
    long outputs;
    const bf16 *bias;
    bf16 *out;
    long panels, tiles, grain;
} Product;

INLINE void some_rows(const int rows, const Product *p, long first, long panel) {
    const Rounding *r = p->rounded;
    long words = r->inputs / 4, column = panel * WIDTH;
    Sums sum[ROWS * VECTORS];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++)
            sum[m * VECTORS + v] = sums_of(r->starts[first + m]);
    multiply_whole(rows, 8, (const uint32_t *)r->bytes + first * words, words,
                   p->codes + panel * words * WIDTH, words, sum);
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
        long left = p->outputs - column - 16 * v;
        __mmask16 mask = left <= 0 ? 0 : lanes(left);
        __m512 scale = _mm512_maskz_loadu_ps(mask, p->scales + column + 16 * v);
        __m512 added = p->bias ? load16(p->bias + column + 16 * v, mask) : _mm512_setzero_ps();
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            __m512 count = _mm512_set1_ps(r->counts[first + m]);
            __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sum[m * VECTORS + v]), count);
            value = _mm512_mul_ps(value, scale);
            value = p->bias ? _mm512_add_ps(value, added) : value;
            store16(p->out + (first + m) * p->outputs + column + 16 * v, mask, value);
        }
    }
}

/* Tile c * panels + p is panel p for the rows of chunk c; a task is `grain` tiles. */
static void multiply_tiles(void *context, long task) {
    const Product *p = context;
    long all = p->rounded->rows;
    long end = (task + 1) * p->grain < p->tiles ? (task + 1) * p->grain : p->tiles;
    for (long tile = task * p->grain; tile < end; tile++) {
        long first = tile / p->panels * CHUNK, panel = tile % p->panels;
        long stop = first + CHUNK < all ? first + CHUNK : all;
        while (first < stop) {
            long left = stop - first, blocks = (left + ROWS - 1) / ROWS;
            long count = (left + blocks - 1) / blocks;
            switch (count) {
#define CASE(R)                         \
    case R:                             \
        some_rows(R, p, first, panel);  \
        break;
                EACH_NUMBER_OF_ROWS
#undef CASE
            }
            first += count;
        }
    }
}

EXPORT void pagedcore_bytes(const bf16 *x, long rows, long inputs, const uint32_t *codes,
                            const float *scales, long outputs, const bf16 *bias, void *room,
                            bf16 *out) {
    if (rows == 0 || outputs == 0) return;
    float *counts = (float *)((char *)room + rows * inputs);
    Rounding rounding = {x, rows, inputs, pagedcore_num_tasks(rows * inputs, LEAST), room, counts,
                         (int32_t *)(counts + rows)};
    pagedcore_share(round_some, &rounding, rounding.num_tasks);
    long panels = (outputs + WIDTH - 1) / WIDTH;
    long tiles = (rows + CHUNK - 1) / CHUNK * panels;
    long cost = inputs / 4 * (rows < 8 ? 8 : rows < CHUNK ? rows : CHUNK); /* of a tile */
    long tasks = pagedcore_num_tasks(tiles * cost, LEAST);
    Product product = {&rounding, codes, scales, outputs, bias, out, panels, tiles,
                       (tiles + tasks - 1) / tasks};
    pagedcore_share(multiply_tiles, &product, (tiles + product.grain - 1) / product.grain);
}
