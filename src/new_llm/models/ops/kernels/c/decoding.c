/* Decoding: every weight is read once per token, which takes nearly all the time.
   A Pythia layer's step is one call with one barrier. Before it: LayerNorms, each head's projection and attention over
   the cache, and the MLP's first matrix. After it: both output matrices and the residual. */
#include "dot.h"

#define BLOCK 64 /* outputs that a thread computes at a time */
#define MAX_ROWS 8

int omp_get_thread_num(void);

/* y = x W^T + b; W [outputs, inputs]. bias: NULL: none. */
struct linear {
    const void *weight, *bias;
    int64_t inputs, outputs;
};

struct norm {
    const void *weight, *bias;
    float eps;
};

struct pythia_layer {
    struct norm before_attention, before_mlp;
    struct linear query_key_value, dense, up, down;
    int64_t heads, rotary;
};

/* One token per row: hidden [rows, D] to out. Row r is at positions[r] of its segment; cosines and sines: [rows, rotary].
   keys and values [rows, heads, slots, K] hold the earlier tokens; the new one is added. valid[r] = 0: row r gets no
   token and its result is meaningless; NULL: all rows get one. longest: length of the longest row with its new token. */
struct step {
    const void *hidden;
    void *out, *keys, *values;
    const int64_t *positions;
    const uint8_t *valid;
    const float *cosines, *sines;
    float *scratch;
    int64_t rows, slots, longest;
    int32_t threads;
};

/* Phi(x), the normal cumulative distribution, accurate to 1e-7: Abramowitz and Stegun, 7.1.26. */
static inline float normal_cdf(float x) {
    float a = fabsf(x) * 0.70710678118654752f;
    float t = 1.0f / (1.0f + 0.3275911f * a);
    float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float tail = 0.5f * p * exp_negative(-a * a);
    return x < 0.0f ? tail : 1.0f - tail;
}

/* Number of floats of scratch memory that a step needs. */
int64_t count_step_scratch(int64_t width, int64_t heads, int64_t inner, int64_t rows, int64_t longest, int threads) {
    int64_t own = 2 * rows * width + rows * 3 * (width / heads) + longest;
    return rows * (width + inner) + threads * own;
}

#define TYPE bf16
#define LOAD from_bf16
#define STORE to_bf16
#define DOT_4 dot_4_bf16
#define NAME(x) x##_bfloat16
#include "layer_step.h"
#undef TYPE
#undef LOAD
#undef STORE
#undef DOT_4
#undef NAME
#define TYPE float
#define LOAD from_float
#define STORE to_float
#define DOT_4 dot_4_float
#define NAME(x) x##_float32
#include "layer_step.h"
