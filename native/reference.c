/* Every operation in plain C: slow, but for any processor. The other implementations are tested against its results. */
#include "kernels.h"

#include <math.h>

#include "plain.h"

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
            if (p->epilogue == RESIDUAL) value += p->other[at];
            if (p->epilogue == GATE) value *= p->other[at];
            p->to[at] = value;
        }
}

static float dot(const float *a, const float *b, int count) {
    float sum = 0.0f;
    for (int i = 0; i < count; i++) sum += a[i] * b[i];
    return sum;
}

static void prepare(const Tile *tile) { (void)tile; }

static void score(const Block *b) {
    const Tile *tile = b->tile;
    for (int r = 0; r < b->rows; r++)
        for (int t = 0; t < b->last - b->first; t++) {
            const float *k = tile->k + (b->first + t) * tile->stride;
            float value = dot(b->q[r], k, tile->width) * b->factor;
            b->scores[r * b->score_stride + t] = b->added[r] ? value + b->added[r][t] : value;
        }
}

static void mix(const Block *b) {
    const Tile *tile = b->tile;
    for (int r = 0; r < b->rows; r++) {
        float *weights = b->scores + r * b->score_stride, total = 0.0f, before = b->largest ? b->largest[r] : -INFINITY;
        float largest = before;
        for (int t = b->low[r]; t < b->high[r]; t++) largest = fmaxf(largest, weights[t]);
        for (int t = b->low[r]; t < b->high[r]; t++) {
            weights[t] = expf(weights[t] - largest);
            if (tile->rounds) weights[t] = bfloat16_of(weights[t]);
            total += weights[t];
        }
        float carry = b->largest ? carry_of(before, largest) : 0.0f, inverse = b->largest ? 1.0f : 1.0f / total;
        for (int i = 0; i < tile->width; i++) {
            float sum = 0.0f;
            for (int t = b->low[r]; t < b->high[r]; t++) sum += weights[t] * tile->v[(b->first + t) * tile->stride + i];
            b->to[r][i] = b->largest ? b->to[r][i] * carry + sum : sum * inverse;
        }
        if (b->largest) update(b, r, largest, total);
    }
}

static void layer_norm(const float *from, int tokens, int hidden, const Norm *norm, float *to) {
    for (int t = 0; t < tokens; t++) {
        const float *x = from + (size_t)t * hidden;
        float *y = to + (size_t)t * hidden, mean = 0.0f, variance = 0.0f;
        for (int i = 0; i < hidden; i++) mean += x[i];
        mean /= hidden;
        for (int i = 0; i < hidden; i++) variance += (x[i] - mean) * (x[i] - mean);
        float inverse = 1.0f / sqrtf(variance / hidden + norm->epsilon);
        for (int i = 0; i < hidden; i++) y[i] = (x[i] - mean) * inverse * norm->scale[i] + norm->shift[i];
    }
}

static void embed(const int8_t *word, float scale, const float *position, const float *type, int hidden, float *to) {
    for (int i = 0; i < hidden; i++) {
        to[i] = word[i] * scale;
        if (position) to[i] += position[i];
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
    .rows = ATTENTION_ROWS,
    .prepare = prepare,
    .score = score,
    .mix = mix,
    .rotate = rotate,
    .add_terms = add_terms,
    .layer_norm = layer_norm,
    .embed = embed,
    .mean = mean,
    .dot = dot,
    .multiply_adds = multiply_adds,
};
