/* The token-by-token delta rule: solving the unit lower triangular system of each chunk, and updating memories. */
#include "kernels.h"

#define MAX_SIZE 64

/* solved <- (I + A)^-1 diag(b), where A_ij = b_i S_ij for j < i. products: S [count, size, size]; strengths:
   b [count, size] (NULL: 1). Row i of the inverse N is e_i - sum_{j < i} A_ij N_j. */
#define DEFINE_SOLVE(NAME, TYPE, STORE)                                                                             \
    void NAME(const float *products, const float *strengths, TYPE *solved, int64_t count, int64_t size,             \
              int threads) {                                                                                        \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t m = 0; m < count; m++) {     \
            float rows[MAX_SIZE * MAX_SIZE];                                                                        \
            const float *b = strengths ? strengths + m * size : NULL;                                               \
            memset(rows, 0, sizeof rows);                                                                           \
            for (int64_t i = 0; i < size; i++) {                                                                    \
                const float *product = products + (m * size + i) * size;                                            \
                float *row = rows + i * MAX_SIZE, strength = b ? b[i] : 1.0f;                                       \
                for (int64_t c = 0; c < i; c += 32) {                                                               \
                    float sums[32] = {0.0f};                                                                        \
                    for (int64_t j = c; j < i; j++) { /* N_jc is 0 for j < c */                                     \
                        const float *other = rows + j * MAX_SIZE + c, weight = strength * product[j];               \
                        _Pragma("omp simd") for (int64_t d = 0; d < 32; d++) sums[d] -= weight * other[d];          \
                    }                                                                                               \
                    memcpy(row + c, sums, sizeof sums);                                                             \
                }                                                                                                   \
                row[i] = 1.0f;                                                                                      \
                TYPE *out = solved + (m * size + i) * size;                                                         \
                _Pragma("omp simd") for (int64_t c = 0; c < size; c++) out[c] = STORE(b ? row[c] * b[c] : row[c]);  \
            }                                                                                                       \
        }                                                                                                           \
    }

/* Backward through W = K^T N diag(b), given W' and Q = -diag(b) A', of which only entries below the diagonal are read:
   symmetric <- Q + Q^T, b_i for_strengths_i <- sum_k W'_ki W_ki - sum_{j < i} Q_ij S_ij.
   W' and W are [count, width, size]. */
#define DEFINE_SOLVE_BACKWARD(NAME, TYPE, LOAD, STORE)                                                              \
    void NAME(const TYPE *below, const float *products, const float *strengths, const TYPE *for_writes,             \
              const TYPE *writes, TYPE *symmetric, float *for_strengths, int64_t count, int64_t size, int64_t width, \
              int threads) {                                                                                        \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t m = 0; m < count; m++) {     \
            float totals[MAX_SIZE];                                                                                 \
            for (int64_t begin = 0; begin < size; begin += 32) {                                                    \
                int64_t count = size - begin < 32 ? size - begin : 32;                                              \
                float sums[32] = {0.0f};                                                                            \
                for (int64_t k = 0; k < width; k++) {                                                               \
                    const TYPE *one = for_writes + (m * width + k) * size + begin;                                  \
                    const TYPE *two = writes + (m * width + k) * size + begin;                                      \
                    if (count == 32)                                                                                \
                        _Pragma("omp simd") for (int64_t c = 0; c < 32; c++) sums[c] += LOAD(one[c]) * LOAD(two[c]); \
                    else                                                                                            \
                        for (int64_t c = 0; c < count; c++) sums[c] += LOAD(one[c]) * LOAD(two[c]);                 \
                }                                                                                                   \
                memcpy(totals + begin, sums, (size_t)count * sizeof(float));                                        \
            }                                                                                                       \
            TYPE *out = symmetric + m * size * size;                                                                \
            for (int64_t i = 0; i < size; i++) {                                                                    \
                const TYPE *q = below + (m * size + i) * size;                                                      \
                const float *s = products + (m * size + i) * size;                                                  \
                float sum = 0.0f;                                                                                   \
                _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < i; j++) sum += LOAD(q[j]) * s[j];    \
                for_strengths[m * size + i] = (totals[i] - sum) / strengths[m * size + i];                            \
                for (int64_t j = 0; j < i; j++) out[i * size + j] = out[j * size + i] = q[j];                       \
                out[i * size + i] = STORE(0.0f);                                                                    \
            }                                                                                                       \
        }                                                                                                           \
    }

/* x = M0 + w (M - M0) + P, for M [batch, heads, size], M0 [heads, size], w [batch, heads] (NULL: 1) and P like M
   (NULL: 0). x is written to wide and, rounded, to narrow, unless these are NULL. */
