/* What happens to each token by itself: norms, gates, rotation and the way into the cache.

       T tokens   h hidden size   F MLP width   H query heads   K kv heads   D head size

   Arithmetic is in float, with one rounding to bfloat16 at the end. */

#include "common.h"

#include <math.h>

enum { MAX_HEAD = 256, LEAST = 1 << 13 };
/* LEAST: elements that a task should have, a few microseconds. */

INLINE float inverse_rms(const bf16 *x, long size, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < size; i += 16) {
        __m512 value = load16(x + i, lanes(size - i));
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / size + eps);
}

/* Tokens [first, end) of a task, when `num_tasks` share them. */
#define TOKENS_OF(task)                                                                    \
    long first = c->tokens * (task) / c->num_tasks, end = c->tokens * ((task) + 1) / c->num_tasks

typedef struct {
    const bf16 *x;
    bf16 *residual;
    const bf16 *weight;
    float eps;
    bf16 *out;
    long tokens, size, num_tasks;
} Norm;

static void norm_tokens(void *context, long task) {
    const Norm *c = context;
    TOKENS_OF(task);
    for (long t = first; t < end; t++) {
        const bf16 *row = c->x + t * c->size;
        if (c->residual) {
            bf16 *sum = c->residual + t * c->size;
            for (long i = 0; i < c->size; i += 16) {
                __mmask16 mask = lanes(c->size - i);
                store16(sum + i, mask, _mm512_add_ps(load16(row + i, mask), load16(sum + i, mask)));
            }
            row = sum;
        }
        __m512 scale = _mm512_set1_ps(inverse_rms(row, c->size, c->eps));
        for (long i = 0; i < c->size; i += 16) {
            __mmask16 mask = lanes(c->size - i);
            __m512 value = _mm512_mul_ps(load16(row + i, mask), scale);
            value = _mm512_mul_ps(value, load16(c->weight + i, mask));
            store16(c->out + t * c->size + i, mask, value);
        }
    }
}

/* out [T, h] = norm(x), or with a residual: residual += x, out = norm(residual). It may be x. */
EXPORT void pagedcore_rms_norm(const bf16 *x, bf16 *residual, const bf16 *weight, float eps,
                               bf16 *out, long tokens, long size) {
    long num_tasks = pagedcore_num_tasks(tokens * size, LEAST);
    Norm c = {x, residual, weight, eps, out, tokens, size, num_tasks};
    pagedcore_share(norm_tokens, &c, num_tasks);
}

typedef struct {
    const bf16 *gate_up;
    bf16 *out;
    long tokens, width, num_tasks;
} Gate;

static void gate_tokens(void *context, long task) {
    const Gate *c = context;
    __m512 one = _mm512_set1_ps(1.0f);
    TOKENS_OF(task);
    for (long t = first; t < end; t++) {
        const bf16 *gate = c->gate_up + t * 2 * c->width, *up = gate + c->width;
        for (long i = 0; i < c->width; i += 16) {
            __mmask16 mask = lanes(c->width - i);
            __m512 x = load16(gate + i, mask);
            __m512 below = _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x)));
            __m512 product = _mm512_mul_ps(x, load16(up + i, mask));
            store16(c->out + t * c->width + i, mask, _mm512_div_ps(product, below));
        }
    }
}

/* out [T, F] = silu(gate) * up, for gate_up [T, 2F]. */
EXPORT void pagedcore_silu_mul(const bf16 *gate_up, bf16 *out, long tokens, long width) {
    long num_tasks = pagedcore_num_tasks(tokens * width, LEAST);
    Gate c = {gate_up, out, tokens, width, num_tasks};
    pagedcore_share(gate_tokens, &c, num_tasks);
}

INLINE void norm_head(const bf16 *from, float *to, long size, const bf16 *weight, float eps) {
    __m512 scale = _mm512_set1_ps(weight ? inverse_rms(from, size, eps) : 1.0f);
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        __m512 value = load16(from + i, mask);
        if (weight) value = _mm512_mul_ps(_mm512_mul_ps(value, scale), load16(weight + i, mask));
        _mm512_storeu_ps(to + i, value);
    }
}

