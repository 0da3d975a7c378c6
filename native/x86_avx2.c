/* AVX-VNNI and AVX2 with FMA, for Linux on x86-64: processors without AVX-512.
 *
 * Both share everything but the int8 product. Sums of int8 products are exact, so both give the same bits.
 */
#include "kernels.h"

#if !defined(__x86_64__) || !defined(__linux__)
static const char *why_not(void) { return "needs Linux on x86-64"; }
const Kernels avxvnni_kernels = {.name = "avxvnni", .why_not = why_not};
const Kernels avx2_kernels = {.name = "avx2", .why_not = why_not};
#elif (defined(__clang__) && __clang_major__ < 12) || (!defined(__clang__) && __GNUC__ < 11)
static const char *why_not(void) { return "needs a build with gcc 11, clang 12 or newer"; }
const Kernels avxvnni_kernels = {.name = "avxvnni", .why_not = why_not};
const Kernels avx2_kernels = {.name = "avx2", .why_not = why_not};
#else
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

static const char *avx2_why_not(void) {
    static const char *const missing = "needs AVX2 and FMA";
    unsigned a, b, c, d, features, low, high;
    if (!__get_cpuid(1, &a, &b, &features, &d) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return missing;
    const unsigned fma_osxsave = (1u << 12) | (1u << 27);
    if ((features & fma_osxsave) != fma_osxsave || !(b & (1u << 5))) return missing;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & 6) == 6 ? NULL : "the system does not save AVX registers";
}

static const char *avxvnni_why_not(void) {
    unsigned a = 0, b, c, d;
    const char *missing = avx2_why_not();
    if (missing != NULL) return missing;
    __get_cpuid_count(7, 1, &a, &b, &c, &d);
    return a & (1u << 4) ? NULL : "needs AVX-VNNI";
}

/* Code up to the matching pop uses these instructions; call it only if why_not() returns NULL. The
 * AVX-VNNI code is in its own section, so that the compiler cannot use AVX-VNNI in the AVX2 functions. */
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

static inline float sum_of(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline float least_of(__m256 v) {
    __m128 s = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_min_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_min_ss(s, _mm_movehdup_ps(s)));
}

static inline float largest_of(__m256 v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

/* eˣ for x ≤ 0. min and max return their second operand if either is NaN, so NaN stays NaN. */
static inline __m256 exp8(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.0f), x);
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), r);
    __m256 p = _mm256_set1_ps(1.0f / 720);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    /* p · 2ⁿ: n is -126 … 0 and p about 1, so adding n to the bits of the exponent is enough. */
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}

/* ½·x·(1 + erf(x/√2)); erf as a rational function, fitted to 3e-7 on [-4, 4], where float32 reaches ±1. */
static inline __m256 gelu8(__m256 x) {
    __m256 y = _mm256_mul_ps(x, _mm256_set1_ps(0.707106781f));
    y = _mm256_min_ps(_mm256_max_ps(y, _mm256_set1_ps(-4.0f)), _mm256_set1_ps(4.0f));
    __m256 u = _mm256_mul_ps(y, y);
    __m256 p = _mm256_set1_ps(1.9867894166789307e-06f);
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(0.0002845639752402275f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(0.003883275895802294f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(0.05310153637721895f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(0.19354353274552474f));
    p = _mm256_fmadd_ps(p, u, _mm256_set1_ps(1.128379139396274f));
    __m256 q = _mm256_set1_ps(3.7420146291437546e-05f);
    q = _mm256_fmadd_ps(q, u, _mm256_set1_ps(0.0011855538438856074f));
    q = _mm256_fmadd_ps(q, u, _mm256_set1_ps(0.015207115847981591f));
    q = _mm256_fmadd_ps(q, u, _mm256_set1_ps(0.11534936098275016f));
    q = _mm256_fmadd_ps(q, u, _mm256_set1_ps(0.504856046231757f));
    q = _mm256_fmadd_ps(q, u, _mm256_set1_ps(1.0f));
    __m256 erf = _mm256_div_ps(_mm256_mul_ps(y, p), q);
    __m256 half = _mm256_mul_ps(x, _mm256_set1_ps(0.5f));
    return _mm256_fmadd_ps(half, erf, half);
}

static void layer_norm(const float *from, int tokens, int hidden, const Norm *norm, float *to) {
    for (int t = 0; t < tokens; t++) {
        const float *x = from + (size_t)t * hidden;
        float *y = to + (size_t)t * hidden;
        __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()}, square[2] = {sum[0], sum[0]};
        for (int i = 0; i < hidden; i += 16)
            for (int c = 0; c < 2; c++) sum[c] = _mm256_add_ps(sum[c], _mm256_loadu_ps(x + i + 8 * c));
        __m256 mean = _mm256_set1_ps(sum_of(_mm256_add_ps(sum[0], sum[1])) / hidden);
        for (int i = 0; i < hidden; i += 16)
            for (int c = 0; c < 2; c++) {
                __m256 d = _mm256_sub_ps(_mm256_loadu_ps(x + i + 8 * c), mean);
                square[c] = _mm256_fmadd_ps(d, d, square[c]);
            }
        float variance = sum_of(_mm256_add_ps(square[0], square[1])) / hidden;
        __m256 inverse = _mm256_set1_ps(1.0f / sqrtf(variance + norm->epsilon));
        for (int i = 0; i < hidden; i += 8) {
            __m256 d = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), mean), inverse);
            _mm256_storeu_ps(y + i, _mm256_fmadd_ps(d, _mm256_loadu_ps(norm->scale + i),
                                                    _mm256_loadu_ps(norm->shift + i)));
        }
    }
}

