/* Shared by the kernels: bfloat16, vectors, and an exp that vectorises. Everything is plain C; the compiler vectorises it. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define LANES 16
#define WIDEST 128 /* MAX_WIDTH in native.py, of a gated delta layer's heads */
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef int32_t signs __attribute__((vector_size(4 * LANES)));
typedef bf16 narrow_vec __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

static inline float from_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounds to nearest, ties to even. NaN stays NaN. */
static inline bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bf16)(x == x ? rounded : 0x7fc0u);
}

static inline float from_float(float x) { return x; }
static inline float to_float(float x) { return x; }

/* exp(x) for x <= 0, accurate to about 2 units in the last place; exp(-87) = 1.6e-38 below -87. NaN stays NaN.
   Computed as 2^n times a polynomial in x - n ln 2, with the coefficients of Cephes' expf. */
static inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504088896341f);
    float r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

/* The same for whole vectors; comparisons of vectors are all ones where they hold. */
static inline vec choose(signs condition, vec one, vec other) {
    return (vec)(((bits)condition & (bits)one) | (~(bits)condition & (bits)other));
}

static inline vec load_bf16(const bf16 *x) { return (vec)(__builtin_convertvector(*(const narrow_vec *)x, bits) << 16); }

/* Rounds to bfloat16 but stays float. A NaN must be one that arithmetic makes. */
static inline vec round_bf16(vec x) {
    bits whole = (bits)x;
    return (vec)((whole + 0x7fffu + ((whole >> 16) & 1u)) & 0xffff0000u);
}

static inline void store_bf16(bf16 *to, vec x) {
    *(narrow_vec *)to = __builtin_convertvector((bits)round_bf16(x) >> 16, narrow_vec);
}

static inline vec exp_vec(vec x) {
    x = choose(x < -87.0f, (vec){0} - 87.0f, x);
    vec shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - 12582912.0f; /* 1.5 * 2^23 rounds to integers */
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)(((bits)shifted + 127u) << 23);
}