/* Turn the leading elements; `first` pairs with `second`, `step` apart from the next pair. */
INLINE void turn_head(float *head, const float *cos, long half, int interleaved) {
    const float *sin = cos + half;
    long step = interleaved ? 2 : 1, distance = interleaved ? 1 : half;
    for (long i = 0; i < half; i++) {
        float first = head[i * step], second = head[i * step + distance];
        head[i * step] = first * cos[i] - second * sin[i];
        head[i * step + distance] = second * cos[i] + first * sin[i];
    }
}

typedef struct {
    bf16 *qkv;
    long stride, tokens, num_heads, num_kv_heads, size;
    const float *cos_sin;
    long rotated;
    int interleaved;
    const bf16 *query_weight, *key_weight;
    float eps;
    const int64_t *positions, *slots;
    bf16 *store;
    long num_tasks;
} Turn;

static void turn_tokens(void *context, long task) {
    const Turn *c = context;
    long size = c->size, kept = 2 * c->num_kv_heads * size;
    TOKENS_OF(task);
    for (long t = first; t < end; t++) {
        bf16 *token = c->qkv + t * c->stride;
        const float *angles = c->cos_sin + c->positions[t] * c->rotated;
        for (long head = 0; head < c->num_heads + c->num_kv_heads; head++) {
            const bf16 *weight = head < c->num_heads ? c->query_weight : c->key_weight;
            float buffer[MAX_HEAD + 16];
            if (!weight && !c->rotated) break;
            norm_head(token + head * size, buffer, size, weight, c->eps);
            if (c->rotated && c->interleaved) turn_head(buffer, angles, c->rotated / 2, 1);
            if (c->rotated && !c->interleaved) turn_head(buffer, angles, c->rotated / 2, 0);
            for (long i = 0; i < size; i += 16)
                store16(token + head * size + i, lanes(size - i), _mm512_loadu_ps(buffer + i));
        }
        memcpy(c->store + c->slots[t] * kept, token + c->num_heads * size, kept * sizeof(bf16));
    }
}

/* Norm and turn queries and keys of qkv [T, (H + 2K) * D] in place, where either is asked for, and
   write keys and values [2K, D] into the slots of the store. */
EXPORT void pagedcore_rope_and_cache(bf16 *qkv, long stride, long tokens, long num_heads,
                                     long num_kv_heads, long size, const float *cos_sin,
                                     long rotated, int interleaved, const bf16 *query_weight,
                                     const bf16 *key_weight, float eps, const int64_t *positions,
                                     const int64_t *slots, bf16 *store) {
    long elements = tokens * (num_heads + 2 * num_kv_heads) * size;
    long num_tasks = pagedcore_num_tasks(elements, LEAST);
    Turn c = {.qkv = qkv,
              .stride = stride,
              .tokens = tokens,
              .num_heads = num_heads,
              .num_kv_heads = num_kv_heads,
              .size = size,
              .cos_sin = cos_sin,
              .rotated = rotated,
              .interleaved = interleaved,
              .query_weight = query_weight,
              .key_weight = key_weight,
              .eps = eps,
              .positions = positions,
              .slots = slots,
              .store = store,
              .num_tasks = num_tasks};
    pagedcore_share(turn_tokens, &c, num_tasks);
}

typedef struct {
    const float *scores;
    int64_t *largest;
    long size;
} Search;

static void search_row(void *context, long row) {
    const Search *c = context;
    const float *scores = c->scores + row * c->size;
    __m512 top = _mm512_set1_ps(-INFINITY);
    long i = 0;
    for (; i < c->size; i += 16) {
        __mmask16 mask = lanes(c->size - i);
        __m512 value = _mm512_maskz_loadu_ps(mask, scores + i);
        if (_mm512_mask_cmp_ps_mask(mask, value, value, _CMP_UNORD_Q)) break;
        top = _mm512_mask_max_ps(top, mask, top, value);
    }
    int has_nan = i < c->size;
    float highest = _mm512_reduce_max_ps(top);
    for (i = has_nan ? i : 0; i < c->size; i++)
        if (has_nan ? scores[i] != scores[i] : scores[i] == highest) break;
    c->largest[row] = i;
}

/* The first of the largest scores [S, V] of each row, where NaN is larger than all. */
EXPORT void pagedcore_argmax(const float *scores, int64_t *largest, long rows, long size) {
    Search c = {scores, largest, size};
    pagedcore_share(search_row, &c, rows);
}