/* ---- int8 ------------------------------------------------------------------------------------------- */

/* NaN is ignored unless all values are NaN. */
static Range range(const float *x, size_t count) {
    __m256 low[2], high[2];
    for (int c = 0; c < 2; c++) {
        low[c] = _mm256_set1_ps(INFINITY);
        high[c] = _mm256_set1_ps(-INFINITY);
    }
    for (size_t i = 0; i < count; i += 16)
        for (int c = 0; c < 2; c++) {
            __m256 v = _mm256_loadu_ps(x + i + 8 * c);
            low[c] = _mm256_min_ps(v, low[c]);
            high[c] = _mm256_max_ps(v, high[c]);
        }
    Range found = {least_of(_mm256_min_ps(low[0], low[1])), largest_of(_mm256_max_ps(high[0], high[1]))};
    return found.low > found.high ? (Range){NAN, NAN} : found;
}

/* Quantize 8 values to int32, before MIDDLE is added; NaN becomes less than any int8. */
static inline __m256i steps8(const float *x, __m256 center, __m256 inverse) {
    __m256 steps = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x), center), inverse);
    steps = _mm256_min_ps(_mm256_max_ps(steps, _mm256_set1_ps(-1e6f)), _mm256_set1_ps(1e6f));
    return _mm256_cvtps_epi32(steps);
}

static void quantize(const float *x, int tokens, int width, Quantization *rows, uint8_t *to) {
    const __m128i middle = _mm_set1_epi8((char)MIDDLE);
    for (int t = 0; t < tokens; t++, x += width, to += width) {
        rows[t] = quantization_of(range(x, width));
        __m256 inverse = _mm256_set1_ps(1.0f / rows[t].scale), center = _mm256_set1_ps(rows[t].center);
        for (int i = 0; i < width; i += 16) {
            __m256i left = steps8(x + i, center, inverse), right = steps8(x + i + 8, center, inverse);
            __m256i pairs = _mm256_packs_epi32(left, right); /* saturates */
            pairs = _mm256_permute4x64_epi64(pairs, 0xd8); /* packs works within halves of 128 bits */
            __m128i v = _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
            _mm_storeu_si128((__m128i *)(to + i), _mm_xor_si128(v, middle)); /* v + MIDDLE */
        }
    }
}

/* Number of outputs computed together: the outputs of a tile. */
enum { COLUMNS = 16 };

