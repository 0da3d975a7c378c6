/* i8mm (SMMLA) and dotprod (SDOT) with NEON, for Linux on aarch64.
 *
 * Both share everything but the int8 product. Sums of int8 products are exact, so both give the same bits. Flipping the
 * top bit of a uint8 activation x gives x − MIDDLE in int8, so sums need no correction by Linear.offset.
 */
#include "kernels.h"

#if !defined(__AARCH64EL__) || !defined(__linux__)
static const char *why_not(void) { return "needs Linux on aarch64"; }
const Kernels i8mm_kernels = {.name = "i8mm", .why_not = why_not};
const Kernels dotprod_kernels = {.name = "dotprod", .why_not = why_not};
#elif (defined(__clang__) && __clang_major__ < 16) || (!defined(__clang__) && __GNUC__ < 10)
static const char *why_not(void) { return "needs a build with gcc 10, clang 16 or newer"; }
const Kernels i8mm_kernels = {.name = "i8mm", .why_not = why_not};
const Kernels dotprod_kernels = {.name = "dotprod", .why_not = why_not};
#else
#include <arm_neon.h>
#include <math.h>
#include <sys/auxv.h>

static const char *dotprod_why_not(void) {
    return getauxval(AT_HWCAP) & (1ul << 20) ? NULL : "needs dotprod (Armv8.4)"; /* HWCAP_ASIMDDP */
}

static const char *i8mm_why_not(void) {
    if (dotprod_why_not() != NULL) return dotprod_why_not();
    return getauxval(AT_HWCAP2) & (1ul << 13) ? NULL : "needs i8mm (Armv8.6)"; /* HWCAP2_I8MM */
}

/* eˣ for x ≤ 0; NaN stays NaN. */
static inline float32x4_t exp4(float32x4_t x) {
    x = vmaxq_f32(x, vdupq_n_f32(-87.0f));
    float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693145752f));
    r = vfmsq_f32(r, n, vdupq_n_f32(1.42860677e-6f));
    float32x4_t p = vdupq_n_f32(1.0f / 720);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 120), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 24), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f / 6), p, r);
    p = vfmaq_f32(vdupq_n_f32(0.5f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    p = vfmaq_f32(vdupq_n_f32(1.0f), p, r);
    /* p · 2ⁿ: n is -126 … 0 and p about 1, so adding n to the bits of the exponent is enough. */
    int32x4_t exponent = vshlq_n_s32(vcvtnq_s32_f32(n), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), exponent));
}

/* ½·x·(1 + erf(x/√2)); erf as a rational function, fitted to 3e-7 on [-4, 4], where float32 reaches ±1. */
static inline float32x4_t gelu4(float32x4_t x) {
    float32x4_t y = vmulq_n_f32(x, 0.707106781f);
    y = vminq_f32(vmaxq_f32(y, vdupq_n_f32(-4.0f)), vdupq_n_f32(4.0f));
    float32x4_t u = vmulq_f32(y, y);
    float32x4_t p = vdupq_n_f32(1.9867894166789307e-06f);
    p = vfmaq_f32(vdupq_n_f32(0.0002845639752402275f), p, u);
    p = vfmaq_f32(vdupq_n_f32(0.003883275895802294f), p, u);
    p = vfmaq_f32(vdupq_n_f32(0.05310153637721895f), p, u);
    p = vfmaq_f32(vdupq_n_f32(0.19354353274552474f), p, u);
    p = vfmaq_f32(vdupq_n_f32(1.128379139396274f), p, u);
    float32x4_t q = vdupq_n_f32(3.7420146291437546e-05f);
    q = vfmaq_f32(vdupq_n_f32(0.0011855538438856074f), q, u);
    q = vfmaq_f32(vdupq_n_f32(0.015207115847981591f), q, u);
    q = vfmaq_f32(vdupq_n_f32(0.11534936098275016f), q, u);
    q = vfmaq_f32(vdupq_n_f32(0.504856046231757f), q, u);
    q = vfmaq_f32(vdupq_n_f32(1.0f), q, u);
    float32x4_t erf = vdivq_f32(vmulq_f32(y, p), q), half = vmulq_n_f32(x, 0.5f);
    return vfmaq_f32(half, half, erf);
}

