/* Products with few rows, and one decoding step of a Pythia layer. Included once per dtype, with these macros:
   TYPE, LOAD, STORE, DOT_4: the dtype of activations, matrices, biases, LayerNorms and cache, and its functions;
   NAME(x): the name of function x for this dtype. All sums are float. */

static inline float NAME(dot_1)(const TYPE *restrict w, const float *restrict x, int64_t n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += LOAD(w[j]) * x[j];
    return sum;
}

/* out[r, o - begin] = (W x_r + b)[o] for o = begin ... end - 1; each row of W is read once for all rows of x. */
static void NAME(multiply)(const struct linear *linear, const float *x, int64_t rows, int64_t begin, int64_t end,
                           float *out, int64_t stride) {
    const TYPE *weight = linear->weight;
    const TYPE *bias = linear->bias;
    const int64_t n = linear->inputs;
    for (int64_t o = begin; o < end; o += 4) {
        int64_t count = end - o < 4 ? end - o : 4;
        for (int64_t r = 0; r < rows; r++) {
            float sums[4];
            if (count == 4)
                DOT_4(weight + o * n, x + r * n, n, sums);
            else
                for (int64_t i = 0; i < count; i++) sums[i] = NAME(dot_1)(weight + (o + i) * n, x + r * n, n);
            for (int64_t i = 0; i < count; i++) {
                float y = sums[i];
                out[r * stride + o + i - begin] = bias ? y + LOAD(bias[o + i]) : y;
            }
        }
    }
}

/* out [rows, outputs] <- x W^T + b, for few rows x [rows, inputs]. */
void NAME(linear_rows)(const struct linear *linear, const float *x, int64_t rows, TYPE *out, int threads) {
    const int64_t outputs = linear->outputs, blocks = (outputs + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t block = 0; block < blocks; block++) {
        int64_t begin = block * BLOCK, end = begin + BLOCK < outputs ? begin + BLOCK : outputs;
        for (int64_t first = 0; first < rows; first += MAX_ROWS) {
            float part[MAX_ROWS * BLOCK];
            int64_t count = rows - first < MAX_ROWS ? rows - first : MAX_ROWS;
            NAME(multiply)(linear, x + first * linear->inputs, count, begin, end, part, BLOCK);
            for (int64_t r = 0; r < count; r++)
                for (int64_t o = begin; o < end; o++)
                    out[(first + r) * outputs + o] = STORE(part[r * BLOCK + o - begin]);
        }
    }
}

/* LayerNorm of one row: out <- weight (x - mean) / sqrt(variance + eps) + bias. */
static void NAME(normalise)(const TYPE *x, const struct norm *norm, int64_t n, float *out) {
    const TYPE *weight = norm->weight, *bias = norm->bias;
    float mean = 0.0f, variance = 0.0f;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < n; j++) mean += LOAD(x[j]);
    mean /= (float)n;
#pragma omp simd reduction(+ : variance)
    for (int64_t j = 0; j < n; j++) variance += (LOAD(x[j]) - mean) * (LOAD(x[j]) - mean);
    float scale = 1.0f / sqrtf(variance / (float)n + norm->eps);
#pragma omp simd
    for (int64_t j = 0; j < n; j++) out[j] = (LOAD(x[j]) - mean) * scale * LOAD(weight[j]) + LOAD(bias[j]);
}

/* Rotary positions for one head, in the half-split layout: (x_i, x_{i+half}) is rotated by angle i. */
static void NAME(rotate)(float *x, const float *cosines, const float *sines, int64_t rotary) {
    int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        float one = x[i], two = x[half + i];
        x[i] = one * cosines[i] - two * sines[i];
        x[half + i] = two * cosines[half + i] + one * sines[half + i];
    }
}

/* One query attends to `count` keys and values [count, width] of its head; out [width]. scores: scratch for count floats. */
static void NAME(attend)(const float *q, const TYPE *keys, const TYPE *values, int64_t count, int64_t width,
                         float *restrict scores, float *restrict out) {
    const float scale = 1.0f / sqrtf((float)width);
    float top = -INFINITY, total = 0.0f;
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) DOT_4(keys + t * width, q, width, scores + t);
    for (; t < count; t++) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; j++) sum += LOAD(keys[t * width + j]) * q[j];
        scores[t] = sum;
    }
#pragma omp simd reduction(max : top)
    for (t = 0; t < count; t++) top = scores[t] > top ? scores[t] : top;
