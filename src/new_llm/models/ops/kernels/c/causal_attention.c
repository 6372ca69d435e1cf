/* Causal attention but for its matrix products: splitting heads, and softmax over rows of scores with its backward. */
#include <omp.h>

#include "kernels.h"

/* scores [batches, rows, columns] <- softmax(scale * scores) over each row's first `first + row + 1` columns;
   logsumexp [batches, rows] is that of the scaled scores; scratch holds one row of floats per thread. */
void causal_softmax(bf16 *scores, float *logsumexp, float *scratch, int64_t batches, int64_t rows, int64_t columns,
                    int64_t first, float scale, int threads) {
#pragma omp parallel for collapse(2) schedule(dynamic, 32) num_threads(threads)
    for (int64_t batch = 0; batch < batches; batch++)
        for (int64_t r = 0; r < rows; r++) {
            bf16 *restrict row = scores + (batch * rows + r) * columns;
            float *restrict values = scratch + omp_get_thread_num() * columns, top = -INFINITY, total = 0.0f;
            /* Process whole vectors, even past the row's last unmasked column: rows are short, and a remainder would be
               computed one number at a time. Masked scores count as -infinity; their exp_negative is too small to
               change the sum. */
            int64_t seen = first + r + 1, end = (seen + LANES - 1) / LANES * LANES;
            end = end < columns ? end : columns;
#pragma omp simd reduction(max : top)
            for (int64_t j = 0; j < end; j++) {
                float x = j < seen ? scale * from_bf16(row[j]) : -INFINITY;
                values[j] = x;
                top = x > top ? x : top;
            }
#pragma omp simd reduction(+ : total)
            for (int64_t j = 0; j < end; j++) {
                values[j] = exp_negative(values[j] - top);
                total += values[j];
            }
            float factor = 1.0f / total;
#pragma omp simd
            for (int64_t j = 0; j < end; j++) row[j] = j < seen ? to_bf16(factor * values[j]) : 0;
            memset(row + end, 0, (size_t)(columns - end) * sizeof(bf16));
            logsumexp[batch * rows + r] = top + logf(total);
        }
}

/* scores <- p = exp(scale * scores - logsumexp); gradients, those of p, <- scale * p * (gradients - p . gradients). */
void causal_softmax_backward(bf16 *scores, bf16 *gradients, const float *logsumexp, int64_t batches, int64_t rows,
                             int64_t columns, int64_t first, float scale, int threads) {
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads)
    for (int64_t i = 0; i < batches * rows; i++) {
        bf16 *row = scores + i * columns, *gradient = gradients + i * columns;
        int64_t seen = first + i % rows + 1;
        float shift = logsumexp[i], mean = 0.0f;
#pragma omp simd reduction(+ : mean)
        for (int64_t j = 0; j < seen; j++) {
            float p = exp_negative(scale * from_bf16(row[j]) - shift);
            mean += p * from_bf16(gradient[j]);
            row[j] = to_bf16(p);
        }
#pragma omp simd
        for (int64_t j = 0; j < seen; j++)
            gradient[j] = to_bf16(scale * from_bf16(row[j]) * (from_bf16(gradient[j]) - mean));
        memset(row + seen, 0, (size_t)(columns - seen) * sizeof(bf16));
        memset(gradient + seen, 0, (size_t)(columns - seen) * sizeof(bf16));
    }
}

/* y <- x with its first 2 * half numbers rotated in pairs (j, half + j), forwards (sign 1) or backwards (-1). */
static inline void rotate(const bf16 *x, bf16 *y, const float *cosines, const float *sines, int64_t half, int64_t width,
                          float sign) {
    for (int64_t i = 0; i < half; i++) {
        float a = from_bf16(x[i]), b = from_bf16(x[half + i]), turn = sign * sines[i];
        y[i] = to_bf16(a * cosines[i] - b * turn);
        y[half + i] = to_bf16(b * cosines[i] + a * turn);
    }
    memcpy(y + 2 * half, x + 2 * half, (size_t)(width - 2 * half) * sizeof(bf16));
}

/* Splits mixed [rows, tokens, heads, 3 width] into q, k and v [rows, heads, tokens, width], and rotates q and k.
   With backward, the reverse: rotates q and k back, and joins q, k and v to mixed. cosines, sines: [tokens, rotary]. */
void split_heads(bf16 *mixed, bf16 *q, bf16 *k, bf16 *v, const float *cosines, const float *sines, int64_t rows,
                 int64_t tokens, int64_t heads, int64_t width, int64_t rotary, int backward, int threads) {
    int64_t half = rotary / 2;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t t = 0; t < tokens; t++) {
                bf16 *joined = mixed + ((row * tokens + t) * heads + head) * 3 * width;
                int64_t place = ((row * heads + head) * tokens + t) * width;
                const float *cosine = cosines + t * rotary, *sine = sines + t * rotary;
                if (backward) {
                    rotate(q + place, joined, cosine, sine, half, width, -1.0f);
                    rotate(k + place, joined + width, cosine, sine, half, width, -1.0f);
                    memcpy(joined + 2 * width, v + place, (size_t)width * sizeof(bf16));
                } else {
                    rotate(joined, q + place, cosine, sine, half, width, 1.0f);
                    rotate(joined + width, k + place, cosine, sine, half, width, 1.0f);
                    memcpy(v + place, joined + 2 * width, (size_t)width * sizeof(bf16));
                }
            }
}

#define TOKENS 256 /* MAX_TOKENS in native.py */
#define WIDEST 128 /* MAX_WIDTH in native.py */
#define KEYS 8     /* keys whose scores are summed at once */