/* The total of four independent vectors of sums. */
static inline float sum_of(const float32x4_t *v) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(v[0], v[1]), vaddq_f32(v[2], v[3])));
}

static void layer_norm(const float *from, int tokens, int hidden, const Norm *norm, float *to) {
    for (int t = 0; t < tokens; t++) {
        const float *x = from + (size_t)t * hidden;
        float *y = to + (size_t)t * hidden;
        float32x4_t sum[4], square[4];
        for (int c = 0; c < 4; c++) sum[c] = square[c] = vdupq_n_f32(0.0f);
        for (int i = 0; i < hidden; i += 16)
            for (int c = 0; c < 4; c++) sum[c] = vaddq_f32(sum[c], vld1q_f32(x + i + 4 * c));
        float32x4_t mean = vdupq_n_f32(sum_of(sum) / hidden);
        for (int i = 0; i < hidden; i += 16)
            for (int c = 0; c < 4; c++) {
                float32x4_t d = vsubq_f32(vld1q_f32(x + i + 4 * c), mean);
                square[c] = vfmaq_f32(square[c], d, d);
            }
        float inverse = 1.0f / sqrtf(sum_of(square) / hidden + norm->epsilon);
        for (int i = 0; i < hidden; i += 4) {
            float32x4_t d = vmulq_n_f32(vsubq_f32(vld1q_f32(x + i), mean), inverse);
            vst1q_f32(y + i, vfmaq_f32(vld1q_f32(norm->shift + i), d, vld1q_f32(norm->scale + i)));
        }
    }
}

/* ---- int8 ------------------------------------------------------------------------------------------- */

/* minnm and maxnm ignore NaN unless both operands are NaN. */
static Range range(const float *x, size_t count) {
    float32x4_t low[4], high[4];
    for (int c = 0; c < 4; c++) low[c] = high[c] = vld1q_f32(x + 4 * c);
    for (size_t i = 16; i < count; i += 16)
        for (int c = 0; c < 4; c++) {
            float32x4_t v = vld1q_f32(x + i + 4 * c);
            low[c] = vminnmq_f32(low[c], v);
            high[c] = vmaxnmq_f32(high[c], v);
        }
    for (int c = 1; c < 4; c++) {
        low[0] = vminnmq_f32(low[0], low[c]);
        high[0] = vmaxnmq_f32(high[0], high[c]);
    }
    return (Range){vminnmvq_f32(low[0]), vmaxnmvq_f32(high[0])};
}

/* Quantize 4 values to saturated int16, before MIDDLE is added; NaN becomes less than any int8. */
static inline int16x4_t steps4(const float *x, float32x4_t center, float inverse) {
    float32x4_t steps = vmulq_n_f32(vsubq_f32(vld1q_f32(x), center), inverse);
    steps = vminnmq_f32(vmaxnmq_f32(steps, vdupq_n_f32(-1e6f)), vdupq_n_f32(1e6f));
    return vqmovn_s32(vcvtnq_s32_f32(steps));
}

static void quantize(const float *x, int tokens, int width, Quantization *rows, uint8_t *to) {
    for (int t = 0; t < tokens; t++, x += width, to += width) {
        rows[t] = quantization_of(range(x, width));
        float inverse = 1.0f / rows[t].scale;
        float32x4_t center = vdupq_n_f32(rows[t].center);
        for (int i = 0; i < width; i += 16) {
            int8x8_t half[2];
            for (int c = 0; c < 2; c++) {
                const float *from = x + i + 8 * c;
                int16x4_t left = steps4(from, center, inverse), right = steps4(from + 4, center, inverse);
                half[c] = vqmovn_s16(vcombine_s16(left, right));
            }
            uint8x16_t v = vreinterpretq_u8_s8(vcombine_s8(half[0], half[1]));
            vst1q_u8(to + i, veorq_u8(v, vdupq_n_u8(MIDDLE))); /* v + MIDDLE */
        }
    }
}

