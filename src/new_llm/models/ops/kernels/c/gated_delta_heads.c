/* What a gated delta layer computes between its products, but for the rule: heads from convolved inputs, and gated,
   normalised outputs. Inside, everything is float32; `narrow` says that the layer's tensors are bfloat16. */
#include "kernels.h"

#define BLOCK 32
#define LONGEST 8 /* MAX_CONVOLUTION in native.py */

typedef float taps[LONGEST][WIDEST];

static void load_row(float *to, const void *from, int64_t at, int64_t width, int narrow) {
    const bf16 *half = (const bf16 *)from + at;
    if (narrow)
        _Pragma("omp simd") for (int64_t j = 0; j < width; j++) to[j] = from_bf16(half[j]);
    else
        memcpy(to, (const float *)from + at, (size_t)width * sizeof(float));
}

static void store_row(void *to, int64_t at, const float *from, int64_t width, int narrow) {
    bf16 *half = (bf16 *)to + at;
    if (narrow)
        _Pragma("omp simd") for (int64_t j = 0; j < width; j++) half[j] = to_bf16(from[j]);
    else
        memcpy((float *)to + at, from, (size_t)width * sizeof(float));
}

static inline float sigmoid(float x) {
    float e = exp_negative(x < 0.0f ? x : -x), s = 1.0f / (1.0f + e);
    return x < 0.0f ? e * s : s;
}

static float dot(const float *a, const float *b, int64_t width) {
    float sum = 0.0f;
    _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < width; j++) sum += a[j] * b[j];
    return sum;
}

/* The convolution's inputs for `count` tokens from `begin`, with the size - 1 before them; see convolve_heads. */
static void load_inputs(float (*inputs)[WIDEST], const void *x, const float *before, int64_t row, int64_t tokens,
                        int64_t begin, int64_t count, int64_t channels, int64_t channel, int64_t width, int64_t size,
                        int narrow) {
    for (int64_t i = 0; i < count + size - 1; i++) {
        int64_t t = begin + i - (size - 1);
        if (t < 0)
            load_row(inputs[i], before, (row * (size - 1) + t + size - 1) * channels + channel, width, 0);
        else
            load_row(inputs[i], x, (row * tokens + t) * channels + channel, width, narrow);
    }
}

static void load_taps(taps weights, const float *weight, int64_t channel, int64_t width, int64_t size) {
    for (int64_t tap = 0; tap < size; tap++)
        for (int64_t j = 0; j < width; j++) weights[tap][j] = weight[(channel + j) * size + tap];
}

/* y for whole vectors, so that a vector's sum stays in a register; the lanes past `width` are not used. */
static void convolve(float *y, float (*inputs)[WIDEST], taps weights, int64_t width, int64_t size) {
    for (int64_t j = 0; j < width; j += LANES) {
        vec sum = {0.0f};
        for (int64_t tap = 0; tap < size; tap++) sum += *(vec *)(weights[tap] + j) * *(vec *)(inputs[tap] + j);
        *(vec *)(y + j) = sum;
    }
}

/* x [rows, tokens, 3, heads, width] after before [rows, size - 1, 3, heads, width] -> q, k and v [rows, heads, tokens,
   width]: SiLU of the convolution with weight [3 heads width, size], q and k then of length `scale` and 1. */
void convolve_heads(const void *x, const float *before, const float *weight, float *q, float *k, float *v, int64_t rows,
                    int64_t tokens, int64_t heads, int64_t width, int64_t size, float scale, float least, int narrow,
                    int threads) {
    int64_t channels = 3 * heads * width;
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t part = 0; part < 3; part++) {
                float inputs[BLOCK + LONGEST - 1][WIDEST];
                taps weights;
                int64_t channel = (part * heads + head) * width;
                float *out = (part == 0 ? q : part == 1 ? k : v) + (row * heads + head) * tokens * width;
                load_taps(weights, weight, channel, width, size);
                for (int64_t begin = 0; begin < tokens; begin += BLOCK) {
                    int64_t count = tokens - begin < BLOCK ? tokens - begin : BLOCK;
                    load_inputs(inputs, x, before, row, tokens, begin, count, channels, channel, width, size, narrow);
                    for (int64_t i = 0; i < count; i++) {
                        float y[WIDEST], factor = 1.0f;
                        convolve(y, inputs + i, weights, width, size);
                        _Pragma("omp simd") for (int64_t j = 0; j < width; j++) y[j] *= sigmoid(y[j]);
                        if (part < 2) {
                            float norm = sqrtf(dot(y, y, width));
                            factor = (part == 0 ? scale : 1.0f) / (norm > least ? norm : least);
                        }
                        float *to = out + (begin + i) * width;
                        _Pragma("omp simd") for (int64_t j = 0; j < width; j++) to[j] = factor * y[j];
                    }
                }
            }
}

