/* Linear layers whose weight has few bits, in groups of inputs that share a scale.

       T rows   N outputs   P = ceil(N / 32) panels   I inputs   G groups   b bits, 4 or 8

       x        [T, I]          bfloat16
       codes    [P, I * b / 32, 32]  words: 32 / b codes of output 32 p + n; of 4 bits, those of even
                                inputs in the lower half
       table    [32]            bfloat16: what each of 16 codes stands for, twice; for 4 bits
       middle                   what a code counts from, or -1 where only `table` knows
       scales   [P, G, 32]      float16 or float: what codes count
       minima   [P, G, 32]      of the same type: what is added to each; or nothing
       out      [T, N]          bfloat16 or float

   Few rows are bound by reading `codes`, which stay whole numbers on their way: each group of a row
   becomes whole numbers of 16 bits, its largest magnitude 32,512, and is multiplied as two rows of
   bytes. What that loses is 2^-16 of the group's largest magnitude, where bfloat16 itself has lost
   2^-9 of each number. With a table, codes become bfloat16 instead, without an error, and scales
   multiply the sums of a group. For many rows, a panel becomes one of `linear.c`'s first. */

#include "whole.h"

#include <stdlib.h>

enum { FEW = 4, SOON = 16 };
/* Rows of which all sums stay in registers. How many groups' scales are on their way from memory. */

typedef struct {
    const uint32_t *x;
    long rows, inputs, groups;
    int bits;
    const uint32_t *codes;
    const bf16 *table;
    int middle;
    const void *scales, *minima;
    int half;
    const uint32_t *bytes;
    const float *counts, *sums;
    const int32_t *starts;
    long outputs;
    const bf16 *bias;
    char *out;
    int is_float;
    long panels, grain;
    int *failed;
} Coded;
/* bytes   [2 T, I]  rows of bytes: 256 times the first plus the second is a row's whole number
   counts  [T, G]    what those count
   sums    [T, G]    sums of what they stand for
   starts  [T, G]    what is added to the sum of a group, for codes that count from `middle` */

INLINE char *out_of(const Coded *c, long row, long column) {
    return c->out + (row * c->outputs + column) * (c->is_float ? 4 : 2);
}

INLINE __m512 scale16(const void *from, long at, int half) {
    if (half) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const bf16 *)from + at)));
    return _mm512_loadu_ps((const float *)from + at);
}

/* `rows` rows times panel `panel`, in whole numbers. */
INLINE void few_rows(const int rows, const int bits, const Coded *c, long first, long panel) {
    long words = c->inputs * bits / 32, stride = c->inputs / 4;
    long steps = words / c->groups, size = stride / c->groups;
    const uint32_t *codes = c->codes + panel * WIDTH * words;
    const uint32_t *bytes = c->bytes + first * 2 * stride;
    const float *counts = c->counts + first * c->groups, *sums = c->sums + first * c->groups;
    const int32_t *starts = c->starts + first * c->groups;
    __m512 total[FEW * VECTORS];
#pragma GCC unroll 8
    for (int k = 0; k < rows * VECTORS; k++) total[k] = _mm512_setzero_ps();
    for (long g = 0; g < c->groups; g++, codes += steps * WIDTH, bytes += size) {
        Sums part[FEW * VECTORS * 2];
        long at = (panel * c->groups + g) * WIDTH;
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                part[2 * m * VECTORS + v] = sums_of(0);
                part[(2 * m + 1) * VECTORS + v] = sums_of(starts[m * c->groups + g]);
            }
        long ahead = (at + SOON * WIDTH) * (c->half ? 2 : 4);
        _mm_prefetch((const char *)c->scales + ahead, _MM_HINT_T0);
        if (c->minima) _mm_prefetch((const char *)c->minima + ahead, _MM_HINT_T0);
        multiply_whole(2 * rows, bits, bytes, stride, codes, steps, part);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            __m512 scale = scale16(c->scales, at + 16 * v, c->half);
            __m512 minimum = c->minima ? scale16(c->minima, at + 16 * v, c->half) : scale;
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                __m512i high = _mm512_slli_epi32((__m512i)part[2 * m * VECTORS + v], 8);
                __m512i low = (__m512i)part[(2 * m + 1) * VECTORS + v];
                __m512 sum = _mm512_cvtepi32_ps(_mm512_add_epi32(high, low));
                __m512 count = _mm512_set1_ps(counts[m * c->groups + g]);
                __m512 *to = total + m * VECTORS + v;
                *to = _mm512_fmadd_ps(sum, _mm512_mul_ps(scale, count), *to);
                if (c->minima)
                    *to = _mm512_fmadd_ps(_mm512_set1_ps(sums[m * c->groups + g]), minimum, *to);
            }
        }
    }
    long column = panel * WIDTH;
    finish(rows, total, c->bias ? c->bias + column : 0, out_of(c, first, column), c->is_float,
           c->outputs, c->outputs - column);
}