/* Activations as int8, x − MIDDLE. */
static inline int8x16_t activations(const uint8_t *x) {
    return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(x), vdupq_n_u8(MIDDLE)));
}

/* Number of outputs computed together: the outputs of a tile. */
enum { COLUMNS = 16 };

/* Dequantize sums and apply the epilogue, for `rows` rows of 16 outputs. */
static inline __attribute__((always_inline)) void finish(const Product *p, const int32_t (*sums)[COLUMNS], int row,
                                                         int column, int rows, Epilogue epilogue) {
    const Linear *w = p->w;
    for (int c = 0; c < COLUMNS; c += 4) {
        float32x4_t scale = vld1q_f32(w->scale + column + c), bias = vld1q_f32(w->bias + column + c);
        float32x4_t center = vld1q_f32(w->center + column + c);
        for (int r = 0; r < rows; r++) {
            size_t at = (size_t)(row + r) * w->out + column + c;
            const Quantization *q = &p->rows[row + r];
            float32x4_t shift = vfmaq_n_f32(bias, center, q->center);
            float32x4_t v = vcvtq_f32_s32(vld1q_s32(sums[r] + c));
            v = vfmaq_f32(shift, v, vmulq_n_f32(scale, q->scale));
            if (epilogue == GELU) v = gelu4(v);
            if (epilogue == RELU) v = vmaxnmq_f32(v, vdupq_n_f32(0.0f));
            if (epilogue == RESIDUAL) v = vaddq_f32(v, vld1q_f32(p->other + at));
            if (epilogue == GATE) v = vmulq_f32(v, vld1q_f32(p->other + at));
            vst1q_f32(p->to + at, v);
        }
    }
}

static void finish_block(const Product *p, const int32_t (*sums)[COLUMNS], int row, int column, int rows) {
    switch (p->epilogue) {
    case PLAIN: finish(p, sums, row, column, rows, PLAIN); break;
    case GELU: finish(p, sums, row, column, rows, GELU); break;
    case RELU: finish(p, sums, row, column, rows, RELU); break;
    case GATE: finish(p, sums, row, column, rows, GATE); break;
    default: finish(p, sums, row, column, rows, RESIDUAL);
    }
}

/* Code up to the matching pop uses dotprod; call it only if why_not() returns NULL. */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("+dotprod")
#endif

/* A block of rows by 16 outputs, 16 inputs at a time. With 4 rows there are 16 independent sums;
 * each number of rows has its own loop, so that no row is wasted. */
enum { DOTPROD_ROWS = 4 };

static inline __attribute__((always_inline)) void multiply_dotprod(const uint8_t *x, const Linear *w,
                                                                   const int8_t *strip, int32_t (*sums)[COLUMNS],
                                                                   int rows) {
    int32x4_t sum[DOTPROD_ROWS][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++) sum[r][c] = vdupq_n_s32(0);
    for (int k = 0; k < w->in; k += 16) {
        const int8_t *weights = strip + (size_t)k * COLUMNS;
        int8x16_t inputs[DOTPROD_ROWS];
        for (int r = 0; r < rows; r++) inputs[r] = activations(x + (size_t)r * w->in + k);
#define FOUR_INPUTS(lane)                                                                                     \
    for (int c = 0; c < 4; c++) {                                                                             \
        int8x16_t four = vld1q_s8(weights + 64 * lane + 16 * c);                                              \
        for (int r = 0; r < rows; r++) sum[r][c] = vdotq_laneq_s32(sum[r][c], four, inputs[r], lane);         \
    }
        FOUR_INPUTS(0)
        FOUR_INPUTS(1)
        FOUR_INPUTS(2)
        FOUR_INPUTS(3)
#undef FOUR_INPUTS
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 4; c++) vst1q_s32(sums[r] + 4 * c, sum[r][c]);
}

