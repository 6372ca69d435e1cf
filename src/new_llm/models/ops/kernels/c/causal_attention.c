/* Rows of causal attention's scores to probabilities, and their gradients; a row's unseen part is set to 0. */
#include "kernels.h"

/* scores [batches, rows, columns] <- softmax(scale * scores) over each row's first `first + row + 1` columns;
   logsumexp [batches, rows] is of the scaled scores. */
void causal_softmax(bf16 *scores, float *logsumexp, int64_t batches, int64_t rows, int64_t columns, int64_t first,
                    float scale, int threads) {
#pragma omp parallel for schedule(dynamic, 32) num_threads(threads)
    for (int64_t i = 0; i < batches * rows; i++) {
        bf16 *row = scores + i * columns;
        int64_t seen = first + i % rows + 1;
        float top = -INFINITY, total = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < seen; j++) {
            float x = from_bf16(row[j]);
            top = x > top ? x : top;
        }
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < seen; j++) total += exp_negative(scale * (from_bf16(row[j]) - top));
        float factor = 1.0f / total;
#pragma omp simd
        for (int64_t j = 0; j < seen; j++) row[j] = to_bf16(factor * exp_negative(scale * (from_bf16(row[j]) - top)));
        memset(row + seen, 0, (size_t)(columns - seen) * sizeof(bf16));
        logsumexp[i] = scale * top + logf(total);
    }
}

/* scores <- p = exp(scale * scores - logsumexp), and of p's gradients: gradients <- scale * p * (gradients - p . gradients) */
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