/* Dequantize sums and apply the epilogue, for `rows` rows of 16 outputs. */
static inline __attribute__((always_inline)) void finish(const Product *p, const int32_t (*sums)[COLUMNS], int row,
                                                         int column, int rows, Epilogue epilogue) {
    const Linear *w = p->w;
    for (int c = 0; c < COLUMNS; c += 8) {
        __m256 scale = _mm256_loadu_ps(w->scale + column + c), bias = _mm256_loadu_ps(w->bias + column + c);
        __m256 center = _mm256_loadu_ps(w->center + column + c);
        __m256i offset = _mm256_loadu_si256((const __m256i *)(w->offset + column + c));
        for (int r = 0; r < rows; r++) {
            size_t at = (size_t)(row + r) * w->out + column + c;
            const Quantization *q = &p->rows[row + r];
            __m256i sum = _mm256_sub_epi32(_mm256_load_si256((const __m256i *)(sums[r] + c)), offset);
            __m256 shift = _mm256_fmadd_ps(_mm256_set1_ps(q->center), center, bias);
            __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(q->scale));
            __m256 v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, shift);
            if (epilogue == GELU) v = gelu8(v);
            if (epilogue == RELU) v = _mm256_max_ps(v, _mm256_setzero_ps());
            if (epilogue == RESIDUAL) v = _mm256_add_ps(v, _mm256_loadu_ps(p->other + at));
            if (epilogue == GATE) v = _mm256_mul_ps(v, _mm256_loadu_ps(p->other + at));
            _mm256_storeu_ps(p->to + at, v);
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

/* With few rows, reading the weights from memory takes longer than multiplying, so the weights AHEAD bytes later are
 * prefetched: each block of rows prefetches its share of a strip of 16 outputs, 64 / blocks bytes for 4 inputs. */
enum { AHEAD = 1 << 17 };

static inline const int8_t *ahead_of(const Linear *w, const int8_t *strip) {
    return w->end - strip > AHEAD ? strip + AHEAD : strip;
}

/* AVX2's multiply-add of 16-bit pairs is exact; its multiply-add of bytes saturates. So a register of weights, 8
 * outputs by 4 inputs, is split into two registers of 16-bit values: inputs 0 and 2, and inputs 1 and 3. Activations
 * are split in the same way, once for all outputs. With 5 rows by 16 outputs, 10 sums, 4 weights, an input and a
 * product fill the registers. */
enum { AVX2_ROWS = 5, SPLIT_SIZE = 1 << 15 }; /* the largest number of inputs, see has_kernels() */

/* Widen inputs to 16 bits, every four in the order 0 2 1 3. */
static void split(const uint8_t *x, size_t count, int16_t *to) {
    const __m256i even = _mm256_set1_epi16(0xff);
    for (size_t i = 0; i < count; i += 32) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(x + i));
        __m256i e = _mm256_and_si256(v, even), o = _mm256_srli_epi16(v, 8);
        __m256i low = _mm256_unpacklo_epi32(e, o), high = _mm256_unpackhi_epi32(e, o);
        _mm256_storeu_si256((__m256i *)(to + i), _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256((__m256i *)(to + i + 16), _mm256_permute2x128_si256(low, high, 0x31));
    }
}

static inline __m256i pair_at(const int16_t *x) {
    int32_t pair;
    memcpy(&pair, x, 4);
    return _mm256_set1_epi32(pair);
}

static inline __attribute__((always_inline)) void multiply(const int16_t *x, const Linear *w, const int8_t *strip,
                                                           const int8_t *ahead, int step,
                                                           int32_t (*sums)[COLUMNS], int rows) {
    __m256i sum[AVX2_ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int k = 0; k < w->in; k += 4) {
        __m256i even[2], odd[2];
        for (int c = 0; c < 2; c++) {
            __m256i weights = _mm256_load_si256((const __m256i *)(strip + (size_t)k * 16) + c);
            even[c] = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8);
            odd[c] = _mm256_srai_epi16(weights, 8);
        }
        _mm_prefetch(ahead + (size_t)k * step, _MM_HINT_T1);
        for (int r = 0; r < rows; r++) {
            const int16_t *four = x + (size_t)r * w->in + k;
            __m256i pair = pair_at(four);
            for (int c = 0; c < 2; c++) sum[r][c] = _mm256_add_epi32(sum[r][c], _mm256_madd_epi16(even[c], pair));
            pair = pair_at(four + 2);
            for (int c = 0; c < 2; c++) sum[r][c] = _mm256_add_epi32(sum[r][c], _mm256_madd_epi16(odd[c], pair));
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < 2; c++) _mm256_store_si256((__m256i *)(sums[r] + 8 * c), sum[r][c]);
}

