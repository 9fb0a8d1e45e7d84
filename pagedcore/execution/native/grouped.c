/* Linear layers whose weight has few bits, in groups of inputs that share a scale.

       T rows   N outputs   P = ceil(N / 32) panels   I inputs   G groups   b bits, 4 or 8

       x        [T, I]          bfloat16
       codes    [P, I * b / 32, 32]  words: 32 / b codes of output 32 p + n, those of even inputs in
                                the lower half; 8 bits are signed
       table    [32]            bfloat16: what each of 16 codes stands for, twice; for 4 bits
       scales   [P, G, 32]      float16 or float: what codes count
       minima   [P, G, 32]      of the same type: what is added to each; or nothing
       sums     [T, G]          float: room for the sums of each row's groups, with minima
       out      [T, N]          bfloat16

   Few rows are bound by reading `codes`: each becomes a bfloat16 on its way, without an error, and
   scales multiply the sums of a group. For many rows, a panel becomes one of `linear.c`'s first. */

#include "panels.h"

#include <stdlib.h>

enum { FEW = 6 };
/* Rows of which all sums stay in registers. */

typedef struct {
    const uint32_t *x;
    long rows, inputs, groups;
    int bits;
    const uint32_t *codes;
    const bf16 *table;
    const void *scales, *minima;
    int half;
    const float *sums;
    long outputs;
    const bf16 *bias;
    bf16 *out;
    long panels, grain;
    int *failed;
} Coded;

/* Pair j of the words of 16 outputs. */
INLINE __m512i decode(const int bits, const int j, __m512i word, __m512i table) {
    if (bits == 4) return _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4 * j), table);
    /* whole numbers of 8 bits fill the upper half of a float, so no rounding is needed */
    __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(word, 24 - 8 * j), 24);
    __m512i odd = _mm512_srai_epi32(_mm512_slli_epi32(word, 8 - 8 * j), 24);
    __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(even)), 16);
    return _mm512_or_si512(low, _mm512_castps_si512(_mm512_cvtepi32_ps(odd)));
}

INLINE __m512 scale16(const void *from, long at, int half) {
    if (half) return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const bf16 *)from + at)));
    return _mm512_loadu_ps((const float *)from + at);
}

/* `rows` rows times panel `panel`. Few rows have several sums for each output, since one would wait
   for itself. */
INLINE void few_rows(const int rows, const int bits, const Coded *c, long first, long panel) {
    const int pairs = 16 / bits, chains = rows == 1 ? pairs : rows == 2 ? 2 : 1;
    long steps = c->inputs / c->groups / (2 * pairs), stride = c->inputs / 2;
    const uint32_t *codes = c->codes + panel * WIDTH * (c->inputs * bits / 32);
    const uint32_t *x = c->x + first * stride;
    const float *sums = c->sums + first * c->groups;
    __m512i table = bits == 4 ? _mm512_loadu_si512(c->table) : _mm512_setzero_si512();
    __m512 total[FEW * VECTORS];
#pragma GCC unroll 12
    for (int k = 0; k < rows * VECTORS; k++) total[k] = _mm512_setzero_ps();
    for (long g = 0; g < c->groups; g++) {
        __m512 part[FEW * VECTORS * 2];
#pragma GCC unroll 24
        for (int k = 0; k < rows * VECTORS * chains; k++) part[k] = _mm512_setzero_ps();
        for (long step = 0; step < steps; step++, codes += WIDTH, x += pairs)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) {
                __m512i word = _mm512_loadu_si512(codes + 16 * v);
                _mm_prefetch((const char *)(codes + AHEAD * WIDTH + 16 * v), _MM_HINT_T0);
#pragma GCC unroll 4
                for (int j = 0; j < pairs; j++) {
                    __m512bh column = (__m512bh)decode(bits, j, word, table);
#pragma GCC unroll 6
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
#pragma GCC unroll 6
            for (int m = 0; m < rows; m++) {
                int k = m * VECTORS + v;
                __m512 sum = part[k * chains];
#pragma GCC unroll 4
                for (int i = 1; i < chains; i++) sum = _mm512_add_ps(sum, part[k * chains + i]);
                total[k] = _mm512_fmadd_ps(sum, scale, total[k]);
            }
            if (c->minima) {
                __m512 minimum = scale16(c->minima, at, c->half);
#pragma GCC unroll 6
                for (int m = 0; m < rows; m++) {
                    __m512 sum = _mm512_set1_ps(sums[m * c->groups + g]);
                    total[m * VECTORS + v] =
                        _mm512_fmadd_ps(sum, minimum, total[m * VECTORS + v]);
                }
            }
        }
    }
    long column = panel * WIDTH;
    finish(rows, total, c->bias ? c->bias + column : 0, c->out + first * c->outputs + column, 0,
           c->outputs, c->outputs - column);
}