/* Pair j of words of 4 bits, of 16 outputs. */
INLINE __m512i decode(const int j, __m512i word, __m512i table) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * j), table);
}

/* The same with 4 bits and a table. One row has several sums for each output, since one would wait
   for itself. */
INLINE void few_rows_table(const int rows, const Coded *c, long first, long panel) {
    const int chains = rows == 1 ? 4 : 1;
    long steps = c->inputs / c->groups / 8, stride = c->inputs / 2;
    const uint32_t *codes = c->codes + panel * WIDTH * (c->inputs / 8);
    const uint32_t *x = c->x + first * stride;
    __m512i table = _mm512_loadu_si512(c->table);
    __m512 total[FEW * VECTORS];
#pragma GCC unroll 8
    for (int k = 0; k < rows * VECTORS; k++) total[k] = _mm512_setzero_ps();
    for (long g = 0; g < c->groups; g++) {
        __m512 part[FEW * VECTORS];
#pragma GCC unroll 8
        for (int k = 0; k < rows * VECTORS * chains; k++) part[k] = _mm512_setzero_ps();
        for (long step = 0; step < steps; step++, codes += WIDTH, x += 4)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                __m512i word = _mm512_loadu_si512(codes + 16 * v);
                _mm_prefetch((const char *)(codes + AHEAD * WIDTH + 16 * v), _MM_HINT_T0);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) {
                    __m512bh column = (__m512bh)decode(j, word, table);
#pragma GCC unroll 4
                    for (int m = 0; m < rows; m++) {
                        int k = (m * VECTORS + v) * chains + j % chains;
                        __m512bh row = (__m512bh)_mm512_set1_epi32((int)x[m * stride + j]);
                        part[k] = _mm512_dpbf16_ps(part[k], row, column);
                    }
                }
            }
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) {
            long at = (panel * c->groups + g) * WIDTH + 16 * v;
            __m512 scale = scale16(c->scales, at, c->half);
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                int k = m * VECTORS + v;
                __m512 sum = part[k * chains];
#pragma GCC unroll 4
                for (int i = 1; i < chains; i++) sum = _mm512_add_ps(sum, part[k * chains + i]);
                total[k] = _mm512_fmadd_ps(sum, scale, total[k]);
            }
        }
    }
    long column = panel * WIDTH;
    finish(rows, total, c->bias ? c->bias + column : 0, out_of(c, first, column), c->is_float,
           c->outputs, c->outputs - column);
}

static void few_tiles(void *context, long task) {
    const Coded *c = context;
    long end = (task + 1) * c->grain < c->panels ? (task + 1) * c->grain : c->panels;
    for (long panel = task * c->grain; panel < end; panel++)
        for (long first = 0; first < c->rows;) {
            long left = c->rows - first, blocks = (left + FEW - 1) / FEW;
            long count = (left + blocks - 1) / blocks;
            switch (count * 16 + (c->middle < 0 ? 0 : c->bits)) {
#define CASE(R)                              \
    case R * 16:                             \
        few_rows_table(R, c, first, panel);  \
        break;                               \
    case R * 16 + 4:                         \
        few_rows(R, 4, c, first, panel);     \
        break;                               \
    case R * 16 + 8:                         \
        few_rows(R, 8, c, first, panel);     \
        break;
                CASE(1)
                CASE(2)
                CASE(3)
                CASE(4)
#undef CASE
            }
            first += count;
        }
}

