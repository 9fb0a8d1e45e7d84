/* Causal attention over a paged cache, of any number of tokens per sequence.

       S sequences   T tokens   H query heads   K kv heads   G = H / K   D head size
       N blocks      B positions per block      M table entries per row

       qkv            [T, (H + 2K) * D]   rows qkv_stride apart; queries are turned already
       store          [N, B, 2K, D]       keys of a slot, then its values
       table          [R, M] int32        indexed by rows [S]
       query_start    [S + 1] int32
       context_len    [S] int32           0 is padding, whose output is zero
       sinks          [H] float           one more score of each head, without a value; or null
       out            [T, H * D]          contiguous

   A task is one kv head of one sequence and up to MAX_ROWS / G of its tokens; the G query heads of
   a token are rows beside each other. It walks over tiles of 64 keys: keys and values are packed as
   the right side of a product, scores and the running softmax are float, weights are rounded to
   bfloat16 for the second product. Positions outside of what a task sees are never read. */

#include "common.h"

#include <math.h>
#include <stdlib.h>

enum { TILE = 64, VECTORS = TILE / 16, ROWS = MAX_SUMS / VECTORS };
enum { MAX_ROWS = 96, MAX_HEAD = 256, ALONE = 1 << 17 };
/* ALONE: multiplications below which a second thread costs more than it saves. */

typedef struct {
    const bf16 *qkv;
    long qkv_stride;
    const bf16 *store;
    const int32_t *table, *rows, *query_start, *context_len;
    long table_stride, num_seqs, num_heads, num_kv_heads, size, block_size, window;
    float scale, soft_cap;
    const float *sinks;
    bf16 *out;
    long *first_task; /* [S + 1] */
} Step;

/* What a task has in its hands: 250 KiB at most, of which small heads and few rows touch little. */
typedef struct {
    uint32_t key[MAX_HEAD / 2 * TILE];   /* [D / 2, 64] */
    uint32_t value[TILE / 2 * MAX_HEAD]; /* [32, D] */
    bf16 query[MAX_ROWS * MAX_HEAD];     /* [rows, D] */
    bf16 weight[MAX_ROWS * TILE];        /* [rows, 64] */
    float score[MAX_ROWS * TILE];        /* [rows, 64] */
    float sum[MAX_ROWS * MAX_HEAD];      /* [rows, D] */
    float highest[MAX_ROWS], total[MAX_ROWS];
} Work;

/* out [rows, 16 * vectors] (+)= a times b; see `multiply`. */
INLINE void block(const int rows, const int vectors, const uint32_t *a, long a_stride,
                  const uint32_t *b, long b_stride, long pairs, float *out, long out_stride,
                  const int add) {
    __m512 sum[MAX_SUMS];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            sum[m * vectors + v] =
                add ? _mm512_loadu_ps(out + m * out_stride + 16 * v) : _mm512_setzero_ps();
    multiply(rows, vectors, a, a_stride, b, b_stride, pairs, sum);
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(out + m * out_stride + 16 * v, sum[m * vectors + v]);
}

INLINE void product(const int vectors, long rows, const uint32_t *a, long a_stride,
                    const uint32_t *b, long b_stride, long pairs, float *out, long out_stride,
                    const int add) {
    for (; rows > 0; rows -= ROWS, a += ROWS * a_stride, out += ROWS * out_stride) {
        switch (rows < ROWS ? rows : ROWS) {
#define CASE(R)                                                                               \
    case R:                                                                                   \
        block(R, vectors, a, a_stride, b, b_stride, pairs, out, out_stride, add);             \
        break;
            CASE(1)
            CASE(2)
            CASE(3)
            CASE(4)
            CASE(5)
            CASE(6)
#undef CASE
        }
    }
}

/* The first `used` keys of a tile as the right side of a product; others are left undefined. */
static void pack_keys(const bf16 *const from[TILE], long used, long size, uint32_t *to) {
    for (int group = 0; group < used; group += 16)
        for (long i = 0; i < size / 2; i += 16) {
            __m512i square[16];
            for (int n = 0; n < 16; n++)
                square[n] = from[group + n] ? _mm512_loadu_si512(from[group + n] + 2 * i)
                                            : _mm512_setzero_si512();
            transpose16(square);
            for (int j = 0; j < 16; j++)
                _mm512_storeu_si512(to + (i + j) * TILE + group, square[j]);
        }
}