static const signs lane_numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Transposes a square of 16 vectors: swaps blocks of 8, 4, 2 and 1, or where shuffles need constants, single numbers. */
static inline void transpose_square(vec *x) {
#ifdef __clang__
    float turned[LANES * LANES];
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) turned[j * LANES + i] = x[i][j];
    memcpy(x, turned, sizeof turned);
#else
    _Pragma("GCC unroll 4") for (int reach = LANES / 2; reach; reach /= 2) {
        signs upper = (lane_numbers & reach) / reach, low = lane_numbers + upper * (LANES - reach);
        signs high = lane_numbers + reach + upper * (LANES - reach);
        _Pragma("GCC unroll 16") for (int i = 0; i < LANES; i++) {
            if (i & reach) continue;
            vec a = x[i], b = x[i + reach];
            x[i] = __builtin_shuffle(a, b, low);
            x[i + reach] = __builtin_shuffle(a, b, high);
        }
    }
#endif
}

/* to [width, stride] <- `count` rows of queries or keys at x, `step` numbers apart, as columns; rotated by the columns of
   cosines and sines [half, stride]. */
static inline void load_turned(float *to, int64_t stride, const bf16 *x, int64_t step, int64_t count, int64_t width,
                               const float *cosines, const float *sines, int64_t half, int64_t turned) {
    for (int64_t j = 0; j < width; j += LANES) {
        vec square[LANES];
        for (int64_t i = 0; i < LANES; i++) square[i] = i < count ? load_bf16(x + i * step + j) : (vec){0};
        transpose_square(square);
        for (int64_t i = 0; i < LANES; i++) *(vec *)(to + (j + i) * stride) = square[i];
    }
    for (int64_t i = 0; i < half; i++) {
        vec *one = (vec *)(to + i * stride), *two = (vec *)(to + (half + i) * stride), a = *one, b = *two;
        vec cosine = *(const vec *)(cosines + i * turned), sine = *(const vec *)(sines + i * turned);
        *one = round_bf16(a * cosine - b * sine);
        *two = round_bf16(b * cosine + a * sine);
    }
}

/* Attention of mixed [rows, tokens, heads, 3 width] with rotated queries and keys, as split_heads and causal_softmax
   have it: out [rows, tokens, heads, width], and logsumexp [rows, heads, tokens] unless that is NULL. Sixteen queries
   are the lanes of a vector. cosines, sines: [half, tokens to whole vectors]. */
void attend_heads(const bf16 *mixed, const float *cosines, const float *sines, bf16 *out, float *logsumexp, int64_t rows,
                  int64_t tokens, int64_t heads, int64_t width, int64_t half, float scale, int threads) {
    int64_t padded = (tokens + LANES - 1) / LANES * LANES, step = 3 * heads * width;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            float keys[WIDEST * TOKENS], values[WIDEST * TOKENS], queries[WIDEST * LANES], scores[TOKENS * LANES];
            const bf16 *from = mixed + row * tokens * step + head * 3 * width;
            for (int64_t begin = 0; begin < tokens; begin += LANES) {
                int64_t count = tokens - begin < LANES ? tokens - begin : LANES, seen = begin + LANES;
                load_turned(queries, LANES, from + begin * step, step, count, width, cosines + begin, sines + begin,
                            half, padded);
                load_turned(keys + begin, padded, from + begin * step + width, step, count, width, cosines + begin,
                            sines + begin, half, padded);
                for (int64_t t = begin; t < seen; t++)
                    for (int64_t j = 0; j < width; j += LANES)
                        *(vec *)(values + t * width + j) =
                            t < tokens ? load_bf16(from + t * step + 2 * width + j) : (vec){0};
                vec top = (vec){0} - INFINITY, total = {0};
                for (int64_t j = 0; j < seen; j += KEYS) {
                    vec sums[KEYS] = {0};
                    for (int64_t k = 0; k < width; k++)
                        for (int b = 0; b < KEYS; b++)
                            sums[b] += *(vec *)(queries + k * LANES) * keys[k * padded + j + b];
                    for (int b = 0; b < KEYS; b++) {
                        vec x = scale * round_bf16(sums[b]);
                        if (j + KEYS > begin) x = choose(lane_numbers >= (int32_t)(j + b - begin), x, (vec){0} - INFINITY);
                        top = choose(x > top, x, top);
                        *(vec *)(scores + (j + b) * LANES) = x;
                    }
                }
                for (int64_t j = 0; j < seen; j++) {
                    vec x = *(vec *)(scores + j * LANES), p = exp_vec(x - top);
                    if (j >= begin) p = choose(x == (vec){0} - INFINITY, (vec){0}, p);
                    total += p;
                    *(vec *)(scores + j * LANES) = p;
                }
                vec factor = 1.0f / total;
                for (int64_t j = 0; j < seen; j++)
                    *(vec *)(scores + j * LANES) = round_bf16(factor * *(vec *)(scores + j * LANES));
                for (int64_t d = 0; d < width; d += LANES) {
                    vec sums[LANES] = {0};
                    for (int64_t j = 0; j < seen; j++)
                        for (int i = 0; i < LANES; i++)
                            sums[i] += *(vec *)(scores + j * LANES) * values[j * width + d + i];
                    transpose_square(sums);
                    for (int64_t i = 0; i < count; i++)
                        store_bf16(out + ((row * tokens + begin + i) * heads + head) * width + d, sums[i]);
                }
                if (logsumexp)
                    for (int64_t i = 0; i < count; i++)
                        logsumexp[(row * heads + head) * tokens + begin + i] = top[i] + logf(total[i]);
            }
        }
}