static void product_avx2(const Product *p) {
    const Linear *w = p->w;
    int16_t x[SPLIT_SIZE] __attribute__((aligned(32)));
    int32_t sums[AVX2_ROWS][COLUMNS] __attribute__((aligned(32)));
    int most = SPLIT_SIZE / w->in, parts = (p->tokens + most - 1) / most;
    for (int part = 0; part < parts; part++) {
        int first = p->tokens * part / parts, tokens = p->tokens * (part + 1) / parts - first;
        int blocks = (tokens + AVX2_ROWS - 1) / AVX2_ROWS;
        split(p->x + (size_t)first * w->in, (size_t)tokens * w->in, x);
        for (int column = 0; column < w->out; column += COLUMNS) {
            const int8_t *strip = w->tiles + (size_t)column * w->in, *ahead = ahead_of(w, strip);
            for (int block = 0; block < blocks; block++) {
                const int8_t *share = ahead + (size_t)block * w->in * COLUMNS / blocks;
                int row = tokens * block / blocks, rows = tokens * (block + 1) / blocks - row;
                const int16_t *from = x + (size_t)row * w->in;
                switch (rows) {
#define CASE(n) case n: multiply(from, w, strip, share, 16 / blocks, sums, n); break
                    CASE(1); CASE(2); CASE(3); CASE(4); CASE(5);
#undef CASE
                }
                finish_block(p, (const int32_t(*)[COLUMNS])sums, first + row, column, rows);
            }
        }
    }
}

/* 16 multiply-adds in each of 12 independent sums, with the product's instructions. */
static double multiply_adds_avx2(void) {
    enum { TIMES = 4000, SUMS = 12 };
    __m256i sum[SUMS], x = _mm256_set1_epi16(1);
    for (int i = 0; i < SUMS; i++) sum[i] = _mm256_setzero_si256();
    for (int n = 0; n < TIMES; n++)
        for (int i = 0; i < SUMS; i++) {
            __asm__ volatile("" : "+x"(x)); /* keeps the compiler from moving it out of the loop */
            sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(x, x));
        }
    for (int i = 0; i < SUMS; i++) __asm__ volatile("" : : "x"(sum[i]));
    return TIMES * SUMS * 16.0;
}

/* ---- attention -------------------------------------------------------------------------------------- */

/* Number of rows computed together. The loops have constant bounds, so that the sums stay in registers; with two
 * vectors of 8 columns there are 8 independent sums, enough to hide the latency of FMA. Past the end, the last row is
 * repeated. */
enum { ROWS = 4 };

/* The scores of 8 · `vectors` keys from key j on for the rows from `row` on. keys: (width, wide). */
static inline __attribute__((always_inline)) void score_keys(const Block *b, const float *keys, size_t wide, int row,
                                                             int j, int vectors) {
    __m256 s[ROWS][2], factor = _mm256_set1_ps(b->factor);
    const float *q[ROWS];
    for (int r = 0; r < ROWS; r++) {
        q[r] = b->q[row + r < b->rows ? row + r : b->rows - 1];
        for (int c = 0; c < vectors; c++) s[r][c] = _mm256_setzero_ps();
    }
    for (int d = 0; d < b->tile->width; d++) {
        __m256 key[2];
        for (int c = 0; c < vectors; c++) key[c] = _mm256_loadu_ps(keys + d * wide + j + 8 * c);
        for (int r = 0; r < ROWS; r++) {
            __m256 x = _mm256_set1_ps(q[r][d]);
            for (int c = 0; c < vectors; c++) s[r][c] = _mm256_fmadd_ps(x, key[c], s[r][c]);
        }
    }
    for (int r = 0; r < ROWS && row + r < b->rows; r++)
        for (int c = 0; c < vectors; c++) {
            __m256 v = _mm256_mul_ps(s[r][c], factor);
            const float *added = b->added[row + r];
            if (added) v = _mm256_add_ps(v, _mm256_loadu_ps(added + j + 8 * c));
            _mm256_storeu_ps(b->scores + (row + r) * b->score_stride + j + 8 * c, v);
        }
}

static void score(const Block *b) {
    size_t wide = ROUND_UP(b->tile->tokens, 8);
    int count = ROUND_UP(b->last - b->first, 8);
    const float *keys = b->tile->work + b->first;
    for (int row = 0; row < b->rows; row += ROWS) {
        int j = 0;
        for (; j + 16 <= count; j += 16) score_keys(b, keys, wide, row, j, 2);
        if (j < count) score_keys(b, keys, wide, row, j, 1);
    }
}

/* keys[d][t] = k[t][d] for a tile of a head, in blocks of 8 tokens that stay in the L1 cache; zeros past the end. */
static void prepare(const Tile *tile) {
    size_t wide = ROUND_UP(tile->tokens, 8);
    for (size_t t0 = 0; t0 < wide; t0 += 8)
        for (int d = 0; d < tile->width; d++) {
            float *to = tile->work + d * wide + t0;
            int real = tile->tokens - (int)t0 < 8 ? tile->tokens - (int)t0 : 8;
            for (int t = 0; t < real; t++) to[t] = tile->k[(t0 + t) * tile->stride + d];
            for (int t = real; t < 8; t++) to[t] = 0.0f;
        }
}

