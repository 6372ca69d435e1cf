/* Scaling rows to given lengths with its backward, LayerNorm, and the sum of a layer's parts. */
#include "kernels.h"

/* y_r = l_r x_r / max(|x_r|, least) for rows [rows, width]; the divisors go to norms [rows]. lengths: NULL: 1. */
#define DEFINE_SCALE_ROWS(FROM, TO, X, LOAD, STORE_X, Y, LOAD_Y, STORE)                                                \
    void scale_rows_##FROM##_##TO(const X *x, const float *lengths, Y *y, float *norms, int64_t rows, int64_t width,   \
                                  float least, int threads) {                                                          \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t r = 0; r < rows; r++) {         \
            const X *from = x + r * width;                                                                             \
            Y *to = y + r * width;                                                                                     \
            float sum = 0.0f;                                                                                          \
            _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < width; j++) sum += LOAD(from[j]) * LOAD(from[j]); \
            float norm = sqrtf(sum);                                                                                   \
            norms[r] = norm = norm > least ? norm : least;                                                             \
            float factor = (lengths ? lengths[r] : 1.0f) / norm;                                                       \
            _Pragma("omp simd") for (int64_t j = 0; j < width; j++) to[j] = STORE(factor * LOAD(from[j]));             \
        }                                                                                                              \
    }                                                                                                                  \
    /* With f = l / |x|: for_x = f (g - x (x.g) / |x|^2), for_lengths = x.g / |x|. */                                  \
    void scale_rows_backward_##FROM##_##TO(const X *x, const float *lengths, const float *norms, const Y *upstream,    \
                                           X *for_x, float *for_lengths, int64_t rows, int64_t width, int threads) {   \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t r = 0; r < rows; r++) {         \
            const X *from = x + r * width;                                                                             \
            const Y *g = upstream + r * width;                                                                         \
            X *to = for_x + r * width;                                                                                 \
            float along = 0.0f;                                                                                        \
            _Pragma("omp simd reduction(+ : along)") for (int64_t j = 0; j < width; j++) along += LOAD(from[j]) * LOAD_Y(g[j]); \
            along /= norms[r];                                                                                         \
            if (for_lengths) for_lengths[r] = along;                                                                   \
            float factor = (lengths ? lengths[r] : 1.0f) / norms[r], back = factor * along / norms[r];                 \
            _Pragma("omp simd") for (int64_t j = 0; j < width; j++) to[j] =                                            \
                STORE_X(factor * LOAD_Y(g[j]) - back * LOAD(from[j]));                                                 \
        }                                                                                                              \
    }

DEFINE_SCALE_ROWS(float32, float32, float, from_float, to_float, float, from_float, to_float)
DEFINE_SCALE_ROWS(float32, bfloat16, float, from_float, to_float, bf16, from_bf16, to_bf16)
DEFINE_SCALE_ROWS(bfloat16, float32, bf16, from_bf16, to_bf16, float, from_float, to_float)
DEFINE_SCALE_ROWS(bfloat16, bfloat16, bf16, from_bf16, to_bf16, bf16, from_bf16, to_bf16)

/* y = LayerNorm(x) weight + bias for rows [rows, width]; the means and 1 / standard deviations go to means and factors. */
void normalize_rows(const float *x, const float *weight, const float *bias, bf16 *y, float *means, float *factors,
                    int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t begin = 0; begin < rows; begin += LANES) { /* loop by loop, so that rows' sums overlap */
        int64_t end = begin + LANES < rows ? begin + LANES : rows;
        for (int64_t r = begin; r < end; r++) {
            float sum = 0.0f;
            _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < width; j++) sum += x[r * width + j];
            means[r] = sum / (float)width;
        }
        for (int64_t r = begin; r < end; r++) {
            float squares = 0.0f, mean = means[r];
            _Pragma("omp simd reduction(+ : squares)") for (int64_t j = 0; j < width; j++) squares +=
                (x[r * width + j] - mean) * (x[r * width + j] - mean);
            factors[r] = 1.0f / sqrtf(squares / (float)width + eps);
        }
        for (int64_t r = begin; r < end; r++) {
            float mean = means[r], factor = factors[r];
            _Pragma("omp simd") for (int64_t j = 0; j < width; j++) y[r * width + j] =
                to_bf16((x[r * width + j] - mean) * factor * weight[j] + bias[j]);
        }
    }
}

/* sum = x + (a + b), where a + b is rounded. */
void add_parts(const bf16 *a, const bf16 *b, const float *x, float *sum, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) sum[i] = x[i] + from_bf16(to_bf16(from_bf16(a[i]) + from_bf16(b[i])));
}
