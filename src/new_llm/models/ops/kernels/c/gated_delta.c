/* The gated delta rule in chunks of tokens, and its backward; the equations are in ops/gated_delta.py.

   A chunk's tokens hold to U = diag(b) W with W_i = v_i - e^{g_i} k_i M - sum_{j < i} r_ij (k_i . k_j) U_j, where
   r_ij = e^{g_i - g_j}. Their reads are sum_{j <= i} r_ij (q_i . k_j) U_j + e^{g_i} q_i M, and the chunk leaves
   e^{g_C} M + (l K)^T U, where l_i = e^{g_C - g_i}. Everything is float32. Rows are padded with zeros to whole vectors,
   and the last chunk with tokens that change nothing. */
#include "kernels.h"

#define CHUNK 16
#define TILE 8

typedef float rows[CHUNK * WIDEST];
typedef float matrix[WIDEST * WIDEST];
typedef float square[CHUNK * CHUNK];

static inline int64_t pad(int64_t width) { return (width + LANES - 1) / LANES * LANES; }

/* c (+)= a b, for c [m, n] and b [depth, n] by rows, a_ip at a[i * row + p * step]; m is a multiple of TILE, n of LANES. */
static inline __attribute__((always_inline)) void multiply(float *c, const float *a, int64_t row, int64_t step,
                                                           const float *b, int64_t m, int64_t n, int64_t depth,
                                                           int is_added) {
    for (int64_t j = 0; j < n; j += LANES)
        for (int64_t i = 0; i < m; i += TILE) {
            vec sums[TILE];
            for (int t = 0; t < TILE; t++) sums[t] = is_added ? *(vec *)(c + (i + t) * n + j) : (vec){0.0f};
            for (int64_t p = 0; p < depth; p++) {
                vec x = *(const vec *)(b + p * n + j);
                for (int t = 0; t < TILE; t++) sums[t] += a[(i + t) * row + p * step] * x;
            }
            for (int t = 0; t < TILE; t++) *(vec *)(c + (i + t) * n + j) = sums[t];
        }
}

/* to [height, width to whole vectors] <- from [count, width], padded with zeros. */
static void load(float *to, const float *from, int64_t count, int64_t width, int64_t height) {
    int64_t padded = pad(width);
    if (count < height || width < padded) memset(to, 0, (size_t)(height * padded) * sizeof(float));
    for (int64_t i = 0; i < count; i++) memcpy(to + i * padded, from + i * width, (size_t)width * sizeof(float));
}

static void store(float *to, const float *from, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; i++) memcpy(to + i * width, from + i * pad(width), (size_t)width * sizeof(float));
}

static void transpose(float *to, const float *from, int64_t height, int64_t width) {
    for (int64_t i = 0; i < height; i++)
        for (int64_t j = 0; j < width; j++) to[j * height + i] = from[i * width + j];
}

static float dot(const float *a, const float *b, int64_t width) {
    vec sums = {0.0f};
    for (int64_t j = 0; j < width; j += LANES) sums += *(const vec *)(a + j) * *(const vec *)(b + j);
    float total = 0.0f;
    for (int j = 0; j < LANES; j++) total += sums[j];
    return total;
}

static void scale_rows(float *x, const float *factors, int64_t width) {
    for (int64_t i = 0; i < CHUNK; i++)
        for (int64_t j = 0; j < width; j += LANES) *(vec *)(x + i * width + j) *= factors[i];
}

/* What forward and backward need of a chunk: b, e^g, l, r (0 for later tokens), and the products k k^T and q k^T. */
typedef struct {
    float strength[CHUNK], grown[CHUNK], left[CHUNK];
    square ratios, between, scores;
    rows q, k;
} Chunk;