static void product_dotprod(const Product *p) {
    const Linear *w = p->w;
    int32_t sums[DOTPROD_ROWS][COLUMNS];
    int blocks = (p->tokens + DOTPROD_ROWS - 1) / DOTPROD_ROWS;
    for (int column = 0; column < w->out; column += COLUMNS) {
        const int8_t *strip = w->tiles + (size_t)column * w->in;
        for (int block = 0; block < blocks; block++) {
            int row = p->tokens * block / blocks, rows = p->tokens * (block + 1) / blocks - row;
            const uint8_t *from = p->x + (size_t)row * w->in;
            switch (rows) {
#define CASE(n) case n: multiply_dotprod(from, w, strip, sums, n); break
                CASE(1); CASE(2); CASE(3); CASE(4);
#undef CASE
            }
            finish_block(p, (const int32_t(*)[COLUMNS])sums, row, column, rows);
        }
    }
}

/* 16 multiply-adds in each of 16 independent sums. */
static double multiply_adds_dotprod(void) {
    enum { TIMES = 4000 };
    int32x4_t sum[16];
    int8x16_t x = vdupq_n_s8(1);
    for (int i = 0; i < 16; i++) sum[i] = vdupq_n_s32(0);
    for (int n = 0; n < TIMES; n++) {
        for (int i = 0; i < 16; i++) sum[i] = vdotq_s32(sum[i], x, x);
        __asm__ volatile("" : "+w"(x)); /* keeps the compiler from moving it out of the loop */
    }
    for (int i = 0; i < 16; i++) __asm__ volatile("" : : "w"(sum[i]));
    return TIMES * 16 * 16.0;
}

#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("dotprod,i8mm"))), apply_to = function)
#else
#pragma GCC target("+dotprod+i8mm")
#endif

/* SMMLA multiplies 8 inputs of two rows by 8 inputs of two outputs. Rows are paired once for all outputs; two registers
 * of 4 outputs by 4 inputs are rearranged into two of 2 outputs by 8 inputs. With 4 pairs by 8 outputs there are 16
 * sums of 2 by 2. */
enum { I8MM_PAIRS = 4, PAIRED_SIZE = 1 << 16 }; /* twice the largest number of inputs, see has_kernels() */

/* Interleave the rows of each pair: 8 inputs of the first, 8 of the second, and so on. With an odd number of rows the
 * last row is paired with padding (Product.x). */
static void pair_up(const uint8_t *x, int pairs, int in, int8_t *to) {
    for (int pair = 0; pair < pairs; pair++, x += 2 * (size_t)in)
        for (int k = 0; k < in; k += 16, to += 32) {
            int8x16_t first = activations(x + k), second = activations(x + in + k);
            vst1q_s8(to, vcombine_s8(vget_low_s8(first), vget_low_s8(second)));
            vst1q_s8(to + 16, vcombine_s8(vget_high_s8(first), vget_high_s8(second)));
        }
}

/* The sums of `pairs` pairs of rows for 8 of a strip's 16 outputs; weights and sums point to these outputs. */
static inline __attribute__((always_inline)) void multiply_i8mm(const int8_t *x, const Linear *w,
                                                                const int8_t *weights, int32_t *sums, int pairs) {
    int32x4_t sum[I8MM_PAIRS][4];
    for (int p = 0; p < pairs; p++)
        for (int c = 0; c < 4; c++) sum[p][c] = vdupq_n_s32(0);
    for (int k = 0; k < w->in; k += 8, weights += 8 * COLUMNS) {
        int8x16_t outputs[4];
        for (int c = 0; c < 2; c++) {
            int32x4_t low = vreinterpretq_s32_s8(vld1q_s8(weights + 16 * c));
            int32x4_t high = vreinterpretq_s32_s8(vld1q_s8(weights + 16 * c + 4 * COLUMNS));
            outputs[2 * c] = vreinterpretq_s8_s32(vzip1q_s32(low, high));
            outputs[2 * c + 1] = vreinterpretq_s8_s32(vzip2q_s32(low, high));
        }
        for (int p = 0; p < pairs; p++) {
            int8x16_t inputs = vld1q_s8(x + 2 * ((size_t)p * w->in + k));
            for (int c = 0; c < 4; c++) sum[p][c] = vmmlaq_s32(sum[p][c], inputs, outputs[c]);
        }
    }
    for (int p = 0; p < pairs; p++)
        for (int c = 0; c < 2; c++) {
            int64x2_t left = vreinterpretq_s64_s32(sum[p][2 * c]), right = vreinterpretq_s64_s32(sum[p][2 * c + 1]);
            vst1q_s32(sums + 2 * p * COLUMNS + 4 * c, vreinterpretq_s32_s64(vzip1q_s64(left, right)));
            vst1q_s32(sums + (2 * p + 1) * COLUMNS + 4 * c, vreinterpretq_s32_s64(vzip2q_s64(left, right)));
        }
}

