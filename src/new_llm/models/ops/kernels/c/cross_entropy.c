/* Turns rows of logits into losses and, in place, into the losses' gradients, one row at a time while it is in cache. */
#include "kernels.h"

#define BLOCK 2048 /* numbers summed in float before the sum is added to a double */

/* losses[i] = scale_i (logsumexp(x_i) - x_i[target_i]); with write_gradients also x_i <- scale_i (softmax(x_i) - e_target).
   A target outside 0 ... columns - 1 asks for nothing: loss and gradient are 0. scales may be NULL (all 1). */
#define DEFINE_SCORE_ROWS(NAME, TYPE, LOAD, STORE)                                                                    \
    void NAME(TYPE *logits, int64_t rows, int64_t columns, const int64_t *targets, const float *scales, float *losses, \
              int write_gradients, int threads) {                                                                     \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t i = 0; i < rows; i++) {        \
            TYPE *row = logits + i * columns;                                                                         \
            int64_t target = targets[i];                                                                              \
            if (target < 0 || target >= columns) {                                                                    \
                losses[i] = 0.0f;                                                                                     \
                if (write_gradients) memset(row, 0, (size_t)columns * sizeof(TYPE));                                  \
                continue;                                                                                             \
            }                                                                                                         \
            float scale = scales ? scales[i] : 1.0f, top = -INFINITY;                                                 \
            _Pragma("omp simd reduction(max : top)") for (int64_t j = 0; j < columns; j++) {                          \
                float x = LOAD(row[j]);                                                                               \
                top = x > top ? x : top;                                                                              \
            }                                                                                                         \
            double total = 0.0;                                                                                       \
            for (int64_t begin = 0; begin < columns; begin += BLOCK) {                                                \
                int64_t end = begin + BLOCK < columns ? begin + BLOCK : columns;                                      \
                float sum = 0.0f;                                                                                     \
                _Pragma("omp simd reduction(+ : sum)") for (int64_t j = begin; j < end; j++) sum +=                   \
                    exp_negative(LOAD(row[j]) - top);                                                                 \
                total += sum;                                                                                         \
            }                                                                                                         \
            float log_total = (float)log(total), chosen = LOAD(row[target]) - top;                                    \
            losses[i] = scale * (log_total - chosen);                                                                 \
            if (!write_gradients) continue;                                                                           \
            float factor = (float)(scale / total);                                                                    \
            _Pragma("omp simd") for (int64_t j = 0; j < columns; j++) row[j] =                                        \
                STORE(factor * exp_negative(LOAD(row[j]) - top));                                                     \
            row[target] = STORE(scale * expm1f(chosen - log_total));                                                  \
        }                                                                                                             \
    }

DEFINE_SCORE_ROWS(score_rows_bfloat16, bf16, from_bf16, to_bf16)
DEFINE_SCORE_ROWS(score_rows_float32, float, from_float, to_float)