static void read_chunk(Chunk *chunk, const float *q, const float *k, const float *strengths, const float *log_decay,
                       int64_t count, int64_t width) {
    float total[CHUNK], sum = 0.0f;
    rows turned;
    load(chunk->q, q, count, width, CHUNK);
    load(chunk->k, k, count, width, CHUNK);
    memset(chunk->strength, 0, sizeof chunk->strength);
    memcpy(chunk->strength, strengths, (size_t)count * sizeof(float));
    for (int64_t i = 0; i < CHUNK; i++) total[i] = sum += i < count ? log_decay[i] : 0.0f;
    for (int64_t i = 0; i < CHUNK; i++) {
        chunk->grown[i] = exp_negative(total[i]);
        chunk->left[i] = exp_negative(sum - total[i]);
        _Pragma("omp simd") for (int64_t j = 0; j < CHUNK; j++) {
            float x = total[i] - total[j], ratio = exp_negative(x > 0.0f ? 0.0f : x);
            chunk->ratios[i * CHUNK + j] = j > i ? 0.0f : ratio;
        }
    }
    int64_t padded = pad(width);
    transpose(turned, chunk->k, CHUNK, padded);
    multiply(chunk->between, chunk->k, padded, 1, turned, CHUNK, CHUNK, padded, 0);
    multiply(chunk->scores, chunk->q, padded, 1, turned, CHUNK, CHUNK, padded, 0);
}

/* q and k [groups, tokens, width], v [groups, tokens, values], strengths and log_decay [groups, tokens], memory
   [groups, width, values] -> reads and W (errors; may be NULL) like v, memory before each chunk (states
   [chunks, groups, width, values]; may be NULL), and memory after `written` chunks (kept). */
void gated_delta(const float *q, const float *k, const float *v, const float *strengths, const float *log_decay,
                 const float *memory, float *reads, float *errors, float *states, float *kept, int64_t groups,
                 int64_t tokens, int64_t width, int64_t values, int64_t written, int threads) {
    int64_t k_padded = pad(width), v_padded = pad(values), size = width * values;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        matrix held;
        rows x, read, written_values;
        Chunk chunk;
        load(held, memory + group * size, width, values, k_padded);
        for (int64_t begin = 0, index = 0; begin < tokens; begin += CHUNK, index++) {
            int64_t first = group * tokens + begin, count = tokens - begin < CHUNK ? tokens - begin : CHUNK;
            if (index == written) store(kept + group * size, held, width, values);
            if (states) store(states + (index * groups + group) * size, held, width, values);
            read_chunk(&chunk, q + first * width, k + first * width, strengths + first, log_decay + first, count, width);
            load(x, v + first * values, count, values, CHUNK);
            multiply(read, chunk.k, k_padded, 1, held, CHUNK, v_padded, k_padded, 0);
            for (int64_t i = 0; i < CHUNK; i++)
                for (int64_t j = 0; j < v_padded; j += LANES) {
                    vec error = *(vec *)(x + i * v_padded + j) - chunk.grown[i] * *(vec *)(read + i * v_padded + j);
                    for (int64_t m = 0; m < i; m++)
                        error -= chunk.ratios[i * CHUNK + m] * chunk.between[i * CHUNK + m] *
                                 *(vec *)(written_values + m * v_padded + j);
                    *(vec *)(x + i * v_padded + j) = error;
                    *(vec *)(written_values + i * v_padded + j) = chunk.strength[i] * error;
                }
            if (errors) store(errors + first * values, x, count, values);
            for (int64_t i = 0; i < CHUNK * CHUNK; i++) chunk.scores[i] *= chunk.ratios[i];
            multiply(read, chunk.q, k_padded, 1, held, CHUNK, v_padded, k_padded, 0);
            scale_rows(read, chunk.grown, v_padded);
            multiply(read, chunk.scores, CHUNK, 1, written_values, CHUNK, v_padded, CHUNK, 1);
            store(reads + first * values, read, count, values);
            scale_rows(chunk.k, chunk.left, k_padded);
            for (int64_t j = 0; j < k_padded * v_padded; j += LANES) *(vec *)(held + j) *= chunk.grown[CHUNK - 1];
            multiply(held, chunk.k, 1, k_padded, written_values, k_padded, v_padded, CHUNK, 1);
        }
        if (written * CHUNK >= tokens) store(kept + group * size, held, width, values);
    }
}