/* The product for `tokens` rows of p, from row `first` on, whose pairs are in x. */
static void multiply_pairs(const Product *p, const int8_t *x, int first, int tokens) {
    const Linear *w = p->w;
    int32_t sums[2 * I8MM_PAIRS][COLUMNS];
    int pairs = (tokens + 1) / 2, blocks = (pairs + I8MM_PAIRS - 1) / I8MM_PAIRS;
    for (int column = 0; column < w->out; column += COLUMNS) {
        const int8_t *strip = w->tiles + (size_t)column * w->in;
        for (int block = 0; block < blocks; block++) {
            int pair = pairs * block / blocks, count = pairs * (block + 1) / blocks - pair;
            const int8_t *from = x + 2 * (size_t)pair * w->in;
            for (int half = 0; half < 2; half++) {
                int32_t *to = sums[0] + 8 * half;
                switch (count) {
#define CASE(n) case n: multiply_i8mm(from, w, strip + 32 * half, to, n); break
                    CASE(1); CASE(2); CASE(3); CASE(4);
#undef CASE
                }
            }
            int rows = tokens - 2 * pair < 2 * count ? tokens - 2 * pair : 2 * count;
            finish_block(p, (const int32_t(*)[COLUMNS])sums, first + 2 * pair, column, rows);
        }
    }
}

static void product_i8mm(const Product *p) {
    const Linear *w = p->w;
    int8_t x[PAIRED_SIZE];
    int most = PAIRED_SIZE / w->in / 2 * 2; /* rows that x holds */
    if (p->tokens == 1) {
        product_dotprod(p); /* half of a pair would be wasted */
        return;
    }
    for (int first = 0; first < p->tokens; first += most) {
        int tokens = p->tokens - first < most ? p->tokens - first : most;
        pair_up(p->x + (size_t)first * w->in, (tokens + 1) / 2, w->in, x);
        multiply_pairs(p, x, first, tokens);
    }
}

/* 32 multiply-adds in each of 16 independent sums. */
static double multiply_adds_i8mm(void) {
    enum { TIMES = 4000 };
    int32x4_t sum[16];
    int8x16_t x = vdupq_n_s8(1);
    for (int i = 0; i < 16; i++) sum[i] = vdupq_n_s32(0);
    for (int n = 0; n < TIMES; n++) {
        for (int i = 0; i < 16; i++) sum[i] = vmmlaq_s32(sum[i], x, x);
        __asm__ volatile("" : "+w"(x)); /* keeps the compiler from moving it out of the loop */
    }
    for (int i = 0; i < 16; i++) __asm__ volatile("" : : "w"(sum[i]));
    return TIMES * 16 * 32.0;
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* ---- attention -------------------------------------------------------------------------------------- */

/* Number of rows computed together. The loops have constant bounds, so that the sums stay in registers: 4 rows by 16
 * columns. Past the end, the last row is repeated. */
enum { ROWS = 4 };

/* The scores of 16 keys from key j on for the rows from `row` on. keys: (width, wide). */
static void score_keys(const Block *b, const float *keys, size_t wide, int row, int j) {
    float32x4_t s[ROWS][4];
    const float *q[ROWS];
    for (int r = 0; r < ROWS; r++) {
        q[r] = b->q[row + r < b->rows ? row + r : b->rows - 1];
        for (int c = 0; c < 4; c++) s[r][c] = vdupq_n_f32(0.0f);
    }
    for (int d = 0; d < b->tile->width; d++) {
        float32x4_t key[4];
        for (int c = 0; c < 4; c++) key[c] = vld1q_f32(keys + d * wide + j + 4 * c);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c++) s[r][c] = vfmaq_n_f32(s[r][c], key[c], q[r][d]);
    }
    for (int r = 0; r < ROWS && row + r < b->rows; r++)
        for (int c = 0; c < 4; c++) {
            float32x4_t v = vmulq_n_f32(s[r][c], b->factor);
            const float *added = b->added[row + r];
            if (added) v = vaddq_f32(v, vld1q_f32(added + j + 4 * c));
            vst1q_f32(b->scores + (row + r) * b->score_stride + j + 4 * c, v);
        }
}

