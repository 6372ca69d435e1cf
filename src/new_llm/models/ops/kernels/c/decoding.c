/* Decoding: every weight is read once a token, so its time is that of reading them.
   A Pythia layer's step is one call with one barrier: LayerNorms, a head's projection and attention over the cache, the
   MLP's first matrix; then both last matrices and the residual. */
#include "dot.h"

#define BLOCK 64 /* outputs that a thread takes at once */
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

/* rows of hidden [rows, D] go to out; row r stands at positions[r] of its segment, with cosines and sines [rows, rotary].
   keys and values [rows, heads, slots, K] hold the earlier tokens and take this one. valid[r] = 0: the row takes no
   token and its result means nothing; NULL: all do. longest: tokens of the longest row with this one. */
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

/* Phi(x), the normal distribution, to 1e-7: Abramowitz and Stegun, 7.1.26. */
static inline float normal_cdf(float x) {
    float a = fabsf(x) * 0.70710678118654752f;
    float t = 1.0f / (1.0f + 0.3275911f * a);
    float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float tail = 0.5f * p * exp_negative(-a * a);
    return x < 0.0f ? tail : 1.0f - tail;
}

/* Floats of scratch that a step needs. */
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
