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