static void few_tiles(void *context, long task) {
    const Coded *c = context;
    long end = (task + 1) * c->grain < c->panels ? (task + 1) * c->grain : c->panels;
    for (long panel = task * c->grain; panel < end; panel++)
        for (long first = 0; first < c->rows;) {
            long left = c->rows - first, blocks = (left + FEW - 1) / FEW;
            long count = (left + blocks - 1) / blocks;
            switch (count * 16 + c->bits) {
#define CASE(R)                            \
    case R * 16 + 4:                       \
        few_rows(R, 4, c, first, panel);   \
        break;                             \
    case R * 16 + 8:                       \
        few_rows(R, 8, c, first, panel);   \
        break;
                CASE(1)
                CASE(2)
                CASE(3)
                CASE(4)
                CASE(5)
                CASE(6)
#undef CASE
            }
            first += count;
        }
}

/* A panel in bfloat16, [I / 2, 32] pairs. */
INLINE void widen_panel(const int bits, const Coded *c, long panel, uint32_t *to) {
    const int pairs = 16 / bits;
    long steps = c->inputs / c->groups / (2 * pairs);
    const uint32_t *codes = c->codes + panel * WIDTH * (c->inputs * bits / 32);
    __m512i table = bits == 4 ? _mm512_loadu_si512(c->table) : _mm512_setzero_si512();
    __m512i upper = _mm512_set1_epi32((int)0xffff0000);
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
                    __m512i pair = decode(bits, j, word, table);
                    __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
                    __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
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

/* Four bytes with two codes each, or one, as a word. */
INLINE __m512i to_word(const int bits, __m512i bytes) {
    __m512i b = _mm512_srli_epi32(bytes, 8), c = _mm512_srli_epi32(bytes, 16);
    __m512i d = _mm512_srli_epi32(bytes, 24);
#define PART(from, mask, left)                                                            \
    _mm512_slli_epi32(_mm512_and_si512(from, _mm512_set1_epi32(mask)), left)
    if (bits == 8) /* 128 less, and inputs 0 2 1 3 */
        return _mm512_xor_si512(_mm512_or_si512(_mm512_or_si512(PART(bytes, 255, 0), PART(c, 255, 8)),
                                                _mm512_or_si512(PART(b, 255, 16), PART(d, 255, 24))),
                                _mm512_set1_epi32((int)0x80808080));
    __m512i even = _mm512_or_si512(_mm512_or_si512(PART(bytes, 15, 0), PART(b, 15, 4)),
                                   _mm512_or_si512(PART(c, 15, 8), PART(d, 15, 12)));
    bytes = _mm512_srli_epi32(bytes, 4), b = _mm512_srli_epi32(b, 4);
    c = _mm512_srli_epi32(c, 4), d = _mm512_srli_epi32(d, 4);
    __m512i odd = _mm512_or_si512(_mm512_or_si512(PART(bytes, 15, 16), PART(b, 15, 20)),
                                  _mm512_or_si512(PART(c, 15, 24), PART(d, 15, 28)));
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
                                    p->bits == 4 ? to_word(4, square[j]) : to_word(8, square[j]));
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
                            const void *scales, const void *minima, int half, long groups,
                            long outputs, uint32_t *packed) {
    Coded coded = {.inputs = inputs, .groups = groups, .bits = bits, .codes = codes, .table = table,
                   .scales = scales, .minima = minima, .half = half, .out = (bf16 *)packed};
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
                         (char *)(c->out + column), 0, c->outputs, c->outputs - column);
    }
}

static void sum_groups(const bf16 *x, long rows, long inputs, long groups, float *sums) {
    __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    long size = inputs / groups;
    for (long i = 0; i < rows * groups; i++, x += size) {
        __m512 sum = _mm512_setzero_ps();
        for (long k = 0; k < size; k += 32) {
            __mmask32 mask = size - k >= 32 ? 0xffffffffu : (1u << (size - k)) - 1;
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_maskz_loadu_epi16(mask, x + k), ones);
        }
        sums[i] = _mm512_reduce_add_ps(sum);
    }
}

/* `few` is how many rows at most are multiplied without widening panels. Returns 1 without memory
   for a panel. */
EXPORT int pagedcore_grouped(const bf16 *x, long rows, long inputs, const uint32_t *codes,
                              int bits, const bf16 *table, const void *scales, const void *minima,
                              int half, long groups, float *sums, long outputs, const bf16 *bias,
                              bf16 *out, long few) {
    int failed = 0;
    long panels = (outputs + WIDTH - 1) / WIDTH;
    int is_few = rows <= few;
    long cost = inputs / 2 * (rows < 8 ? 8 : rows);
    long tasks = pagedcore_num_tasks(panels * cost, LEAST);
    Coded coded = {(const uint32_t *)x, rows, inputs, groups, bits, codes, table, scales, minima,
                   half, sums, outputs, bias, out, panels, (panels + tasks - 1) / tasks,
                   &failed};
    if (rows == 0 || panels == 0) return 0;
    if (is_few && minima) sum_groups(x, rows, inputs, groups, sums);
    pagedcore_share(is_few ? few_tiles : many_tiles, &coded,
                    (panels + coded.grain - 1) / coded.grain);
    return failed;
}
