/* What happens to each token by itself: norms, gates, rotation and the way into the cache.

       T tokens   h hidden size   F MLP width   H query heads   K kv heads   D head size

   Arithmetic is in float, with one rounding to bfloat16 at the end. */

#include "common.h"

#include <math.h>

enum { MAX_HEAD = 256, ALONE = 1 << 14 };
/* Elements below which a second thread costs more than it saves. */

INLINE float inverse_rms(const bf16 *x, long size, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < size; i += 16) {
        __m512 value = load16(x + i, lanes(size - i));
        sum = _mm512_fmadd_ps(value, value, sum);
    }
    return 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / size + eps);
}

/* out [T, h] = norm(x), or with a residual: residual += x, and out = norm(residual). `out` may be
   x. */
EXPORT void pagedcore_rms_norm(const bf16 *x, bf16 *residual, const bf16 *weight, float eps,
                               bf16 *out, long tokens, long size) {
#pragma omp parallel for schedule(static) if (tokens * size > ALONE)
    for (long t = 0; t < tokens; t++) {
        const bf16 *row = x + t * size;
        if (residual) {
            bf16 *sum = residual + t * size;
            for (long i = 0; i < size; i += 16) {
                __mmask16 mask = lanes(size - i);
                store16(sum + i, mask, _mm512_add_ps(load16(row + i, mask), load16(sum + i, mask)));
            }
            row = sum;
        }
        __m512 scale = _mm512_set1_ps(inverse_rms(row, size, eps));
        for (long i = 0; i < size; i += 16) {
            __mmask16 mask = lanes(size - i);
            __m512 value = _mm512_mul_ps(load16(row + i, mask), scale);
            store16(out + t * size + i, mask, _mm512_mul_ps(value, load16(weight + i, mask)));
        }
    }
}

/* out [T, F] = silu(gate) * up, for gate_up [T, 2F]. */
EXPORT void pagedcore_silu_mul(const bf16 *gate_up, bf16 *out, long tokens, long width) {
    __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for schedule(static) if (tokens * width > ALONE)
    for (long t = 0; t < tokens; t++) {
        const bf16 *gate = gate_up + t * 2 * width, *up = gate + width;
        for (long i = 0; i < width; i += 16) {
            __mmask16 mask = lanes(width - i);
            __m512 x = load16(gate + i, mask);
            __m512 below = _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x)));
            __m512 product = _mm512_mul_ps(x, load16(up + i, mask));
            store16(out + t * width + i, mask, _mm512_div_ps(product, below));
        }
    }
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

/* Norm and turn queries and keys of qkv [T, (H + 2K) * D] in place, where either is asked for, and
   write keys and values [2K, D] into the slots of the store. */
EXPORT void pagedcore_rope_and_cache(bf16 *qkv, long stride, long tokens, long num_heads,
                                     long num_kv_heads, long size, const float *cos_sin,
                                     long rotated, int interleaved, const bf16 *query_weight,
                                     const bf16 *key_weight, float eps, const int64_t *positions,
                                     const int64_t *slots, bf16 *store) {
    long row = (num_heads + 2 * num_kv_heads) * size, kept = 2 * num_kv_heads * size;
#pragma omp parallel for schedule(static) if (tokens * row > ALONE)
    for (long t = 0; t < tokens; t++) {
        bf16 *token = qkv + t * stride;
        for (long head = 0; head < num_heads + num_kv_heads; head++) {
            const bf16 *weight = head < num_heads ? query_weight : key_weight;
            float buffer[MAX_HEAD + 16];
            if (!weight && !rotated) break;
            norm_head(token + head * size, buffer, size, weight, eps);
            if (rotated) {
                const float *angles = cos_sin + positions[t] * rotated;
                if (interleaved)
                    turn_head(buffer, angles, rotated / 2, 1);
                else
                    turn_head(buffer, angles, rotated / 2, 0);
            }
            for (long i = 0; i < size; i += 16)
                store16(token + head * size + i, lanes(size - i), _mm512_loadu_ps(buffer + i));
        }
        memcpy(store + slots[t] * kept, token + num_heads * size, kept * sizeof(bf16));
    }
}