/* The same of their values, which lie `offset` behind the keys. */
static void pack_values(const bf16 *const from[TILE], long used, long offset, long size,
                        uint32_t *to) {
    __m512i low = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005,
                                    0x260006, 0x270007, 0x280008, 0x290009, 0x2a000a, 0x2b000b,
                                    0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f);
    __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x100010));
    for (int pair = 0; 2 * pair < used; pair++) {
        const bf16 *first = from[2 * pair], *second = from[2 * pair + 1];
        for (long i = 0; i < size; i += 32) {
            __m512i zero = _mm512_setzero_si512();
            __m512i a = first ? _mm512_loadu_si512(first + offset + i) : zero;
            __m512i b = second ? _mm512_loadu_si512(second + offset + i) : zero;
            uint32_t *at = to + pair * size + i;
            _mm512_storeu_si512(at, _mm512_permutex2var_epi16(a, low, b));
            _mm512_storeu_si512(at + 16, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

INLINE __m512 capped(__m512 score, float scale, float soft_cap) {
    if (soft_cap == 0.0f) return _mm512_mul_ps(score, _mm512_set1_ps(scale));
    /* tanh(x) = 1 - 2 / (e^2x + 1) */
    __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f);
    __m512 power = exp16(_mm512_mul_ps(score, _mm512_set1_ps(2.0f * scale / soft_cap)));
    __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(power, one)));
    return _mm512_mul_ps(tanh, _mm512_set1_ps(soft_cap));
}

/* Turn a row's scores of one tile, of which those in [begin, end) are seen, into weights. */
INLINE void weigh(Work *w, long row, long size, long begin, long end, float scale, float soft_cap) {
    __m512 score[VECTORS], top = _mm512_set1_ps(-INFINITY);
    for (int v = 0; v < VECTORS; v++) {
        long from = begin - 16 * v, to = end - 16 * v;
        __mmask16 seen = to <= 0 ? 0 : lanes(to);
        if (from > 0) seen &= from >= 16 ? 0 : (__mmask16)(0xffff << from);
        __m512 value = capped(_mm512_loadu_ps(w->score + row * TILE + 16 * v), scale, soft_cap);
        score[v] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, value);
        top = _mm512_max_ps(top, score[v]); /* NaN counts once it is a weight */
    }
    float before = w->highest[row], highest = fmaxf(before, _mm512_reduce_max_ps(top));
    if (highest == -INFINITY) { /* the row's window begins behind this tile */
        memset(w->weight + row * TILE, 0, TILE * sizeof(bf16));
        return;
    }
    __m512 sum = _mm512_setzero_ps(), shift = _mm512_set1_ps(highest);
    for (int v = 0; v < VECTORS; v++) {
        __m512 weight = exp16(_mm512_sub_ps(score[v], shift));
        sum = _mm512_add_ps(sum, weight);
        store16(w->weight + row * TILE + 16 * v, 0xffff, weight);
    }
    float total = _mm512_reduce_add_ps(sum);
    if (highest != before) {
        float fade = _mm512_cvtss_f32(exp16(_mm512_set1_ps(before - highest)));
        w->total[row] *= fade;
        for (long i = 0; i < size; i += 16) {
            float *at = w->sum + row * size + i;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(fade)));
        }
    }
    w->highest[row] = highest;
    w->total[row] += total;
}

/* `count` tokens of a sequence from `first_token` on, the first of them at `position`. */
static void attend(const Step *step, Work *w, long sequence, long kv_head, long first_token,
                   long position, long count) {
    long size = step->size, group = step->num_heads / step->num_kv_heads, rows = count * group;
    for (long t = 0; t < count; t++)
        memcpy(w->query + t * group * size,
               step->qkv + (first_token + t) * step->qkv_stride + kv_head * group * size,
               group * size * sizeof(bf16));
    for (long row = 0; row < rows; row++) {
        w->highest[row] = step->sinks ? step->sinks[kv_head * group + row % group] : -INFINITY;
        w->total[row] = step->sinks ? 1.0f : 0.0f;
    }
    memset(w->sum, 0, rows * size * sizeof(float));

    const int32_t *blocks = step->table + step->rows[sequence] * step->table_stride;
    long values = step->num_kv_heads * size, slot_size = 2 * values;
    long end = position + count, begin = 0;
    if (step->window && position + 1 > step->window) begin = position + 1 - step->window;
    for (long tile = begin / TILE * TILE; tile < end; tile += TILE) {
        const bf16 *keys[TILE] = {0};
        long first = begin > tile ? begin : tile, last = end < tile + TILE ? end : tile + TILE;
        long block = first / step->block_size, offset = first % step->block_size;
        for (long p = first; p < last; p++) {
            long slot = blocks[block] * step->block_size + offset;
            const bf16 *key = step->store + slot * slot_size + kv_head * size;
            keys[p - tile] = key;
            for (long i = 0; i < size; i += 32)
                _mm_prefetch((const char *)(key + values + i), _MM_HINT_T0);
            if (++offset == step->block_size) offset = 0, block++;
        }
        long used = last - tile;
        pack_keys(keys, used, size, w->key);
        if (used <= TILE / 2)
            product(VECTORS / 2, rows, (uint32_t *)w->query, size / 2, w->key, TILE, size / 2,
                    w->score, TILE, 0);
        else
            product(VECTORS, rows, (uint32_t *)w->query, size / 2, w->key, TILE, size / 2,
                    w->score, TILE, 0);
        for (long row = 0; row < rows; row++) {
            long own = position + row / group - tile, oldest = 0;
            if (step->window) oldest = own + 1 - step->window;
            if (step->soft_cap == 0.0f)
                weigh(w, row, size, oldest, own + 1, step->scale, 0.0f);
            else
                weigh(w, row, size, oldest, own + 1, step->scale, step->soft_cap);
        }
        pack_values(keys, used, values, size, w->value);
        long column = 0, pairs = (used + 1) / 2;
        for (; column + TILE <= size; column += TILE)
            product(VECTORS, rows, (uint32_t *)w->weight, TILE / 2, w->value + column, size, pairs,
                    w->sum + column, size, 1);
        if (column < size)
            product(VECTORS / 2, rows, (uint32_t *)w->weight, TILE / 2, w->value + column, size,
                    pairs, w->sum + column, size, 1);
    }
    for (long row = 0; row < rows; row++) {
        bf16 *to = step->out + (first_token + row / group) * step->num_heads * size +
                   (kv_head * group + row % group) * size;
        __m512 share = _mm512_set1_ps(1.0f / w->total[row]);
        for (long i = 0; i < size; i += 16)
            store16(to + i, 0xffff, _mm512_mul_ps(_mm512_loadu_ps(w->sum + row * size + i), share));
    }
}