/* A mask of the keys i … i + 7: true for those from low to high − 1. */
static inline __m256 seen(int i, int low, int high) {
    const __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(high - i), place);
    return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(low - i), place), below));
}

/* Turn a query's scores (wide) into weights, which are 0 outside its keys; returns the sum of the weights. largest: the
 * largest score so far, updated. */
static float soften(const Block *b, int r, int wide, float *largest) {
    float *s = b->scores + r * b->score_stride;
    int low = b->low[r], high = b->high[r];
    __m256 max = _mm256_set1_ps(*largest), total = _mm256_setzero_ps();
    for (int i = 0; i < wide; i += 8) {
        __m256 v = _mm256_loadu_ps(s + i);
        if (i < low || i + 8 > high) v = _mm256_blendv_ps(max, v, seen(i, low, high));
        max = _mm256_max_ps(max, v);
    }
    *largest = largest_of(max);
    max = _mm256_set1_ps(*largest);
    for (int i = 0; i < wide; i += 8) {
        __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + i), max));
        if (i < low || i + 8 > high) e = _mm256_and_ps(seen(i, low, high), e);
        _mm256_storeu_ps(s + i, e);
        if (b->tile->rounds) round_to_bfloat16(s + i, 8);
        total = _mm256_add_ps(total, _mm256_loadu_ps(s + i));
    }
    return sum_of(total);
}

/* Columns d … d + 15 of the weighted mean of the values, which begin at v, for the rows from `row` on. */
static void mix_values(const Block *b, const float *v, const float *inverse, const float *carry, int row, int d) {
    __m256 s[ROWS][2];
    const float *weights[ROWS];
    for (int r = 0; r < ROWS; r++) {
        weights[r] = b->scores + (row + r < b->rows ? row + r : b->rows - 1) * b->score_stride;
        for (int c = 0; c < 2; c++) s[r][c] = _mm256_setzero_ps();
    }
    for (int j = 0; j < b->last - b->first; j++) {
        __m256 value[2];
        for (int c = 0; c < 2; c++) value[c] = _mm256_loadu_ps(v + j * b->tile->stride + d + 8 * c);
        for (int r = 0; r < ROWS; r++) {
            __m256 x = _mm256_set1_ps(weights[r][j]);
            for (int c = 0; c < 2; c++) s[r][c] = _mm256_fmadd_ps(x, value[c], s[r][c]);
        }
    }
    for (int r = 0; r < ROWS && row + r < b->rows; r++)
        for (int c = 0; c < 2; c++) {
            float *to = b->to[row + r] + d + 8 * c;
            __m256 mixed = _mm256_mul_ps(s[r][c], _mm256_set1_ps(inverse[row + r]));
            if (b->largest) mixed = _mm256_fmadd_ps(_mm256_loadu_ps(to), _mm256_set1_ps(carry[row + r]), mixed);
            _mm256_storeu_ps(to, mixed);
        }
}

static void mix(const Block *b) {
    float inverse[ATTENTION_ROWS], carry[ATTENTION_ROWS];
    const float *v = b->tile->v + b->first * b->tile->stride;
    for (int r = 0; r < b->rows; r++) {
        float largest = b->largest ? b->largest[r] : -INFINITY;
        float total = soften(b, r, ROUND_UP(b->last - b->first, 8), &largest);
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
        __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(word + i))));
        v = _mm256_mul_ps(v, _mm256_set1_ps(scale));
        if (position) v = _mm256_add_ps(v, _mm256_loadu_ps(position + i));
        if (type) v = _mm256_add_ps(v, _mm256_loadu_ps(type + i));
        _mm256_storeu_ps(to + i, v);
    }
}

static void mean(const float *rows, int tokens, int hidden, float *to) {
    for (int i = 0; i < hidden; i += 8) {
        __m256 sum = _mm256_setzero_ps();
        for (int t = 0; t < tokens; t++) sum = _mm256_add_ps(sum, _mm256_loadu_ps(rows + (size_t)t * hidden + i));
        _mm256_storeu_ps(to + i, _mm256_div_ps(sum, _mm256_set1_ps((float)tokens)));
    }
}

