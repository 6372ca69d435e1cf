/* Shared by the kernels: bfloat16, vectors, and an exp that vectorises. Everything is plain C; the compiler vectorises it. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define LANES 16
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

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