static void score(const Block *b) {
    size_t wide = ROUND_UP(b->tile->tokens, 16);
    for (int row = 0; row < b->rows; row += ROWS)
        for (int j = 0; j < b->last - b->first; j += 16) score_keys(b, b->tile->work + b->first, wide, row, j);
}

/* keys[d][t] = k[t][d] for a tile of a head, in blocks of 16 tokens that stay in the L1 cache; zeros past the end. */
static void prepare(const Tile *tile) {
    size_t wide = ROUND_UP(tile->tokens, 16);
    for (size_t t0 = 0; t0 < wide; t0 += 16)
        for (int d = 0; d < tile->width; d++) {
            float *to = tile->work + d * wide + t0;
            int real = tile->tokens - (int)t0 < 16 ? tile->tokens - (int)t0 : 16;
            for (int t = 0; t < real; t++) to[t] = tile->k[(t0 + t) * tile->stride + d];
            for (int t = real; t < 16; t++) to[t] = 0.0f;
        }
}

/* A mask of the keys i … i + 3: true for those from low to high − 1. */
static inline uint32x4_t seen(int i, int low, int high) {
    static const int32_t places[] = {0, 1, 2, 3};
    int32x4_t place = vaddq_s32(vld1q_s32(places), vdupq_n_s32(i));
    return vandq_u32(vcgeq_s32(place, vdupq_n_s32(low)), vcltq_s32(place, vdupq_n_s32(high)));
}

/* Turn a query's scores (wide) into weights, which are 0 outside its keys; returns the sum of the weights. largest: the
 * largest score so far, updated. */
static float soften(const Block *b, int r, int wide, float *largest) {
    float *s = b->scores + r * b->score_stride;
    int low = b->low[r], high = b->high[r];
    float32x4_t max = vdupq_n_f32(*largest), total = vdupq_n_f32(0.0f);
    for (int i = 0; i < wide; i += 4) {
        float32x4_t v = vld1q_f32(s + i);
        if (i < low || i + 4 > high) v = vbslq_f32(seen(i, low, high), v, max);
        max = vmaxq_f32(max, v);
    }
    *largest = vmaxvq_f32(max);
    max = vdupq_n_f32(*largest);
    for (int i = 0; i < wide; i += 4) {
        float32x4_t e = exp4(vsubq_f32(vld1q_f32(s + i), max));
        if (i < low || i + 4 > high) e = vbslq_f32(seen(i, low, high), e, vdupq_n_f32(0.0f));
        vst1q_f32(s + i, e);
        if (b->tile->rounds) round_to_bfloat16(s + i, 4);
        total = vaddq_f32(total, vld1q_f32(s + i));
    }
    return vaddvq_f32(total);
}

