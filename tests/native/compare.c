/* Compare kernels with the reference, operation by operation, on this processor or an emulated one.
 *
 *     compare          the names of the kernels that this machine can run
 *     compare NAME     exit code 0: they agree with the reference; 1: they do not; 2: this machine cannot run them
 *     compare NAME few the same with fewer texts
 *     compare NAME emulated
 *                      fewer still, as an emulator takes a second for a long text
 *
 * tests/test_kernels.py builds and runs it. All values come from one seed.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../native/attention.h"
#include "../../native/kernels.h"
#include "../../native/model.h"

static const Kernels *ours;
static int failures, is_emulated; /* is_emulated implies `few` */

static void check(int ok, const char *what, int a, int b, int c) {
    if (ok) return;
    if (++failures <= 20) printf("%s: %s differs (%d, %d, %d)\n", ours->name, what, a, b, c);
}

static uint64_t state = 42;

static uint32_t next(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static int whole(int least, int most) { return least + (int)(next() % (uint32_t)(most - least + 1)); }

/* About normal, with a standard deviation of 1. */
static float normal(void) {
    float sum = 0.0f;
    for (int i = 0; i < 4; i++) sum += (float)next() / 2147483648.0f - 0.5f;
    return sum * 1.7320508f;
}

static void *kept[64];
static int num_kept;

/* Exactly this much memory, so that tools detect reads and writes past its end; release() frees it. */
static void *memory(size_t bytes) {
    if (num_kept == 64 || posix_memalign(&kept[num_kept], 64, bytes)) exit(3);
    return kept[num_kept++];
}

/* Free the memory that was taken since there were this many pieces. */
static void release(int pieces) {
    while (num_kept > pieces) free(kept[--num_kept]);
}

static float *normals(size_t count, float spread) {
    float *values = memory(count * sizeof *values);
    for (size_t i = 0; i < count; i++) values[i] = normal() * spread;
    return values;
}

static int is_same(float a, float b) { return a == b || (isnan(a) && isnan(b)); }

static int are_same(const float *a, const float *b, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (!is_same(a[i], b[i])) return 0;
    return 1;
}

/* Within 1e-5 of the reference's spread, magnitude or `floor`; where one is not finite, neither is the other. */
static int are_near(const float *a, const float *reference, size_t count, float floor) {
    float low = INFINITY, high = -INFINITY;
    for (size_t i = 0; i < count; i++)
        if (isfinite(reference[i])) {
            low = fminf(low, reference[i]);
            high = fmaxf(high, reference[i]);
        }
    float allowed = 1e-5f * fmaxf(fmaxf(high - low, floor), fmaxf(fabsf(low), fabsf(high)));
    for (size_t i = 0; i < count; i++) {
        if (isfinite(a[i]) != isfinite(reference[i])) return 0;
        if (isfinite(a[i]) && !(fabsf(a[i] - reference[i]) <= allowed)) return 0;
    }
    return 1;
}

/* ---- products --------------------------------------------------------------------------------------- */

typedef enum { RANDOM, LEAST, LARGEST, ALTERNATING, NUM_WEIGHTS } Weights;

static int8_t weight(Weights kind, size_t i) {
    if (kind == LEAST) return -128;
    if (kind == LARGEST) return 127;
    if (kind == ALTERNATING) return i % 2 ? 127 : -128;
    return (int8_t)whole(-128, 127);
}

static Linear linear_of(int in, int out, Weights kind, int8_t *tiles, int8_t *end) {
    Linear w;
    size_t count = (size_t)in * out;
    int8_t *weights = memory(count);
    for (size_t i = 0; i < count; i++) weights[i] = weight(kind, i);
    float *scale = normals(out, 0.0f), *bias = normals(out, 0.3f);
    for (int i = 0; i < out; i++) scale[i] = 0.01f / sqrtf((float)in) * (1.0f + 0.3f * normal());
    if (pack_linear(&w, in, out, weights, scale, bias, tiles, end, 0)) exit(3);
    return w;
}

/* Products are sums of int8 products with one rounding, so all but GELU agree to the last bit. */
static void compare_product(const Linear *w, int tokens, int level) {
    int pieces = num_kept;
    size_t padded = ROUND_UP(tokens, 16), count = (size_t)tokens * w->out;
    uint8_t *x = memory(padded * w->in);
    for (size_t i = 0; i < padded * w->in; i++) x[i] = (uint8_t)(level < 0 ? whole(0, 255) : level);
    Quantization *rows = memory(tokens * sizeof *rows);
    for (int t = 0; t < tokens; t++) rows[t] = (Quantization){0.02f * (1.0f + 0.5f * normal()), normal()};
    float *residual = normals(count, 1.0f), *expected = memory(count * 4), *found = memory((count + 16) * 4);
    for (Epilogue epilogue = PLAIN; epilogue <= GATE; epilogue++) {
        Product p = {w, x, rows, tokens, epilogue, residual, expected};
        reference_kernels.product(&p);
        for (size_t i = 0; i < count + 16; i++) found[i] = -1e30f;
        p.to = found;
        ours->product(&p);
        int ok = epilogue == GELU ? are_near(found, expected, count, 0.1f) : are_same(found, expected, count);
        for (int i = 0; i < 16; i++) ok = ok && found[count + i] == -1e30f;
        check(ok, (const char *[]){"product", "GELU", "ReLU", "product + residual", "gated product"}[epilogue], w->in, w->out, tokens);
    }
    release(pieces);
}

/* few: of the larger matrices, every fourth number of rows. */
static void compare_products(int few) {
    static const int sizes[][3] = {/* in, out, most rows */
                                   {64, 32, 40}, {64, 96, 40}, {192, 64, 40}, {768, 128, 25}, {64, 3072, 2},
                                   {3072, 64, 13}, {768, 3072, 1}, {8192, 32, 9}, {32768, 32, 2}};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        for (Weights kind = RANDOM; kind < NUM_WEIGHTS; kind++) {
            int in = sizes[i][0], out = sizes[i][1], most = sizes[i][2];
            if (kind != RANDOM && (size_t)in * out > 1 << 17) continue;
            int8_t *tiles = memory((size_t)in * out);
            Linear w = linear_of(in, out, kind, tiles, tiles + (size_t)in * out);
            if (kind == RANDOM)
                for (int tokens = most > 13 && in > 192 ? most - 12 : 1; tokens <= most; tokens += few && in > 192 ? 4 : 1)
                    compare_product(&w, tokens, -1);
            for (int level = 0; level < 256; level += level == 0 ? 127 : 64) /* 0, 127, 191, 255 */
                compare_product(&w, most < 7 ? most : few && in > 192 ? 3 : 7, level);
            free_linear(&w);
            release(0);
        }
}

static void compare_gelu(void) {
    enum { IN = 64, OUT = 4096 };
    int8_t *tiles = memory(IN * OUT), *zeros = memory(IN * OUT);
    float *scale = normals(OUT, 0.0f), *bias = memory(OUT * 4), expected[OUT], found[OUT];
    memset(zeros, 0, IN * OUT);
    for (int i = 0; i < OUT; i++) bias[i] = (float)(i - OUT / 2) / 256.0f; /* -8 … 8 */
    bias[0] = NAN, bias[1] = INFINITY, bias[2] = 1e30f;
    bias[3] = -0.0f, bias[4] = 1e-40f, bias[5] = -1e-40f;
    Linear w;
    if (pack_linear(&w, IN, OUT, zeros, scale, bias, tiles, tiles, 0)) exit(3);
    uint8_t *x = memory(16 * IN);
    memset(x, MIDDLE, 16 * IN);
    Quantization row = {1.0f, 0.0f};
    for (Epilogue epilogue = GELU; epilogue <= RELU; epilogue++) {
        reference_kernels.product(&(Product){&w, x, &row, 1, epilogue, NULL, expected});
        ours->product(&(Product){&w, x, &row, 1, epilogue, NULL, found});
        check(is_same(found[0], expected[0]) && is_same(found[1], expected[1]), "infinite activation", epilogue, 0, 0);
        check(fabsf(found[2] / 1e30f - 1.0f) < 1e-6f, "large activation", epilogue, 0, 0);
        for (int i = 3; i < OUT; i++) check(fabsf(found[i] - expected[i]) <= 1e-6f, "activation", epilogue, i, 0);
    }
    free_linear(&w);
    release(0);
}

/* ---- quantization ----------------------------------------------------------------------------------- */

static void compare_quantized(const float *x, int tokens, int width, int kind) {
    int pieces = num_kept;
    size_t count = (size_t)tokens * width;
    Quantization expected[16], found[16];
    uint8_t *bytes = memory(count), *same = memory(count);
    reference_kernels.quantize(x, tokens, width, expected, bytes);
    ours->quantize(x, tokens, width, found, same);
    check(!memcmp(bytes, same, count), "quantized", kind, tokens, width);
    for (int t = 0; t < tokens; t++)
        check(is_same(expected[t].scale, found[t].scale) && is_same(expected[t].center, found[t].center),
              "quantization", kind, t, width);
    release(pieces);
}

static void compare_quantize(void) {
    static const int widths[] = {64, 128, 192, 320, 768};
    for (int n = 0; n < 5; n++)
        for (int kind = 0; kind < 11; kind++) {
            int tokens = whole(1, 5), width = widths[n];
            size_t count = (size_t)tokens * width;
            float spread = kind == 1 ? 1e-38f : kind == 2 ? 1e30f : kind == 3 ? 0.0f : 1.0f;
            float *x = normals(count, spread);
            for (size_t i = 0; i < count; i++) {
                if (kind == 3) x[i] = 3.5f;
                if (kind == 4) x[i] = (float)whole(-127, 128) / 2.0f; /* ties */
                if (kind == 5 && next() % 5 == 0) x[i] = NAN;
                if (kind == 6) x[i] = NAN;
                if (kind == 7 && next() % 5 == 0) x[i] = INFINITY;
                if (kind == 8 && next() % 5 == 0) x[i] = -INFINITY;
                if (kind == 9) x[i] = i % width ? -1.5f : NAN;
                if (kind == 10) x[i] *= 1e-43f; /* a scale without an inverse */
            }
            compare_quantized(x, tokens, width, kind);
            release(0);
        }
}

/* ---- attention and the rest ------------------------------------------------------------------------- */

/* The parts of a layer's attention. */
typedef struct {
    int offsets, rotation, window, rows; /* positions, or 0; window, or 0; rows of the tables of terms, or 0 */
    int has_ours, has_theirs, skips;     /* terms; see buckets_of */
} Parts;

static Rotation rotation;

/* Buckets of distances: a row for each up to rows / 4, then wider ones; or with `skips`, of which two in three have none. */
static int32_t *buckets_of(int positions, int rows, int skips) {
    int32_t *buckets = memory((2 * (size_t)positions - 1) * 4);
    for (int d = 1 - positions; d < positions; d++) { /* key − query */
        int far = abs(d), near = rows / 4, bucket = skips ? 3 * far : far <= near ? far : near + (far - near) / 3;
        int row = rows / 2 + (d > 0 ? -bucket : bucket);
        buckets[d + positions - 1] = row < 0 ? 0 : row >= rows ? rows - 1 : row;
    }
    return buckets;
}

static Attention attention_of(Parts p, int hidden, int heads, int tokens) {
    Attention a = {.num_heads = heads, .window = p.window, .scale = 1.0f / sqrtf((float)(hidden / heads))};
    if (p.offsets) a.offsets = (Offsets){p.offsets, normals(heads * offsets_stride(p.offsets), 2.0f)};
    if (p.rotation) {
        size_t half = hidden / heads / 2;
        rotation = (Rotation){p.rotation, memory(p.rotation * half * 4), memory(p.rotation * half * 4)};
        for (size_t i = 0; i < p.rotation * half; i++) {
            float angle = (float)(i / half) * powf(100.0f, -(float)(i % half) / half);
            rotation.cos[i] = cosf(angle), rotation.sin[i] = sinf(angle);
        }
        a.rotation = &rotation;
    }
    if (p.rows) {
        size_t count = (size_t)p.rows * hidden;
        a.terms = (Terms){tokens + 3, p.rows, buckets_of(tokens + 3, p.rows, p.skips), p.has_ours ? normals(count, 0.3f) : NULL,
                          p.has_theirs ? normals(count, 0.3f) : NULL};
    }
    return a;
}

static void compare_attention(int tokens, int hidden, int heads, float spread, Parts parts, float odd) {
    int pieces = num_kept;
    size_t count = (size_t)tokens * hidden;
    float *qkv = normals(3 * count, spread), *expected = memory(count * 4), *found = memory((count + 16) * 4);
    Attention a = attention_of(parts, hidden, heads, tokens);
    float *copy = memory(3 * count * 4), *work = memory(attention_work(&a, hidden / heads, tokens) * 4);
    if (odd != 0.0f) qkv[next() % (3 * count)] = odd;
    memcpy(copy, qkv, 3 * count * 4);
    const char *name = odd != 0.0f ? "attention of values that are not finite" : parts.rows ? "attention with terms"
                       : parts.window ? "local attention" : "attention";
    kernels = &reference_kernels;
    attend(&a, copy, tokens, hidden, work, expected);
    kernels = ours;
    for (size_t i = 0; i < count + 16; i++) found[i] = -1e30f;
    attend(&a, qkv, tokens, hidden, work, found);
    /* A rounding error of a score is one of its weight: 1e-5 for scores of up to 100, as with a spread of 5. In
     * long texts weights are rounded to bfloat16. */
    float floor = spread > 2.0f ? 10.0f * spread : parts.rows ? 4.0f : 0.0f;
    int ok = are_near(found, expected, count, tokens < LONG ? floor : 200.0f * spread);
    for (int i = 0; i < 16; i++) ok = ok && found[count + i] == -1e30f;
    check(ok, name, tokens, hidden / heads, parts.window + parts.offsets);
    release(pieces);
}

static const int shapes[][2] = {{64, 4}, {64, 2}, {192, 4}, {128, 2}, {64, 1}}; /* widths 16 32 48 64 64 */

/* Texts of one tile and of several. few: a third of those of up to 200 tokens, a seventh if emulated, and one that is LONG. */
static void compare_attentions(int few) {
    static const int longer[] = {127, 128, 129, 200, 255, 256, 257, 300, 385, 511, 512, 513, 530, 700, 1025, 1300};
    for (int n = 1; n <= 100 + (int)(sizeof longer / sizeof longer[0]); n++) {
        int tokens = n <= 100 ? n : longer[n - 101], is_edge = tokens == 64 || tokens == 128 || tokens == 129;
        if (few && !is_edge && tokens != LONG && (tokens > 200 || n % (is_emulated ? 7 : 3) != 1)) continue;
        int window = (int[]){1, 2, 5, 64, 150, 300}[n % 6], rows = (int[]){2, 6, 32, 128, 512}[n % 5], terms = 1 + n % 3;
        Parts parts[] = {{0},
                         {.offsets = whole(tokens, tokens + 20)},
                         {.rotation = tokens + 2, .window = window},
                         {.rotation = tokens},
                         {.window = 64},
                         {.rows = rows, .has_ours = terms & 1, .has_theirs = terms & 2, .skips = n % 2}};
        for (int i = 0; i < 6; i++) {
            const int *shape = shapes[(n + i) % 5];
            compare_attention(tokens, shape[0], shape[1], 1.0f, parts[i], 0.0f);
        }
        compare_attention(tokens, 64, 4, 5.0f, parts[n % 2], 0.0f);
        if (n % 3 == 1) compare_attention(tokens, 64, 2, 1.0f, parts[n % 2], n % 2 ? NAN : INFINITY);
    }
}

static void compare_rest(void) {
    static const int widths[] = {64, 128, 192, 768};
    for (int n = 0; n < 4; n++)
        for (int tokens = 1; tokens <= 9; tokens++) {
            int hidden = widths[n];
            size_t count = (size_t)tokens * hidden;
            float *x = normals(count, 3.0f), *same = memory(count * 4), *expected = memory(count * 4);
            for (size_t i = 0; i < count; i++) x[i] += 5.0f;
            if (tokens == 8) x[3] = NAN;
            if (tokens == 9) x[3] = INFINITY;
            reference_kernels.mean(x, tokens, hidden, expected);
            ours->mean(x, tokens, hidden, same);
            check(are_near(same, expected, hidden, 0.0f), "mean", tokens, hidden, 0);
            float a = reference_kernels.dot(x, x + count - hidden, hidden), b = ours->dot(x, x + count - hidden, hidden);
            check(are_near(&b, &a, 1, 0.0f), "dot", tokens, hidden, 0);
            Norm norm = {normals(hidden, 1.0f), normals(hidden, 1.0f), 1e-12f};
            memcpy(same, x, count * 4);
            reference_kernels.layer_norm(x, tokens, hidden, &norm, expected);
            ours->layer_norm(same, tokens, hidden, &norm, same);
            check(are_near(same, expected, count, 0.0f), "layer norm", tokens, hidden, 0);
            int8_t *word = memory(hidden);
            for (int i = 0; i < hidden; i++) word[i] = (int8_t)whole(-128, 127);
            for (int with = 0; with < 4; with++) {
                const float *type = with & 1 ? norm.shift : NULL, *position = with & 2 ? norm.scale : NULL;
                reference_kernels.embed(word, 0.01f, position, type, hidden, expected);
                ours->embed(word, 0.01f, position, type, hidden, same);
                check(are_same(same, expected, hidden), "embedding", with, hidden, 0);
            }
            release(0);
        }
}

int main(int count, char **arguments) {
    for (int i = 0; i < num_kernels; i++) {
        if (count < 2 && all_kernels[i]->why_not() == NULL) puts(all_kernels[i]->name);
        if (count >= 2 && !strcmp(all_kernels[i]->name, arguments[1])) ours = all_kernels[i];
    }
    if (count < 2) return 0;
    int few = count > 2;
    is_emulated = few && !strcmp(arguments[2], "emulated");
    const char *missing = ours ? ours->why_not() : "there are no such kernels";
    if (missing != NULL) {
        printf("%s: %s\n", arguments[1], missing);
        return 2;
    }
    if (ours->begin) ours->begin();
    if (ours != &reference_kernels) {
        compare_products(few);
        compare_gelu();
        compare_quantize();
        compare_rest();
        compare_attentions(few);
    }
    check(ours->multiply_adds() > 0, "the number of multiply-adds", 0, 0, 0);
    if (ours->end) ours->end();
    printf("%s: %d differences\n", ours->name, failures);
    return failures > 0;
}
