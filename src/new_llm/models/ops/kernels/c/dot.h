/* Four consecutive rows of a matrix times one vector, at the speed of memory: sums[i] = w_i . x.
   Hand-written for AVX-512, because compilers load narrow types slowly; elsewhere left to the compiler. */
#pragma once
#include "kernels.h"

#define AHEAD 6144 /* prefetch distance in bytes; the processor's own prefetching does not reach this far */

#define DEFINE_DOT(NAME, TYPE, LOAD)                                                                      \
    static inline void NAME(const TYPE *restrict w, const float *restrict x, int64_t first, int64_t n,    \
                            float *restrict sums) {                                                       \
        float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;                                                     \
        _Pragma("omp simd reduction(+ : a, b, c, d)") for (int64_t j = first; j < n; j++) {               \
            a += LOAD(w[j]) * x[j];                                                                       \
            b += LOAD(w[n + j]) * x[j];                                                                   \
            c += LOAD(w[2 * n + j]) * x[j];                                                               \
            d += LOAD(w[3 * n + j]) * x[j];                                                               \
        }                                                                                                 \
        sums[0] += a, sums[1] += b, sums[2] += c, sums[3] += d;                                           \
    }

DEFINE_DOT(add_dots_bf16, bf16, from_bf16)
DEFINE_DOT(add_dots_float, float, from_float)

#ifdef __AVX512F__
#include <immintrin.h>

/* Reads pairs of bfloat16 as 32 bits: the even element is the lower half, shifted up; the odd one is the upper half. */
static inline void dot_4_bf16(const bf16 *w, const float *x, int64_t n, float *sums) {
    const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1)), upper = _mm512_set1_epi32((int)0xffff0000u);
    __m512 even[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512 odd[4] = {even[0], even[0], even[0], even[0]};
    const int64_t whole = n & ~(int64_t)31;
    for (int64_t j = 0; j < whole; j += 32) {
        const __m512 one = _mm512_loadu_ps(x + j), two = _mm512_loadu_ps(x + j + 16);
        const __m512 x_even = _mm512_permutex2var_ps(one, evens, two), x_odd = _mm512_permutex2var_ps(one, odds, two);
        for (int i = 0; i < 4; i++) {
            const bf16 *place = w + i * n + j;
            __builtin_prefetch((const char *)place + AHEAD);
            const __m512i pairs = _mm512_loadu_si512(place);
            even[i] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), x_even, even[i]);
            odd[i] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(pairs, upper)), x_odd, odd[i]);
        }
    }
    for (int i = 0; i < 4; i++) sums[i] = _mm512_reduce_add_ps(_mm512_add_ps(even[i], odd[i]));
    if (whole < n) add_dots_bf16(w, x, whole, n, sums);
}

static inline __m512 load_float(const float *w) { return _mm512_loadu_ps(w); }

#define DEFINE_DOT_4(NAME, TYPE, LOAD, REST)                                                                  \
    static inline void NAME(const TYPE *w, const float *x, int64_t n, float *sums) {                          \
        __m512 four[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()}; \
        const int64_t step = 64 / (int64_t)sizeof(TYPE), whole = n - n % step;                                \
        for (int64_t j = 0; j < whole; j += step)                                                             \
            for (int i = 0; i < 4; i++) {                                                                     \
                __builtin_prefetch((const char *)(w + i * n + j) + AHEAD);                                    \
                for (int64_t part = j; part < j + step; part += 16)                                           \
                    four[i] = _mm512_fmadd_ps(LOAD(w + i * n + part), _mm512_loadu_ps(x + part), four[i]);    \
            }                                                                                                 \
        for (int i = 0; i < 4; i++) sums[i] = _mm512_reduce_add_ps(four[i]);                                  \
        if (whole < n) REST(w, x, whole, n, sums);                                                            \
    }

DEFINE_DOT_4(dot_4_float, float, load_float, add_dots_float)

#else

#define DEFINE_DOT_4(NAME, TYPE, REST)                                               \
    static inline void NAME(const TYPE *w, const float *x, int64_t n, float *sums) { \
        sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;                                \
        REST(w, x, 0, n, sums);                                                      \
    }

DEFINE_DOT_4(dot_4_bf16, bf16, add_dots_bf16)
DEFINE_DOT_4(dot_4_float, float, add_dots_float)

#endif