static void run_task(void *context, long number_from_end) {
    const Step *step = context;
    const long *first_task = step->first_task;
    /* a sequence's last tokens have the longest way to go: last tasks first */
    long task = first_task[step->num_seqs] - 1 - number_from_end;
    long group = step->num_heads / step->num_kv_heads, most = MAX_ROWS / group;
    long low = 0, high = step->num_seqs; /* the sequence whose tasks include this one */
    while (high - low > 1) {
        long middle = (low + high) / 2;
        if (first_task[middle] <= task)
            low = middle;
        else
            high = middle;
    }
    long number = task - first_task[low], kv_head = number % step->num_kv_heads;
    long start = step->query_start[low], count = step->query_start[low + 1] - start;
    long length = step->context_len[low], from = number / step->num_kv_heads * most;
    long tokens = count - from < most ? count - from : most;
    if (length == 0) {
        memset(step->out + start * step->num_heads * step->size, 0,
               count * step->num_heads * step->size * sizeof(bf16));
        return;
    }
    Work work;
    attend(step, &work, low, kv_head, start + from, length - count + from, tokens);
}

/* 0, or -1 without memory for a word per sequence. */
EXPORT int pagedcore_attention(const bf16 *qkv, long qkv_stride, const bf16 *store,
                               const int32_t *table, long table_stride, const int32_t *rows,
                               const int32_t *query_start, const int32_t *context_len,
                               long num_seqs, long num_heads, long num_kv_heads, long size,
                               long block_size, long window, float scale, float soft_cap,
                               const float *sinks, bf16 *out) {
    Step step = {.qkv = qkv,
                 .qkv_stride = qkv_stride,
                 .store = store,
                 .table = table,
                 .rows = rows,
                 .query_start = query_start,
                 .context_len = context_len,
                 .table_stride = table_stride,
                 .num_seqs = num_seqs,
                 .num_heads = num_heads,
                 .num_kv_heads = num_kv_heads,
                 .size = size,
                 .block_size = block_size,
                 .window = window,
                 .scale = scale,
                 .soft_cap = soft_cap,
                 .sinks = sinks,
                 .out = out,
                 .first_task = malloc((num_seqs + 1) * sizeof(long))};
    long most = MAX_ROWS / (num_heads / num_kv_heads);
    long *first_task = step.first_task;
    if (!first_task) return -1;
    first_task[0] = 0;
    long pairs = 0; /* of queries and keys, about */
    for (long i = 0; i < num_seqs; i++) {
        long count = query_start[i + 1] - query_start[i], tiles = (count + most - 1) / most;
        first_task[i + 1] = first_task[i] + (context_len[i] ? tiles * num_kv_heads : 1);
        pairs += count * context_len[i];
    }
    long tasks = first_task[num_seqs];
    if (pairs * num_heads * size > ALONE)
        pagedcore_share(run_task, &step, tasks);
    else
        for (long task = 0; task < tasks; task++) run_task(&step, task);
    free(first_task);
    return 0;
}