/* Its backward, from the gradients of reads and kept: G is the gradient of the memory after a chunk. for_memory holds
   the gradient of the memory before the first. */
void gated_delta_backward(const float *q, const float *k, const float *strengths, const float *log_decay,
                          const float *errors, const float *states, const float *for_reads, const float *for_kept,
                          float *for_q, float *for_k, float *for_v, float *for_strengths, float *for_decay,
                          float *for_memory, int64_t groups, int64_t tokens, int64_t width, int64_t values,
                          int64_t written, int threads) {
    int64_t k_padded = pad(width), v_padded = pad(values), size = width * values;
    int64_t chunks = (tokens + CHUNK - 1) / CHUNK;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t group = 0; group < groups; group++) {
        matrix held, g, turned, added;
        rows w, u, u_turned, upstream, solved, x, y, dq, dk;
        square above, inside, mixed;
        float for_total[CHUNK];
        Chunk chunk;
        memset(g, 0, (size_t)(k_padded * v_padded) * sizeof(float));
        for (int64_t index = chunks; index >= 0; index--) {
            if (index == written || (index == chunks && written > chunks)) {
                load(added, for_kept + group * size, width, values, k_padded);
                for (int64_t j = 0; j < k_padded * v_padded; j += LANES) *(vec *)(g + j) += *(vec *)(added + j);
            }
            if (index == 0) break;
            int64_t begin = (index - 1) * CHUNK, first = group * tokens + begin;
            int64_t count = tokens - begin < CHUNK ? tokens - begin : CHUNK;
            read_chunk(&chunk, q + first * width, k + first * width, strengths + first, log_decay + first, count, width);
            load(held, states + ((index - 1) * groups + group) * size, width, values, k_padded);
            load(w, errors + first * values, count, values, CHUNK);
            load(upstream, for_reads + first * values, count, values, CHUNK);
            memcpy(u, w, (size_t)(CHUNK * v_padded) * sizeof(float));
            scale_rows(u, chunk.strength, v_padded);
            transpose(u_turned, u, CHUNK, v_padded);
            for (int64_t i = 0; i < CHUNK * CHUNK; i++) mixed[i] = chunk.ratios[i] * chunk.scores[i];
            /* U' = (r S)^T O' + l K G, then y = (I + A)^-T U', of which v' = diag(b) y. */
            multiply(solved, mixed, 1, CHUNK, upstream, CHUNK, v_padded, CHUNK, 0);
            memcpy(x, chunk.k, (size_t)(CHUNK * k_padded) * sizeof(float));
            scale_rows(x, chunk.left, k_padded);
            multiply(solved, x, k_padded, 1, g, CHUNK, v_padded, k_padded, 1);
            for (int64_t m = CHUNK - 1; m > 0; m--)
                for (int64_t j = 0; j < v_padded; j += LANES) {
                    vec one = chunk.strength[m] * *(vec *)(solved + m * v_padded + j);
                    for (int64_t i = 0; i < m; i++)
                        *(vec *)(solved + i * v_padded + j) -=
                            chunk.ratios[m * CHUNK + i] * chunk.between[m * CHUNK + i] * one;
                }
            for (int64_t i = 0; i < count; i++)
                for_strengths[first + i] = dot(solved + i * v_padded, w + i * v_padded, v_padded);
            /* Gradients of r S (inside), of r k k^T (above, times b), and from both of g. */
            multiply(inside, upstream, v_padded, 1, u_turned, CHUNK, CHUNK, v_padded, 0);
            multiply(above, solved, v_padded, 1, u_turned, CHUNK, CHUNK, v_padded, 0);
            memset(for_total, 0, sizeof for_total);
            for (int64_t i = 0; i < CHUNK; i++) {
                float sum = 0.0f;
                for (int64_t j = 0; j < CHUNK; j++) {
                    float ratio = chunk.ratios[i * CHUNK + j];
                    float one = inside[i * CHUNK + j] *= ratio;
                    float two = above[i * CHUNK + j] *= j < i ? -chunk.strength[i] * ratio : 0.0f;
                    float change = one * chunk.scores[i * CHUNK + j] + two * chunk.between[i * CHUNK + j];
                    sum += change;
                    for_total[j] -= change;
                }
                for_total[i] += sum;
            }
            scale_rows(solved, chunk.strength, v_padded);
            store(for_v + first * values, solved, count, values);
            /* Through what was read from M: q' and k'. */
            transpose(turned, held, k_padded, v_padded);
            multiply(dq, upstream, v_padded, 1, turned, CHUNK, k_padded, v_padded, 0);
            multiply(dk, solved, v_padded, 1, turned, CHUNK, k_padded, v_padded, 0);
            transpose(turned, g, k_padded, v_padded);
            multiply(x, u, v_padded, 1, turned, CHUNK, k_padded, v_padded, 0);
            scale_rows(dq, chunk.grown, k_padded);
            scale_rows(dk, chunk.grown, k_padded);
            scale_rows(x, chunk.left, k_padded);
            vec kept = {0.0f};
            for (int64_t j = 0; j < k_padded * v_padded; j += LANES) kept += *(vec *)(held + j) * *(vec *)(g + j);
            float last = 0.0f;
            for (int j = 0; j < LANES; j++) last += kept[j];
            last *= chunk.grown[CHUNK - 1];
            for (int64_t i = 0; i < CHUNK; i++) {
                const float *key = chunk.k + i * k_padded;
                float later = dot(key, x + i * k_padded, k_padded);
                for_total[i] += dot(chunk.q + i * k_padded, dq + i * k_padded, k_padded) - later;
                for_total[i] -= dot(key, dk + i * k_padded, k_padded);
                last += later;
            }
            for (int64_t j = 0; j < CHUNK * k_padded; j += LANES)
                *(vec *)(dk + j) = *(vec *)(x + j) - *(vec *)(dk + j);
            /* Through the products inside the chunk. */
            multiply(dq, inside, CHUNK, 1, chunk.k, CHUNK, k_padded, CHUNK, 1);
            multiply(dk, inside, 1, CHUNK, chunk.q, CHUNK, k_padded, CHUNK, 1);
            for (int64_t i = 0; i < CHUNK; i++)
                for (int64_t j = 0; j <= i; j++) mixed[i * CHUNK + j] = mixed[j * CHUNK + i] = above[i * CHUNK + j];
            multiply(dk, mixed, CHUNK, 1, chunk.k, CHUNK, k_padded, CHUNK, 1);
            store(for_q + first * width, dq, count, width);
            store(for_k + first * width, dk, count, width);
            float sum = last;
            for (int64_t i = CHUNK - 1; i >= 0; i--) {
                sum += for_total[i];
                if (i < count) for_decay[first + i] = sum;
            }
            /* G <- e^{g_C} G + (e^g Q)^T O' - (e^g K)^T v'. */
            for (int64_t j = 0; j < k_padded * v_padded; j += LANES) *(vec *)(g + j) *= chunk.grown[CHUNK - 1];
            scale_rows(upstream, chunk.grown, v_padded);
            memcpy(y, solved, (size_t)(CHUNK * v_padded) * sizeof(float));
            for (int64_t i = 0; i < CHUNK; i++) chunk.grown[i] = -chunk.grown[i];
            scale_rows(y, chunk.grown, v_padded);
            multiply(g, chunk.q, 1, k_padded, upstream, k_padded, v_padded, CHUNK, 1);
            multiply(g, chunk.k, 1, k_padded, y, k_padded, v_padded, CHUNK, 1);
        }
        store(for_memory + group * size, g, width, values);
    }
}
