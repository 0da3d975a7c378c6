/* Every operation in plain C, for any processor; slow. It defines the results that the others are tested against. */
#include "kernels.h"

#include <math.h>

static const char *why_not(void) { return NULL; }

static Range range(const float *x, size_t count) {
    Range range = {x[0], x[0]};
    for (size_t i = 1; i < count; i++) {
        range.low = fminf(range.low, x[i]);
        range.high = fmaxf(range.high, x[i]);
    }
    return range;
}

static void quantize(const float *x, int tokens, int width, Quantization *rows, uint8_t *to) {
    for (int t = 0; t < tokens; t++, x += width, to += width) {
        rows[t] = quantization_of(range(x, width));
        float inverse = 1.0f / rows[t].scale, center = rows[t].center;
        for (int i = 0; i < width; i++) {
            float value = nearbyintf((x[i] - center) * inverse) + (float)MIDDLE;
            to[i] = value > 0.0f ? (uint8_t)fminf(value, 255.0f) : 0; /* NaN: 0 */
        }
    }
}

static float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.707106781f)); }

static void product(const Product *p) {
    const Linear *w = p->w;
    for (int row = 0; row < p->tokens; row++)
        for (int column = 0; column < w->out; column++) {
            const uint8_t *x = p->x + (size_t)row * w->in;
            size_t at = (size_t)row * w->out + column;
            int32_t sum = 0;
            for (int k = 0; k < w->in; k++) sum += x[k] * w->tiles[tile_index(w->in, k, column)];
            sum -= w->offset[column];
            Quantization q = p->rows[row];
            /* fmaf rounds once, as vector units do, so that products agree to the last bit */
            float shift = fmaf(q.center, w->center[column], w->bias[column]);
            float value = fmaf((float)sum, w->scale[column] * q.scale, shift);
            if (p->epilogue == GELU) value = gelu(value);
            if (p->epilogue == RELU) value = value > 0.0f ? value : 0.0f;
            if (p->epilogue == RESIDUAL) value += p->residual[at];
            p->to[at] = value;
        }
}

static float dot(const float *a, const float *b, int count) {
    float sum = 0.0f;
    for (int i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

/* One row of one head: the weights of all tokens, then the weighted mean of their values. offsets: by key or NULL. */
static void attend(const float *q, const float *k, const float *v, int tokens, int width, int stride,
                   const float *offsets, float *weights, float *to) {
    float largest = -INFINITY, total = 0.0f;
    for (int t = 0; t < tokens; t++) {
        weights[t] = dot(q, k + (size_t)t * stride, width) * (1.0f / sqrtf((float)width));
        if (offsets) weights[t] += offsets[t];
        largest = fmaxf(largest, weights[t]);
    }
    for (int t = 0; t < tokens; t++) {
        weights[t] = expf(weights[t] - largest);
        if (tokens >= LONG) weights[t] = bfloat16_of(weights[t]);
        total += weights[t];
    }
    for (int i = 0; i < width; i++) {
        float sum = 0.0f;
        for (int t = 0; t < tokens; t++) sum += weights[t] * v[(size_t)t * stride + i];
        to[i] = sum / total;
    }
}

static void attention(float *qkv, int tokens, int hidden, int num_heads, const Offsets *offsets, float *work,
                      float *to) {
    int width = hidden / num_heads, stride = 3 * hidden;
    if (tokens >= LONG) round_to_bfloat16(qkv, (size_t)tokens * stride);
    for (int t = 0; t < tokens; t++)
        for (int head = 0; head < num_heads; head++) {
            const float *k = qkv + hidden + head * width, *v = k + hidden;
            const float *q = qkv + (size_t)t * stride + head * width;
            const float *added = offsets_of(offsets, head, t);
            attend(q, k, v, tokens, width, stride, added, work, to + (size_t)t * hidden + head * width);
        }
}

static void layer_norm(float *rows, int tokens, int hidden, const Norm *norm) {
    for (int t = 0; t < tokens; t++) {
        float *x = rows + (size_t)t * hidden, mean = 0.0f, variance = 0.0f;
        for (int i = 0; i < hidden; i++) mean += x[i];
        mean /= hidden;
        for (int i = 0; i < hidden; i++) variance += (x[i] - mean) * (x[i] - mean);
        float inverse = 1.0f / sqrtf(variance / hidden + norm->epsilon);
        for (int i = 0; i < hidden; i++) x[i] = (x[i] - mean) * inverse * norm->scale[i] + norm->shift[i];
    }
}

static void embed(const int8_t *word, float scale, const float *position, const float *type, int hidden, float *to) {
    for (int i = 0; i < hidden; i++) {
        to[i] = word[i] * scale + position[i];
        if (type) to[i] += type[i];
    }
}

static void mean(const float *rows, int tokens, int hidden, float *to) {
    for (int i = 0; i < hidden; i++) {
        float sum = 0.0f;
        for (int t = 0; t < tokens; t++) sum += rows[(size_t)t * hidden + i];
        to[i] = sum / tokens;
    }
}

static double multiply_adds(void) {
    volatile int8_t x = 1;
    int32_t sum = 0;
    for (int n = 0; n < 1000; n++) sum += x * x;
    x = (int8_t)sum;
    return 1000;
}

const Kernels reference_kernels = {
    .name = "reference",
    .why_not = why_not,
    .quantize = quantize,
    .product = product,
    .attention = attention,
    .layer_norm = layer_norm,
    .embed = embed,
    .mean = mean,
    .dot = dot,
    .multiply_adds = multiply_adds,
};