#define DEFINE_MOVE(NAME, TYPE, LOAD, STORE)                                                                        \
    void NAME(const float *memory, const float *rest, const float *retained, const TYPE *product, float *wide,      \
              TYPE *narrow, int64_t batch, int64_t heads, int64_t size, int threads) {                              \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t m = 0; m < batch * heads; m++) { \
            const float *from = memory + m * size, *base = rest + m % heads * size, w = retained ? retained[m] : 1.0f; \
            const TYPE *added = product ? product + m * size : NULL;                                                \
            for (int64_t begin = 0; begin < size; begin += BLOCK) {                                                 \
                int64_t end = begin + BLOCK < size ? begin + BLOCK : size;                                          \
                float x[BLOCK];                                                                                     \
                _Pragma("omp simd") for (int64_t j = begin; j < end; j++) x[j - begin] =                            \
                    w == 1.0f ? from[j] : base[j] + w * (from[j] - base[j]);                                        \
                if (added) _Pragma("omp simd") for (int64_t j = begin; j < end; j++) x[j - begin] += LOAD(added[j]); \
                if (wide) memcpy(wide + m * size + begin, x, (size_t)(end - begin) * sizeof(float));                \
                if (narrow)                                                                                         \
                    _Pragma("omp simd") for (int64_t j = begin; j < end; j++) narrow[m * size + j] = STORE(x[j - begin]); \
            }                                                                                                       \
        }                                                                                                           \
    }

/* Its backward, with G = dL/dM: x = G - P (NULL: 0). Unless w is NULL: for_retained <- sum (M - M0) x,
   for_rest += (1 - w) x, x <- w x. Then x + R (NULL: 0) is written to G and, rounded, to narrow, unless that is NULL. */
#define DEFINE_RETREAT(NAME, TYPE, LOAD, STORE)                                                                     \
    void NAME(float *g, const TYPE *product, const TYPE *added, const TYPE *memory, const float *rest,              \
              const float *retained, float *for_retained, float *for_rest, TYPE *narrow, int64_t batch,             \
              int64_t heads, int64_t size, int threads) {                                                           \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") for (int64_t m = 0; m < batch * heads; m++) { \
            const float *base = rest + m % heads * size;                                                            \
            float total = 0.0f;                                                                                     \
            for (int64_t begin = m * size; begin < (m + 1) * size; begin += BLOCK) {                                \
                int64_t count = (m + 1) * size - begin < BLOCK ? (m + 1) * size - begin : BLOCK;                    \
                float x[BLOCK];                                                                                     \
                memcpy(x, g + begin, (size_t)count * sizeof(float));                                                \
                if (product) _Pragma("omp simd") for (int64_t j = 0; j < count; j++) x[j] -= LOAD(product[begin + j]); \
                if (retained) {                                                                                     \
                    const float *start = base + begin - m * size, w = retained[m];                                  \
                    float sum = 0.0f;                                                                               \
                    _Pragma("omp simd reduction(+ : sum)") for (int64_t j = 0; j < count; j++) {                    \
                        sum += (LOAD(memory[begin + j]) - start[j]) * x[j];                                         \
                        for_rest[begin + j] += (1.0f - w) * x[j];                                                   \
                        x[j] *= w;                                                                                  \
                    }                                                                                               \
                    total += sum;                                                                                   \
                }                                                                                                   \
                if (added) _Pragma("omp simd") for (int64_t j = 0; j < count; j++) x[j] += LOAD(added[begin + j]);  \
                memcpy(g + begin, x, (size_t)count * sizeof(float));                                                \
                if (narrow) _Pragma("omp simd") for (int64_t j = 0; j < count; j++) narrow[begin + j] = STORE(x[j]); \
            }                                                                                                       \
            if (retained) for_retained[m] = total;                                                                  \
        }                                                                                                           \
    }

#define BLOCK 512

DEFINE_SOLVE(solve_chunks_bfloat16, bf16, to_bf16)
DEFINE_SOLVE(solve_chunks_float32, float, to_float)
DEFINE_SOLVE_BACKWARD(solve_chunks_backward_bfloat16, bf16, from_bf16, to_bf16)
DEFINE_SOLVE_BACKWARD(solve_chunks_backward_float32, float, from_float, to_float)
DEFINE_MOVE(move_memories_bfloat16, bf16, from_bf16, to_bf16)
DEFINE_MOVE(move_memories_float32, float, from_float, to_float)
DEFINE_RETREAT(retreat_memories_bfloat16, bf16, from_bf16, to_bf16)
DEFINE_RETREAT(retreat_memories_float32, float, from_float, to_float)