/* Its backward, block by block from the end. for_weight [rows, 3 heads width, size] holds each row's gradient. */
void convolve_heads_backward(const void *x, const float *before, const float *weight, const float *for_q,
                             const float *for_k, const float *for_v, void *for_x, float *for_before, float *for_weight,
                             int64_t rows, int64_t tokens, int64_t heads, int64_t width, int64_t size, float scale,
                             float least, int narrow, int threads) {
    int64_t channels = 3 * heads * width, kept = size - 1;
#pragma omp parallel for collapse(3) schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t part = 0; part < 3; part++) {
                float inputs[BLOCK + LONGEST - 1][WIDEST], changes[BLOCK + 2 * LONGEST][WIDEST], total[WIDEST];
                taps weights, sums;
                int64_t channel = (part * heads + head) * width;
                const float *upstream = (part == 0 ? for_q : part == 1 ? for_k : for_v);
                upstream += (row * heads + head) * tokens * width;
                load_taps(weights, weight, channel, width, size);
                memset(sums, 0, sizeof sums);
                memset(changes, 0, sizeof changes);
                int64_t begin = (tokens - 1) / BLOCK * BLOCK, count = tokens - begin;
                for (; begin >= 0; begin -= BLOCK, count = BLOCK) {
                    load_inputs(inputs, x, before, row, tokens, begin, count, channels, channel, width, size, narrow);
                    for (int64_t i = count - 1; i >= 0; i--) {
                        float y[WIDEST], slope[WIDEST], *change = changes[i];
                        const float *given = upstream + (begin + i) * width;
                        convolve(y, inputs + i, weights, width, size);
                        _Pragma("omp simd") for (int64_t j = 0; j < width; j++) {
                            float s = sigmoid(y[j]), silu = y[j] * s;
                            slope[j] = s + silu * (1.0f - s);
                            y[j] = silu;
                        }
                        float factor = 1.0f, along = 0.0f;
                        if (part < 2) {
                            float norm = sqrtf(dot(y, y, width));
                            norm = norm > least ? norm : least;
                            factor = (part == 0 ? scale : 1.0f) / norm;
                            along = factor * dot(y, given, width) / (norm * norm);
                        }
                        _Pragma("omp simd") for (int64_t j = 0; j < width; j++) change[j] =
                            slope[j] * (factor * given[j] - along * y[j]);
                        for (int64_t tap = 0; tap < size; tap++)
                            for (int64_t j = 0; j < width; j += LANES)
                                *(vec *)(sums[tap] + j) += *(vec *)(change + j) * *(vec *)(inputs[i + tap] + j);
                    }
                    /* x_t went into y_t … y_{t + size - 1}; in the first block, `before` too */
                    for (int64_t i = begin ? 0 : -kept; i < count; i++) {
                        for (int64_t j = 0; j < width; j += LANES) {
                            vec sum = {0.0f};
                            for (int64_t tap = 0; tap < size && tap <= i + kept; tap++)
                                sum += *(vec *)(weights[tap] + j) * *(vec *)(changes[i + kept - tap] + j);
                            *(vec *)(total + j) = sum;
                        }
                        if (i < 0)
                            store_row(for_before, (row * kept + i + kept) * channels + channel, total, width, 0);
                        else
                            store_row(for_x, (row * tokens + begin + i) * channels + channel, total, width, narrow);
                    }
                    memmove(changes[BLOCK], changes[0], sizeof(float) * WIDEST * (size_t)kept);
                }
                for (int64_t tap = 0; tap < size; tap++)
                    for (int64_t j = 0; j < width; j++)
                        for_weight[(row * channels + channel + j) * size + tap] = sums[tap][j];
            }
}

/* reads [rows, heads, tokens, width] and gate [rows, tokens, heads, width] -> out like gate:
   RMSNorm(reads) weight SiLU(gate). */
void gate_heads(const float *reads, const float *weight, const void *gate, void *out, int64_t rows, int64_t tokens,
                int64_t heads, int64_t width, float eps, int narrow, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++)
            for (int64_t t = 0; t < tokens; t++) {
                const float *x = reads + ((row * heads + head) * tokens + t) * width;
                int64_t at = ((row * tokens + t) * heads + head) * width;
                float g[WIDEST], factor = 1.0f / sqrtf(dot(x, x, width) / (float)width + eps);
                load_row(g, gate, at, width, narrow);
                _Pragma("omp simd") for (int64_t j = 0; j < width; j++) g[j] *=
                    sigmoid(g[j]) * factor * weight[j] * x[j];
                store_row(out, at, g, width, narrow);
            }
}

/* Its backward. for_weight [rows, heads, width] holds each row's and head's gradient. */
void gate_heads_backward(const float *reads, const float *weight, const void *gate, const void *upstream,
                         float *for_reads, float *for_weight, void *for_gate, int64_t rows, int64_t tokens,
                         int64_t heads, int64_t width, float eps, int narrow, int threads) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            float sums[WIDEST] = {0.0f};
            for (int64_t t = 0; t < tokens; t++) {
                int64_t first = ((row * heads + head) * tokens + t) * width;
                int64_t at = ((row * tokens + t) * heads + head) * width;
                const float *x = reads + first;
                float g[WIDEST], given[WIDEST], change[WIDEST];
                float factor = 1.0f / sqrtf(dot(x, x, width) / (float)width + eps);
                load_row(g, gate, at, width, narrow);
                load_row(given, upstream, at, width, narrow);
                _Pragma("omp simd") for (int64_t j = 0; j < width; j++) {
                    float s = sigmoid(g[j]), silu = g[j] * s, unit = factor * x[j];
                    float one = given[j] * silu;
                    sums[j] += one * unit;
                    change[j] = one * weight[j];
                    g[j] = given[j] * unit * weight[j] * (s + silu * (1.0f - s));
                }
                float along = factor * factor * factor * dot(change, x, width) / (float)width;
                float *to = for_reads + first;
                _Pragma("omp simd") for (int64_t j = 0; j < width; j++) to[j] = factor * change[j] - along * x[j];
                store_row(for_gate, at, g, width, narrow);
            }
            memcpy(for_weight + (row * heads + head) * width, sums, (size_t)width * sizeof(float));
        }
}