/* Columns d … d + 15 of the weighted mean of the values, which begin at v, for the rows from `row` on. */
static void mix_values(const Block *b, const float *v, const float *inverse, const float *carry, int row, int d) {
    float32x4_t s[ROWS][4];
    const float *weights[ROWS];
    for (int r = 0; r < ROWS; r++) {
        weights[r] = b->scores + (row + r < b->rows ? row + r : b->rows - 1) * b->score_stride;
        for (int c = 0; c < 4; c++) s[r][c] = vdupq_n_f32(0.0f);
    }
    for (int j = 0; j < b->last - b->first; j++) {
        float32x4_t value[4];
        for (int c = 0; c < 4; c++) value[c] = vld1q_f32(v + j * b->tile->stride + d + 4 * c);
        for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < 4; c++) s[r][c] = vfmaq_n_f32(s[r][c], value[c], weights[r][j]);
    }
    for (int r = 0; r < ROWS && row + r < b->rows; r++)
        for (int c = 0; c < 4; c++) {
            float *to = b->to[row + r] + d + 4 * c;
            float32x4_t mixed = vmulq_n_f32(s[r][c], inverse[row + r]);
            if (b->largest) mixed = vfmaq_n_f32(mixed, vld1q_f32(to), carry[row + r]);
            vst1q_f32(to, mixed);
        }
}

static void mix(const Block *b) {
    float inverse[ATTENTION_ROWS], carry[ATTENTION_ROWS];
    const float *v = b->tile->v + b->first * b->tile->stride;
    for (int r = 0; r < b->rows; r++) {
        float largest = b->largest ? b->largest[r] : -INFINITY;
        float total = soften(b, r, ROUND_UP(b->last - b->first, 16), &largest);
        inverse[r] = b->largest ? 1.0f : 1.0f / total;
        carry[r] = b->largest ? carry_of(b->largest[r], largest) : 0.0f;
        if (b->largest) update(b, r, largest, total);
    }
    for (int row = 0; row < b->rows; row += ROWS)
        for (int d = 0; d < b->tile->width; d += 16) mix_values(b, v, inverse, carry, row, d);
}

#include "plain.h"

/* ---- the rest --------------------------------------------------------------------------------------- */

static void embed(const int8_t *word, float scale, const float *position, const float *type, int hidden, float *to) {
    for (int i = 0; i < hidden; i += 8) {
        int16x8_t wide = vmovl_s8(vld1_s8(word + i));
        int16x4_t half[2] = {vget_low_s16(wide), vget_high_s16(wide)};
        for (int c = 0; c < 2; c++) {
            float32x4_t v = vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(half[c])), scale);
            if (position) v = vaddq_f32(v, vld1q_f32(position + i + 4 * c));
            if (type) v = vaddq_f32(v, vld1q_f32(type + i + 4 * c));
            vst1q_f32(to + i + 4 * c, v);
        }
    }
}

static void mean(const float *rows, int tokens, int hidden, float *to) {
    for (int i = 0; i < hidden; i += 4) {
        float32x4_t sum = vdupq_n_f32(0.0f);
        for (int t = 0; t < tokens; t++) sum = vaddq_f32(sum, vld1q_f32(rows + (size_t)t * hidden + i));
        vst1q_f32(to + i, vdivq_f32(sum, vdupq_n_f32((float)tokens)));
    }
}

static float dot(const float *a, const float *b, int count) {
    float32x4_t sum[4];
    for (int c = 0; c < 4; c++) sum[c] = vdupq_n_f32(0.0f);
    for (int i = 0; i < count; i += 16)
        for (int c = 0; c < 4; c++)
            sum[c] = vfmaq_f32(sum[c], vld1q_f32(a + i + 4 * c), vld1q_f32(b + i + 4 * c));
    return sum_of(sum);
}

#define SHARED                                                                                                \
    .quantize = quantize, .rows = 8, .prepare = prepare, .score = score, .mix = mix, .rotate = rotate,                   \
    .add_terms = add_terms, .layer_norm = layer_norm, .embed = embed, .mean = mean, .dot = dot

const Kernels i8mm_kernels = {
    .name = "i8mm",
    .why_not = i8mm_why_not,
    .product = product_i8mm,
    .multiply_adds = multiply_adds_i8mm,
    SHARED,
};

const Kernels dotprod_kernels = {
    .name = "dotprod",
    .why_not = dotprod_why_not,
    .product = product_dotprod,
    .multiply_adds = multiply_adds_dotprod,
    SHARED,
};
#endif