static float dot(const float *a, const float *b, int count) {
    __m256 sum[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int i = 0; i < count; i += 16)
        for (int c = 0; c < 2; c++)
            sum[c] = _mm256_fmadd_ps(_mm256_loadu_ps(a + i + 8 * c), _mm256_loadu_ps(b + i + 8 * c), sum[c]);
    return sum_of(_mm256_add_ps(sum[0], sum[1]));
}

#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avxvnni")
#endif

/* ---- AVX-VNNI ------------------------------------------------------------------------------------------- */

/* A block of rows by 16 outputs, 4 inputs at a time. With 6 rows, 12 sums, two weights and an input fill the
 * registers; each number of rows has its own loop, so that no row is wasted. */
enum { VNNI_ROWS = 6 };

static inline __attribute__((always_inline)) void multiply_vnni(const uint8_t *x, const Linear *w,
                                                                const int8_t *strip, const int8_t *ahead, int step,
                                                                int32_t (*sums)[COLUMNS], int rows) {
    __m256i sum[VNNI_ROWS][2];
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int k = 0; k < w->in; k += 4) {
        const __m256i *weights = (const __m256i *)(strip + (size_t)k * 16);
        __m256i left = _mm256_load_si256(weights), right = _mm256_load_si256(weights + 1);
        _mm_prefetch(ahead + (size_t)k * step, _MM_HINT_T1);
        for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + (size_t)r * w->in + k, 4);
            __m256i v = _mm256_set1_epi32(four);
            sum[r][0] = _mm256_dpbusd_avx_epi32(sum[r][0], v, left);
            sum[r][1] = _mm256_dpbusd_avx_epi32(sum[r][1], v, right);
        }
    }
    for (int r = 0; r < rows; r++) {
        _mm256_store_si256((__m256i *)sums[r], sum[r][0]);
        _mm256_store_si256((__m256i *)(sums[r] + 8), sum[r][1]);
    }
}

static void product_avxvnni(const Product *p) {
    const Linear *w = p->w;
    int32_t sums[VNNI_ROWS][COLUMNS] __attribute__((aligned(32)));
    int blocks = (p->tokens + VNNI_ROWS - 1) / VNNI_ROWS;
    for (int column = 0; column < w->out; column += COLUMNS) {
        const int8_t *strip = w->tiles + (size_t)column * w->in, *ahead = ahead_of(w, strip);
        for (int block = 0; block < blocks; block++) {
            const int8_t *share = ahead + (size_t)block * w->in * COLUMNS / blocks;
            int row = p->tokens * block / blocks, rows = p->tokens * (block + 1) / blocks - row;
            const uint8_t *from = p->x + (size_t)row * w->in;
            switch (rows) {
#define CASE(n) case n: multiply_vnni(from, w, strip, share, 16 / blocks, sums, n); break
                CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
#undef CASE
            }
            finish_block(p, (const int32_t(*)[COLUMNS])sums, row, column, rows);
        }
    }
}

/* 4·8 multiply-adds in each of 12 independent sums. */
static double multiply_adds_avxvnni(void) {
    enum { TIMES = 4000, SUMS = 12 };
    __m256i sum[SUMS], x = _mm256_set1_epi8(1);
    for (int i = 0; i < SUMS; i++) sum[i] = _mm256_setzero_si256();
    for (int n = 0; n < TIMES; n++) {
        for (int i = 0; i < SUMS; i++) sum[i] = _mm256_dpbusd_avx_epi32(sum[i], x, x);
        __asm__ volatile("" : "+x"(x)); /* keeps the compiler from moving it out of the loop */
    }
    for (int i = 0; i < SUMS; i++) __asm__ volatile("" : : "x"(sum[i]));
    return TIMES * SUMS * 32.0;
}

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define SHARED                                                                                                \
    .quantize = quantize, .rows = 8, .prepare = prepare, .score = score, .mix = mix, .rotate = rotate,                   \
    .add_terms = add_terms, .layer_norm = layer_norm, .embed = embed, .mean = mean, .dot = dot

const Kernels avxvnni_kernels = {
    .name = "avxvnni",
    .why_not = avxvnni_why_not,
    .product = product_avxvnni,
    .multiply_adds = multiply_adds_avxvnni,
    SHARED,
};

const Kernels avx2_kernels = {
    .name = "avx2",
    .why_not = avx2_why_not,
    .product = product_avx2,
    .multiply_adds = multiply_adds_avx2,
    SHARED,
};
#endif