/* Pair j of words of 16 outputs, as two vectors of floats. */
INLINE void split_pair(const int bits, const int j, __m512i word, __m512i table, int middle,
                       __m512 *even, __m512 *odd) {
    if (bits == 4) {
        __m512i pair = decode(j, word, table);
        *even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        *odd = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
    } else {
        __m512i byte = _mm512_set1_epi32(255), zero = _mm512_set1_epi32(middle);
        __m512i first = _mm512_and_si512(_mm512_srli_epi32(word, 16 * j), byte);
        __m512i second = _mm512_and_si512(_mm512_srli_epi32(word, 16 * j + 8), byte);
        *even = _mm512_cvtepi32_ps(_mm512_sub_epi32(first, zero));
        *odd = _mm512_cvtepi32_ps(_mm512_sub_epi32(second, zero));
    }
}

/* A panel in bfloat16, [I / 2, 32] pairs. */
INLINE void widen_panel(const int bits, const Coded *c, long panel, uint32_t *to) {
    const int pairs = 16 / bits;
    long steps = c->inputs / c->groups / (2 * pairs);
    const uint32_t *codes = c->codes + panel * WIDTH * (c->inputs * bits / 32);
    __m512i table = bits == 4 ? _mm512_loadu_si512(c->table) : _mm512_setzero_si512();
    uint16_t place[32];
    for (int n = 0; n < 32; n++) place[n] = (uint16_t)(n / 2 + n % 2 * 16);
    __m512i places = _mm512_loadu_si512(place);
    for (long g = 0; g < c->groups; g++) {
        __m512 scale[VECTORS], minimum[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            long at = (panel * c->groups + g) * WIDTH + 16 * v;
            scale[v] = scale16(c->scales, at, c->half);
            minimum[v] = c->minima ? scale16(c->minima, at, c->half) : _mm512_setzero_ps();
        }
        for (long step = 0; step < steps; step++, codes += WIDTH, to += pairs * WIDTH)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                __m512i word = _mm512_loadu_si512(codes + 16 * v);
#pragma GCC unroll 4
                for (int j = 0; j < pairs; j++) {
                    __m512 even, odd;
                    split_pair(bits, j, word, table, c->middle, &even, &odd);
                    even = _mm512_fmadd_ps(even, scale[v], minimum[v]);
                    odd = _mm512_fmadd_ps(odd, scale[v], minimum[v]);
                    __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
                    _mm512_storeu_si512(to + j * WIDTH + 16 * v,
                                        _mm512_permutexvar_epi16(places, both));
                }
            }
    }
}

typedef struct {
    const uint32_t *codes;
    long outputs, words;
    int bits;
    uint32_t *to;
} Packing;

/* Four bytes of two codes each, with those of even inputs in the lower half. */
INLINE __m512i to_word(__m512i bytes) {
#define PART(right, left)                                                                   \
    _mm512_slli_epi32(                                                                      \
        _mm512_and_si512(_mm512_srli_epi32(bytes, right), _mm512_set1_epi32(15)), left)
    __m512i even = _mm512_or_si512(_mm512_or_si512(PART(0, 0), PART(8, 4)),
                                   _mm512_or_si512(PART(16, 8), PART(24, 12)));
    __m512i odd = _mm512_or_si512(_mm512_or_si512(PART(4, 16), PART(12, 20)),
                                  _mm512_or_si512(PART(20, 24), PART(28, 28)));
#undef PART
    return _mm512_or_si512(even, odd);
}

static void pack_codes(void *context, long panel) {
    const Packing *p = context;
    uint32_t *to = p->to + panel * p->words * WIDTH;
    for (long i = 0; i < p->words; i += 16)
        for (int group = 0; group < WIDTH; group += 16) {
            __m512i square[16];
            for (int n = 0; n < 16; n++) {
                long output = panel * WIDTH + group + n;
                __mmask16 mask = output < p->outputs ? lanes(p->words - i) : 0;
                square[n] = _mm512_maskz_loadu_epi32(mask, p->codes + output * p->words + i);
            }
            transpose16(square);
            for (long j = 0; j < 16 && i + j < p->words; j++)
                _mm512_storeu_si512(to + (i + j) * WIDTH + group,
                                    p->bits == 4 ? to_word(square[j]) : square[j]);
        }
}

/* Codes [N, words * 4] bytes, two in a byte with 4 bits, the even input's in its lower half. */
EXPORT void pagedcore_pack_codes(const uint32_t *codes, long outputs, long words, int bits,
                                 uint32_t *to) {
    Packing packing = {codes, outputs, words, bits, to};
    pagedcore_share(pack_codes, &packing, (outputs + WIDTH - 1) / WIDTH);
}