#pragma omp simd reduction(+ : total)
    for (t = 0; t < count; t++) {
        scores[t] = exp_negative(scale * (scores[t] - top));
        total += scores[t];
    }
    for (int64_t j = 0; j < width; j++) out[j] = 0.0f;
    for (t = 0; t + 4 <= count; t += 4) {
        const TYPE *one = values + t * width, *two = one + width, *three = two + width, *four = three + width;
        for (int64_t j = 0; j < 4 * width; j += 64 / (int64_t)sizeof(TYPE)) __builtin_prefetch((const char *)(one + j) + AHEAD);
#pragma omp simd
        for (int64_t j = 0; j < width; j++)
            out[j] += scores[t] * LOAD(one[j]) + scores[t + 1] * LOAD(two[j]) + scores[t + 2] * LOAD(three[j]) +
                      scores[t + 3] * LOAD(four[j]);
    }
    for (; t < count; t++)
        for (int64_t j = 0; j < width; j++) out[j] += scores[t] * LOAD(values[t * width + j]);
    for (int64_t j = 0; j < width; j++) out[j] /= total;
}

/* One head of row r: adds its key and value to the cache, then lets its query attend. projected: the row's q, k, v. */
static void NAME(step_head)(const struct pythia_layer *layer, const struct step *step, int64_t r, int64_t head,
                            float *projected, float *scores, float *mixed) {
    const int64_t width = layer->query_key_value.inputs / layer->heads, place = step->positions[r];
    float *q = projected, *k = projected + width, *v = projected + 2 * width;
    const float *cosines = step->cosines + r * layer->rotary, *sines = step->sines + r * layer->rotary;
    NAME(rotate)(q, cosines, sines, layer->rotary);
    NAME(rotate)(k, cosines, sines, layer->rotary);
    TYPE *keys = (TYPE *)step->keys + (r * layer->heads + head) * step->slots * width;
    TYPE *values = (TYPE *)step->values + (r * layer->heads + head) * step->slots * width;
    for (int64_t j = 0; j < width; j++) {
        keys[place * width + j] = STORE(k[j]);
        values[place * width + j] = STORE(v[j]);
    }
    NAME(attend)(q, keys, values, place + 1, width, scores, mixed);
}

/* x + Attention(LN1 x) + MLP(LN2 x) for one new token per row. */
void NAME(step_pythia)(const struct pythia_layer *layer, const struct step *step) {
    const int64_t rows = step->rows, heads = layer->heads, width = layer->query_key_value.inputs;
    const int64_t head_width = width / heads, inner = layer->up.outputs, up_blocks = (inner + BLOCK - 1) / BLOCK;
    const int64_t blocks = (width + BLOCK - 1) / BLOCK;
    const TYPE *hidden = step->hidden;
    TYPE *out = step->out;
    float *mixed = step->scratch, *raised = mixed + rows * width, *rest = raised + rows * inner;
#pragma omp parallel num_threads(step->threads)
    {
        float *for_attention = rest + omp_get_thread_num() * (2 * rows * width + rows * 3 * head_width + step->longest);
        float *for_mlp = for_attention + rows * width, *projected = for_mlp + rows * width;
        float *scores = projected + rows * 3 * head_width;
        for (int64_t r = 0; r < rows; r++) { /* repeated by every thread, which is cheaper than waiting for one */
            NAME(normalise)(hidden + r * width, &layer->before_attention, width, for_attention + r * width);
            NAME(normalise)(hidden + r * width, &layer->before_mlp, width, for_mlp + r * width);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t head = 0; head < heads; head++) {
            NAME(multiply)(&layer->query_key_value, for_attention, rows, head * 3 * head_width,
                           (head + 1) * 3 * head_width, projected, 3 * head_width);
            for (int64_t r = 0; r < rows; r++) {
                float *target = mixed + r * width + head * head_width;
                if (step->valid && !step->valid[r])
                    memset(target, 0, (size_t)head_width * sizeof(float));
                else
                    NAME(step_head)(layer, step, r, head, projected + r * 3 * head_width, scores, target);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t block = 0; block < up_blocks; block++) {
            int64_t begin = block * BLOCK, end = begin + BLOCK < inner ? begin + BLOCK : inner;
            NAME(multiply)(&layer->up, for_mlp, rows, begin, end, raised + begin, inner);
            for (int64_t r = 0; r < rows; r++)
#pragma omp simd
                for (int64_t o = begin; o < end; o++) raised[r * inner + o] *= normal_cdf(raised[r * inner + o]);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t block = 0; block < blocks; block++) {
            int64_t begin = block * BLOCK, end = begin + BLOCK < width ? begin + BLOCK : width;
            float one[MAX_ROWS * BLOCK], two[MAX_ROWS * BLOCK];
            NAME(multiply)(&layer->dense, mixed, rows, begin, end, one, BLOCK);
            NAME(multiply)(&layer->down, raised, rows, begin, end, two, BLOCK);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t o = begin; o < end; o++)
                    out[r * width + o] = STORE(two[r * BLOCK + o - begin] + one[r * BLOCK + o - begin] +
                                               LOAD(hidden[r * width + o]));
        }
    }
}