static void widen_task(void *context, long panel) {
    const Coded *c = context;
    uint32_t *to = (uint32_t *)c->out + panel * (c->inputs / 2) * WIDTH;
    if (c->bits == 4)
        widen_panel(4, c, panel, to);
    else
        widen_panel(8, c, panel, to);
}

/* The weight as `linear.c` has it, [P, I / 2, 32] pairs. */
EXPORT void pagedcore_widen(long inputs, const uint32_t *codes, int bits, const bf16 *table,
                            int middle, const void *scales, const void *minima, int half, long groups,
                            long outputs, uint32_t *packed) {
    Coded coded = {.inputs = inputs, .groups = groups, .bits = bits, .codes = codes, .table = table,
                   .middle = middle, .scales = scales, .minima = minima, .half = half, .out = (char *)packed};
    pagedcore_share(widen_task, &coded, (outputs + WIDTH - 1) / WIDTH);
}

static _Thread_local uint32_t *room; /* for a panel; grows, and stays until the thread ends */
static _Thread_local long room_size;

static uint32_t *find_room(long size) {
    if (size > room_size) {
        free(room);
        room = aligned_alloc(64, (size_t)size * 4);
        room_size = room ? size : 0;
    }
    return room;
}

static void many_tiles(void *context, long task) {
    const Coded *c = context;
    long pairs = c->inputs / 2;
    uint32_t *wide = find_room(pairs * WIDTH);
    if (!wide) {
        *c->failed = 1;
        return;
    }
    long end = (task + 1) * c->grain < c->panels ? (task + 1) * c->grain : c->panels;
    for (long panel = task * c->grain; panel < end; panel++) {
        long column = panel * WIDTH;
        if (c->bits == 4)
            widen_panel(4, c, panel, wide);
        else
            widen_panel(8, c, panel, wide);
        rows_times_panel(c->rows, c->x, pairs, wide, pairs, c->bias ? c->bias + column : 0,
                         out_of(c, 0, column), c->is_float, c->outputs, c->outputs - column);
    }
}

static void round_rows(Coded *c, uint32_t *to) {
    __m512i order = order_of(c->bits);
    long all = c->rows * c->groups, size = c->inputs / c->groups;
    float *counts = (float *)(to + c->rows * c->inputs / 2), *sums = counts + all;
    int32_t *starts = (int32_t *)(sums + all);
    for (long t = 0; t < c->rows; t++)
        for (long g = 0; g < c->groups; g++) {
            long at = t * c->groups + g;
            int8_t *high = (int8_t *)to + 2 * t * c->inputs + g * size;
            int32_t sum;
            counts[at] = round_group((const bf16 *)c->x + t * c->inputs + g * size, size, order,
                                     high, high + c->inputs, &sum);
            sums[at] = counts[at] * sum;
            starts[at] = -c->middle * sum;
        }
    c->bytes = to, c->counts = counts, c->sums = sums, c->starts = starts;
}

/* `few` is how many rows at most are multiplied without widening panels. Returns 1 without memory
   for a panel, or for rows in whole numbers. */
EXPORT int pagedcore_grouped(const bf16 *x, long rows, long inputs, const uint32_t *codes,
                             int bits, const bf16 *table, int middle, const void *scales,
                             const void *minima, int half, long groups, long outputs,
                             const bf16 *bias, void *out, int is_float, long few) {
    int failed = 0;
    long panels = (outputs + WIDTH - 1) / WIDTH;
    long cost = inputs / 2 * (rows < 8 ? 8 : rows);
    long tasks = pagedcore_num_tasks(panels * cost, LEAST);
    Coded coded = {.x = (const uint32_t *)x, .rows = rows, .inputs = inputs, .groups = groups,
                   .bits = bits, .codes = codes, .table = table, .middle = middle,
                   .scales = scales, .minima = minima, .half = half, .outputs = outputs,
                   .bias = bias, .out = out, .is_float = is_float, .panels = panels,
                   .grain = (panels + tasks - 1) / tasks, .failed = &failed};
    if (rows == 0 || panels == 0) return 0;
    if (rows <= few && middle >= 0) {
        uint32_t *to = find_room(rows * inputs / 2 + 3 * rows * groups);
        if (!to) return 1;
        round_rows(&coded, to);
    }
    pagedcore_share(rows <= few ? few_tiles : many_tiles, &coded,
                    (panels + coded.grain - 1) / coded.grain);
    return failed;
}
